"""A real PostgreSQL cluster for the tests of an application that follows one."""

from ctxdb_pgstatus.testing._launcher import EmbeddedPostgresError, postgres_is_available
from ctxdb_pgstatus.testing.cluster import PostgresCluster, PostgresNode

__all__ = ["EmbeddedPostgresError", "PostgresCluster", "PostgresNode", "postgres_is_available"]
