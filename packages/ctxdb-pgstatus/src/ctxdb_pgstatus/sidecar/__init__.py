"""The sidecar: tells over HTTP what a `HostMonitor` knows, to programs in any language.

The sidecar reads the environment variables of pg-status and has the endpoints of pg-status. `settings` reads the
variables, and `command` runs a monitor and the HTTP server of `server`. `app` answers requests out of memory: `choice`
chooses the replicas, `page` and `history` make the status page, and `metrics` what Prometheus reads.
"""

from ctxdb_pgstatus.sidecar.command import main

__all__ = ["main"]
