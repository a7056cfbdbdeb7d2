"""A real PostgreSQL for tests: one server, or a cluster to be killed, frozen, promoted and brought back."""

from ctxdb_pgstatus.testing._launcher import EmbeddedPostgresError, postgres_is_available
from ctxdb_pgstatus.testing.cluster import PostgresCluster, PostgresNode
from ctxdb_pgstatus.testing.embedded import EmbeddedPostgres

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "PostgresCluster",
    "PostgresNode",
    "postgres_is_available",
]
