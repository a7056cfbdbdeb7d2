"""The sidecar: what a monitor knows, over HTTP, for programs in any language.

It takes the environment variables of pg-status and answers at its endpoints. The data flows from `settings` through
`command`, which runs the monitor and the server, to `app`, which answers out of memory: by `choice`, and for people and
for Prometheus by `page`, `history` and `metrics`.
"""

from ctxdb_pgstatus.sidecar.command import main

__all__ = ["main"]
