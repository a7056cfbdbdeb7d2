"""SQLAlchemy sessions from the context: one unit of work per request, ended before its response leaves.

These are the names for applications. Those for authors of adapters and extensions are in `ctxdb_core.adapters`, and
those for listeners in `ctxdb_core.events`.
"""

import importlib
import typing
import warnings

from ctxdb_core._blocks.atomic import atomic_db_session
from ctxdb_core._blocks.joining_session import joining_session
from ctxdb_core._blocks.retry import is_conflict, retry_on_conflict
from ctxdb_core._blocks.transaction_context import TransactionContext
from ctxdb_core._blocks.transactional import transactional
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._databases.status import DBStatus, PoolStatus, UnitStatus
from ctxdb_core._sqlalchemy.versions import warn_of_lost_promises as _warn_of_lost_promises
from ctxdb_core._units import log_fields as _log_fields  # noqa: F401 - gives the records of the logger their fields
from ctxdb_core._units.hook_functions import (
    on_begin,
    on_commit,
    on_rollback,
    set_rollback_only,
    set_statement_timeout,
)
from ctxdb_core._units.lifecycle import gather_in_new_ctx, new_db_ctx, run_in_new_ctx, unit_of_work
from ctxdb_core._units.session_functions import (
    close_db_session,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
)
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
from ctxdb_core.policy import commit_2xx, commit_below_400, commit_policy

if typing.TYPE_CHECKING:
    # The names that have moved: see `_MOVED`.
    from ctxdb_core._blocks.atomic import CurrentTransaction as CurrentTransaction
    from ctxdb_core._blocks.transactional import Propagation as Propagation
    from ctxdb_core._databases.connect import EngineListener as EngineListener
    from ctxdb_core._databases.connect import close_all as close_all
    from ctxdb_core._databases.connect import default_session_maker as default_session_maker
    from ctxdb_core._sqlalchemy.binds import is_autocommit as is_autocommit
    from ctxdb_core._sqlalchemy.binds import is_read_only as is_read_only
    from ctxdb_core._transactions.isolation import IsolationLevel as IsolationLevel
    from ctxdb_core._units.callbacks import OnCommit as OnCommit
    from ctxdb_core._units.commit import BeforeCommit as BeforeCommit
    from ctxdb_core._units.hook_functions import OnBegin as OnBegin
    from ctxdb_core._units.lifecycle import before_gather as before_gather
    from ctxdb_core._units.lifecycle import begin as begin
    from ctxdb_core._units.lifecycle import finalize as finalize
    from ctxdb_core._units.lifecycle import is_context_initiated as is_context_initiated
    from ctxdb_core._units.unit import UnitOfWork as UnitOfWork
    from ctxdb_core.events import DBEvent as DBEvent
    from ctxdb_core.events import EventListener as EventListener
    from ctxdb_core.events import SessionClosed as SessionClosed
    from ctxdb_core.events import SessionOpened as SessionOpened
    from ctxdb_core.events import TransactionBegun as TransactionBegun
    from ctxdb_core.events import TransactionCommitted as TransactionCommitted
    from ctxdb_core.events import TransactionRolledBack as TransactionRolledBack
    from ctxdb_core.policy import CommitPolicy as CommitPolicy

__all__ = [
    "AbandonedWorkError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "CommitOutcomeUnknownError",
    "ContextClosedError",
    "ContextNotInitiatedError",
    "CtxDBError",
    "DBConnect",
    "DBStatus",
    "DeadlineExceededError",
    "HostNotSetError",
    "MissingExtraError",
    "NoSessionError",
    "OpenCursorError",
    "PoolStatus",
    "SessionAlreadyActiveError",
    "SessionClosedError",
    "SessionOwnedError",
    "StatementInterruptedError",
    "TransactionAbortedError",
    "TransactionAlreadyActiveError",
    "TransactionContext",
    "TransactionOptionsError",
    "TransactionRequiredError",
    "UnexpectedRollbackError",
    "UnitStatus",
    "atomic_db_session",
    "close_db_session",
    "commit_2xx",
    "commit_below_400",
    "commit_db_session",
    "commit_policy",
    "db_session",
    "gather_in_new_ctx",
    "is_conflict",
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

_MOVED = {
    "ctxdb_core.adapters": [
        "BeforeCommit",
        "CommitPolicy",
        "CurrentTransaction",
        "EngineListener",
        "IsolationLevel",
        "OnBegin",
        "OnCommit",
        "Propagation",
        "UnitOfWork",
        "before_gather",
        "begin",
        "close_all",
        "default_session_maker",
        "finalize",
        "is_autocommit",
        "is_context_initiated",
        "is_read_only",
    ],
    "ctxdb_core.events": [
        "DBEvent",
        "EventListener",
        "SessionClosed",
        "SessionOpened",
        "TransactionBegun",
        "TransactionCommitted",
        "TransactionRolledBack",
    ],
}
"""Names that were here once, by the module that they are in now."""

_warn_of_lost_promises()

if not typing.TYPE_CHECKING:  # type checkers would take every name for one that is here

    def __getattr__(name: str) -> object:
        """Return what has moved, with a warning that says where it is."""
        for module, names in _MOVED.items():
            if name in names:
                warnings.warn(
                    f"ctxdb_core.{name} has moved: import it from {module}.", DeprecationWarning, stacklevel=2
                )
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
