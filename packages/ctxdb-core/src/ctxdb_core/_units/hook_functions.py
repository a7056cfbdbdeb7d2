"""What code asks of its unit of work: calls at the begin and end of transactions, a roll-back, a time limit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

from ctxdb_core._databases.arguments import check_function
from ctxdb_core._databases.connect import DBConnect, SessionT
from ctxdb_core._sqlalchemy.guarded_session import OnBegin
from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.callbacks import Callback, OnCommit, Outcome
from ctxdb_core._units.generator_blocks import innermost_unit
from ctxdb_core._units.session_functions import unit_for
from ctxdb_core._units.unit import current_unit
from ctxdb_core.errors import ContextNotInitiatedError

__all__ = ["OnBegin", "on_begin", "on_commit", "on_rollback", "set_rollback_only", "set_statement_timeout"]


def on_commit(db: DBConnect, callback: OnCommit) -> None:
    """Call `callback` once this unit's commit on `db` has succeeded, and never if it is rolled back.

    Nor is a callback called that was registered inside of a savepoint which is rolled back. It runs before the response
    leaves, in a unit of work of its own. The commit stands whatever becomes of it: its errors are logged, and the
    response is a success all the same.

    Args:
        db: whose commit to wait for.
        callback: called without arguments; may be async.

    Raises:
        ArgumentTypeError: `callback` is no function, but a coroutine for instance.
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    check_function(callback, "the callback of `on_commit`")
    unit = unit_for(db)
    capture = db._capture_callback  # noqa: SLF001 - for the testing tools, and none of the application's business
    unit.on_outcome(db, Outcome.COMMITTED, callback if capture is None else capture(callback))


def on_rollback(db: DBConnect, callback: Callback) -> None:
    """Call `callback` once what this unit has done on `db` was rolled back, and never if it is committed.

    So is a callback called that was registered inside of a savepoint which is rolled back. It runs as one of
    `on_commit` does: before the response leaves, in a unit of work of its own, and its errors are logged.

    Args:
        db: whose roll-back to wait for.
        callback: called without arguments; may be async.

    Raises:
        ArgumentTypeError: `callback` is no function, but a coroutine for instance.
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    check_function(callback, "the callback of `on_rollback`")
    unit_for(db).on_outcome(db, Outcome.ROLLED_BACK, callback)


def on_begin(db: DBConnect[SessionT], callback: Callable[[SessionT], Awaitable[object]]) -> None:
    """Await ``callback(session)`` at the beginning of each further transaction of this unit of work on `db`.

    For what lasts as long as a transaction, as ``SET LOCAL ROLE`` and ``set_config(..., true)`` do for row-level
    security: the unit has one transaction for its response, and others for a streamed body and for background tasks.
    The callback comes before the first statement, also before that of a flush. If it raises, so does that statement,
    and the transaction is rolled back: no statement is made without what the callback sets.

    Units of work that are opened inside of this one (``run_in_new_ctx``, ``transactional(db, "requires_new")``) do not
    inherit it.

    On PostgreSQL, a database with ``read_only=True`` has read-only transactions in such a unit, and no autocommit. On
    any other engine in autocommit, the first statement raises `TransactionRequiredError`, and is not executed.

    Args:
        db: whose transactions.
        callback: given the session; its own statements are the first of the transaction.

    Raises:
        TransactionRequiredError: this is inside of a block without transactions (see `transactional`).
        TransactionAlreadyActiveError: a statement has been made in the open transaction, without the callback; or this
            is inside of a savepoint, with which what the callback sets would be undone.
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    check_function(callback, "the callback of `on_begin`")
    unit_for(db).add_begin_hook(db, cast("OnBegin", callback))


def set_rollback_only(db: DBConnect | None = None) -> None:
    """Have what this unit of work has done rolled back at its end, whatever the response: it is sent as it is.

    For protocols that answer an error by a 200, as GraphQL, JSON-RPC and MCP do. It holds for what is open when the
    response starts, or when the block of the unit of work ends; what a streamed body and a background task do
    afterwards is theirs to decide. `before_commit` may still call it. Every commit of the session is refused meanwhile
    (`UnexpectedRollbackError`): by `commit_db_session`, by ``session.commit()``, and at the end of
    ``async with session.begin()``.

    Args:
        db: where; on all databases by default.

    Raises:
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
        TransactionRequiredError: this is inside of a block without transactions (see `transactional`).
    """
    if db is not None:
        unit_for(db).set_rollback_only(db)
        return
    unit = innermost_unit()
    if unit is None:
        raise ContextNotInitiatedError
    unit.set_rollback_only(None)


async def set_statement_timeout(seconds: float | None = None, *, deadline: float | None = None) -> None:
    """Limit each further statement of the current unit of work, on all of its databases.

    Each transaction tells the server its limit when it begins, for itself alone (``SET LOCAL statement_timeout``: one
    round trip); one that is open is told now. A statement that takes longer fails by the database's own error (SQLSTATE
    57014; on SQLite, it is interrupted), and its transaction can only be rolled back then.

    Args:
        seconds: how long each statement may take; without it, and without a `deadline`, there is no limit any more.
        deadline: when all of them have to be done, on the event loop's clock (``loop.time() + 2.5``). The server is
            told what is left when the transaction begins; once it has passed, no statement is sent.

    Raises:
        ValueError: `seconds` is not positive.
        ContextNotInitiatedError, ContextClosedError: as `ctxdb_core.db_session`.
        DeadlineExceededError: a transaction is open, and the deadline has passed.
        TransactionOptionsError: a transaction is open on a database that has no such limit.
    """
    unit = current_unit.get(None)
    if unit is None:
        raise ContextNotInitiatedError
    await unit.limit_statements(StatementTimeout(seconds, deadline))
