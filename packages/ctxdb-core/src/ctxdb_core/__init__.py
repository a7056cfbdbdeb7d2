"""SQLAlchemy sessions from the context: one unit of work per request, ended before its response leaves."""

from ctxdb_core.connect import DBConnect, close_all, default_session_maker
from ctxdb_core.errors import (
    ContextClosedError,
    ContextNotInitiatedError,
    CtxDBError,
    DeadlineExceededError,
    HostNotSetError,
    MissingExtraError,
    SessionClosedError,
    TransactionAbortedError,
    TransactionAlreadyActiveError,
    TransactionOptionsError,
    TransactionRequiredError,
    UnexpectedRollbackError,
)
from ctxdb_core.isolation import IsolationLevel
from ctxdb_core.lifecycle import (
    begin,
    finalize,
    gather_in_new_ctx,
    is_context_initiated,
    new_db_ctx,
    run_in_new_ctx,
)
from ctxdb_core.policy import CommitPolicy, commit_2xx, commit_below_400, commit_policy
from ctxdb_core.propagation import Propagation, transactional
from ctxdb_core.retry import is_conflict, retry_on_conflict
from ctxdb_core.sessions import (
    CurrentTransaction,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    rollback_db_session,
)
from ctxdb_core.timeout import set_statement_timeout
from ctxdb_core.unit import BeforeCommit, OnCommit, UnitOfWork

__all__ = [
    "BeforeCommit",
    "CommitPolicy",
    "ContextClosedError",
    "ContextNotInitiatedError",
    "CtxDBError",
    "CurrentTransaction",
    "DBConnect",
    "DeadlineExceededError",
    "HostNotSetError",
    "IsolationLevel",
    "MissingExtraError",
    "OnCommit",
    "Propagation",
    "SessionClosedError",
    "TransactionAbortedError",
    "TransactionAlreadyActiveError",
    "TransactionOptionsError",
    "TransactionRequiredError",
    "UnexpectedRollbackError",
    "UnitOfWork",
    "atomic_db_session",
    "begin",
    "close_all",
    "close_db_session",
    "commit_2xx",
    "commit_below_400",
    "commit_db_session",
    "commit_policy",
    "db_session",
    "default_session_maker",
    "finalize",
    "gather_in_new_ctx",
    "is_conflict",
    "is_context_initiated",
    "new_db_ctx",
    "new_non_ctx_atomic_session",
    "new_non_ctx_session",
    "on_commit",
    "retry_on_conflict",
    "rollback_db_session",
    "run_in_new_ctx",
    "set_statement_timeout",
    "transactional",
]
