"""Tools for tests: what the application commits is rolled back, while all of its life cycle really runs."""

from ctxdb_core.testing._contexts import put_savepoint_session_in_ctx, rollback_session, set_test_context
from ctxdb_core.testing._errors import SharedTransactionError
from ctxdb_core.testing._shared import shared_transaction

__all__ = [
    "SharedTransactionError",
    "put_savepoint_session_in_ctx",
    "rollback_session",
    "set_test_context",
    "shared_transaction",
]
