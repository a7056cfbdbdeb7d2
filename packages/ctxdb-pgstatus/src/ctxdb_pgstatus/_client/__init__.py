"""What `PgStatusClient` consists of: the requests that it sends to a sidecar, and the answers that it reads."""
