"""SQLAlchemy sessions from the context: one unit of work per request, ended before its response leaves."""

from ctxdb_core._blocks.atomic import CurrentTransaction, atomic_db_session
from ctxdb_core._blocks.joining import joining_session
from ctxdb_core._blocks.retry import is_conflict, retry_on_conflict
from ctxdb_core._blocks.transaction_context import TransactionContext
from ctxdb_core._blocks.transactional import Propagation, transactional
from ctxdb_core._databases.connect import DBConnect, EngineListener, close_all, default_session_maker
from ctxdb_core._databases.status import DBStatus, PoolStatus, UnitStatus
from ctxdb_core._sqlalchemy.binds import is_autocommit, is_read_only
from ctxdb_core._transactions.isolation import IsolationLevel
from ctxdb_core._units.callbacks import OnCommit
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.hooks import OnBegin, on_begin, on_commit, on_rollback, set_rollback_only
from ctxdb_core._units.lifecycle import (
    before_gather,
    begin,
    finalize,
    gather_in_new_ctx,
    is_context_initiated,
    new_db_ctx,
    run_in_new_ctx,
    unit_of_work,
)
from ctxdb_core._units.sessions import (
    close_db_session,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
)
from ctxdb_core._units.timeout import set_statement_timeout
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core.errors import (
    AbandonedWorkError,
    ArgumentTypeError,
    ArgumentValueError,
    CommitOutcomeUnknownError,
    ContextClosedError,
    ContextNotInitiatedError,
    CtxDBError,
    DeadlineExceededError,
    HostNotSetError,
    MissingExtraError,
    NoSessionError,
    OpenCursorError,
    SessionAlreadyActiveError,
    SessionClosedError,
    SessionOwnedError,
    StatementInterruptedError,
    TransactionAbortedError,
    TransactionAlreadyActiveError,
    TransactionOptionsError,
    TransactionRequiredError,
    UnexpectedRollbackError,
)
from ctxdb_core.events import (
    DBEvent,
    EventListener,
    SessionClosed,
    SessionOpened,
    TransactionBegun,
    TransactionCommitted,
    TransactionRolledBack,
)
from ctxdb_core.policy import CommitPolicy, commit_2xx, commit_below_400, commit_policy

__all__ = [
    "AbandonedWorkError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BeforeCommit",
    "CommitOutcomeUnknownError",
    "CommitPolicy",
    "ContextClosedError",
    "ContextNotInitiatedError",
    "CtxDBError",
    "CurrentTransaction",
    "DBConnect",
    "DBEvent",
    "DBStatus",
    "DeadlineExceededError",
    "EngineListener",
    "EventListener",
    "HostNotSetError",
    "IsolationLevel",
    "MissingExtraError",
    "NoSessionError",
    "OnBegin",
    "OnCommit",
    "OpenCursorError",
    "PoolStatus",
    "Propagation",
    "SessionAlreadyActiveError",
    "SessionClosed",
    "SessionClosedError",
    "SessionOpened",
    "SessionOwnedError",
    "StatementInterruptedError",
    "TransactionAbortedError",
    "TransactionAlreadyActiveError",
    "TransactionBegun",
    "TransactionCommitted",
    "TransactionContext",
    "TransactionOptionsError",
    "TransactionRequiredError",
    "TransactionRolledBack",
    "UnexpectedRollbackError",
    "UnitOfWork",
    "UnitStatus",
    "atomic_db_session",
    "before_gather",
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
    "is_autocommit",
    "is_conflict",
    "is_context_initiated",
    "is_read_only",
    "joining_session",
    "new_db_ctx",
    "new_non_ctx_atomic_session",
    "new_non_ctx_session",
    "on_begin",
    "on_commit",
    "on_rollback",
    "retry_on_conflict",
    "rollback_db_session",
    "run_in_new_ctx",
    "set_rollback_only",
    "set_statement_timeout",
    "transactional",
    "unit_of_work",
]
