"""A real PostgreSQL for tests: `EmbeddedPostgres`, one server; `PostgresCluster`, a primary and its standbys."""

from ctxdb_core.testing.postgres import EmbeddedPostgres, EmbeddedPostgresError, postgres_is_available
from ctxdb_pgstatus.testing.cluster import PostgresCluster, PostgresNode

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "PostgresCluster",
    "PostgresNode",
    "postgres_is_available",
]
