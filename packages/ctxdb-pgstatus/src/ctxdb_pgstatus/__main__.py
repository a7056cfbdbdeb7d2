"""The sidecar: ``python -m ctxdb_pgstatus``, the same as the command ``ctxdb-pgstatus``."""

from __future__ import annotations

import sys

from ctxdb_pgstatus.sidecar import main

if __name__ == "__main__":
    sys.exit(main())
