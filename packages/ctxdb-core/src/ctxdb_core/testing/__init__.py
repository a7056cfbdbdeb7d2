"""Tools for tests: what the application commits is rolled back, while all of its life cycle really runs."""

from ctxdb_core.testing._callbacks import CapturedCallbacks, capture_on_commit
from ctxdb_core.testing._cleaner import TableCleaner
from ctxdb_core.testing._contexts import (
    put_savepoint_session_in_ctx,
    put_session_in_ctx,
    rollback_session,
    set_test_context,
)
from ctxdb_core.testing._errors import CleanUpError, SharedTransactionError, WrongDatabaseError
from ctxdb_core.testing._shared import shared_transaction
from ctxdb_core.testing._workers import create_database, drop_database, worker_url
from ctxdb_core.testing.postgres import EmbeddedPostgres, EmbeddedPostgresError

__all__ = [
    "CapturedCallbacks",
    "CleanUpError",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "SharedTransactionError",
    "TableCleaner",
    "WrongDatabaseError",
    "capture_on_commit",
    "create_database",
    "drop_database",
    "put_savepoint_session_in_ctx",
    "put_session_in_ctx",
    "rollback_session",
    "set_test_context",
    "shared_transaction",
    "worker_url",
]
