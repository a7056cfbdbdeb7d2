"""Sessions of the current unit of work, and sessions outside of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeAlias, get_args

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sessions import end as session_end
from ctxdb_core._sessions.end import in_transaction
from ctxdb_core._shield import run_to_completion
from ctxdb_core._transactions.task_unit import CommitDebt, Visit
from ctxdb_core.connect import DBConnect, check_database
from ctxdb_core.errors import (
    ArgumentValueError,
    ContextNotInitiatedError,
    TransactionAlreadyActiveError,
    TransactionRequiredError,
)
from ctxdb_core.isolation import NO_OPTIONS, IsolationLevel, TransactionOptions
from ctxdb_core.unit import OnCommit, UnitOfWork, current_unit

__all__ = [
    "CurrentTransaction",
    "atomic_db_session",
    "close_db_session",
    "commit_db_session",
    "db_session",
    "new_non_ctx_atomic_session",
    "new_non_ctx_session",
    "on_commit",
    "rollback_db_session",
]

# Bound once: looking the method up at each call is a third of what a call costs (Python 3.11).
_get_current_unit = current_unit.get

CurrentTransaction: TypeAlias = Literal["commit", "rollback", "append", "raise", "savepoint"]
"""What `atomic_db_session` does with a transaction that is open already."""


async def db_session(db: DBConnect) -> AsyncSession:
    """Return the session of the current unit of work on `db`: the same one each time, made at the first call.

    It needs no closing: the unit of work commits or rolls back, and gives the connection back. The connection is taken
    at the first statement.

    Raises:
        ContextNotInitiatedError: there is no unit of work here.
        ContextClosedError: the unit of work has ended; the error says what to do.
    """
    try:
        return _get_current_unit().sessions[db]
    except (LookupError, TypeError):
        # No unit of work, or no session on `db` yet, or no database at all: kept out of the way of the common case.
        pass
    return await _unit(db).open_session(db)


@asynccontextmanager
async def atomic_db_session(
    db: DBConnect,
    current_transaction: CurrentTransaction = "commit",
    *,
    isolation_level: IsolationLevel | None = None,
    read_only: bool = False,
) -> AsyncIterator[AsyncSession]:
    """Run a block in a transaction of its own on the current unit's session: committed at its end, or rolled back.

    Args:
        db: where.
        current_transaction: what to do with a transaction that is open already:

            - ``"commit"`` it, and begin a new one;
            - ``"rollback"``: roll it back, and begin a new one;
            - ``"append"``: go on in it, and commit all of it at the end of the block;
            - ``"raise"`` an error;
            - ``"savepoint"``: go on in it behind a savepoint, to which an error rolls back; it stays open after the
              block. Without an open transaction, the block gets one of its own.
        isolation_level: of the block's transaction alone, which takes its connection when the block begins. To go on in
            a transaction that is open, it must have this level already.
        read_only: have the database refuse writes, in the block's transaction alone; to go on in a transaction that is
            open, it must be read-only already.

    Raises:
        ValueError: `current_transaction` is none of these, or the database has no such `isolation_level`; nothing has
            been ended then.
        TransactionOptionsError: the transaction to go on in has another isolation level, or may write; or there can be
            no transaction with one (`DBConnect.from_url(..., read_only=True)`).
        TransactionAlreadyActiveError: a transaction is open, and ``"raise"`` was asked for; or this is inside of a
            block of the session (``async with session.begin_nested():``) that would be ended with it.
        SessionAlreadyActiveError: another task of the unit of work is inside of such a block, and does not wait for
            this one.
        TransactionRequiredError: this is inside of a block without transactions (see `transactional`).
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
        BaseException: what the block raised, or the error of a commit.
    """
    if current_transaction not in get_args(CurrentTransaction):
        modes = ", ".join(map(repr, get_args(CurrentTransaction)))
        raise ArgumentValueError(f"current_transaction={current_transaction!r} is none of {modes}.")
    options = TransactionOptions(isolation_level, read_only) if isolation_level or read_only else NO_OPTIONS
    unit = _unit(db)
    require_transactions(unit)
    session = await db_session(db)
    with Visit(unit, db, nested=True):
        if options:
            options.check(session, db)
        if in_transaction(session):
            if current_transaction in _ENDS_TRANSACTION:
                _check_no_block(session, db, savepoints_only=current_transaction == "append")
            if current_transaction in ("append", "savepoint"):
                # If the block cannot go on in this transaction, that one stays as it is.
                await options.apply(session, db)
            if current_transaction == "savepoint":
                async with session.begin_nested():
                    yield session
                return
            if current_transaction == "raise":
                raise TransactionAlreadyActiveError(
                    f"A transaction is open on {db!r} already: commit it with `await commit_db_session(db)`, or choose "
                    "another `current_transaction`."
                )
            if current_transaction == "commit":
                await unit.commit([db])
            elif current_transaction == "rollback":
                await unit.roll_back(None, [db])
        try:
            if options and not in_transaction(session):
                await options.apply(session, db)
            with CommitDebt(unit, session):
                yield session
        except BaseException as exc:
            await unit.roll_back(exc, [db])
            raise
        # If the unit has ended under the block, so has its transaction.
        unit.check_usable()
        await unit.commit([db])


async def commit_db_session(db: DBConnect) -> None:
    """Commit what the current unit of work has done on `db` so far; its connection goes back to the pool.

    The session stays usable and begins a new transaction at its next statement. Does nothing if none is open.

    Raises:
        TransactionAlreadyActiveError: this is inside of the block of a savepoint, such as ``async with
            session.begin_nested():``, which would be ended with the transaction; nothing has been committed.
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
        BaseException: the error of the commit; the transaction has been rolled back then.
    """
    unit = _usable_unit(db)
    session = unit.sessions.get(db)
    if session is not None:
        _check_no_block(session, db, savepoints_only=True)
    await unit.commit([db])


async def rollback_db_session(db: DBConnect) -> None:
    """Roll back what the current unit of work has done on `db` since its last commit; the session stays usable.

    Inside of a savepoint's block, this is true of the transaction around it, too. The session is usable again when the
    block has been left: SQLAlchemy refuses further statements in it (``InvalidRequestError``).

    Raises:
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    await _usable_unit(db).roll_back(None, [db])


async def close_db_session(db: DBConnect) -> None:
    """Close the current unit's session on `db`, without a commit: its connection goes back to the pool at once.

    For long work that needs no database. The next `db_session` returns a new session; the closed one refuses further
    statements by `SessionClosedError`.

    Raises:
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    await _usable_unit(db).close_session(db)


def on_commit(db: DBConnect, callback: OnCommit) -> None:
    """Call `callback` once this unit's commit on `db` has succeeded, and never if it is rolled back.

    Nor is one called that was registered inside of a savepoint which is rolled back. It runs before the response
    leaves, in a unit of work of its own. The commit stands whatever becomes of it: its errors are logged, and the
    response is a success all the same.

    Args:
        db: whose commit to wait for.
        callback: called without arguments; may be async.

    Raises:
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    unit = _unit(db)
    capture = db._capture_callback  # noqa: SLF001 - for the testing tools, and none of the application's business
    unit.on_commit(db, callback if capture is None else capture(callback))


@asynccontextmanager
async def new_non_ctx_session(db: DBConnect) -> AsyncIterator[AsyncSession]:
    """Open a session outside of any unit of work, and close it at the end of the block; nothing is committed for it.

    Raises:
        BaseException: what the block raised.
    """
    check_database(db)
    session = await db.create_session()
    try:
        yield session
    except BaseException as exc:
        await run_to_completion(session_end.close(session, exc, db))
        raise
    await run_to_completion(session_end.close(session, None, db))


@asynccontextmanager
async def new_non_ctx_atomic_session(db: DBConnect) -> AsyncIterator[AsyncSession]:
    """Open a session outside of any unit of work; commit it at the end of the block, or roll it back on an exception.

    Raises:
        BaseException: what the block raised, or the error of the commit.
    """
    async with new_non_ctx_session(db) as session:
        yield session
        await run_to_completion(session.commit())


def require_transactions(unit: UnitOfWork) -> None:
    """Raise the error that says so if the sessions of `unit` have no transactions."""
    if unit.autocommit:
        raise TransactionRequiredError(
            "This block runs without a transaction, as `transactional` was asked to, and so would what is in here. Use "
            "`transactional(db)`, which begins one."
        )


_ENDS_TRANSACTION = ("commit", "rollback", "append")


def _check_no_block(session: AsyncSession, db: DBConnect, *, savepoints_only: bool) -> None:
    """Raise the error that says so if ending the transaction would end a block of `session` that the code is in.

    SQLAlchemy refuses all that follows in such a block, when the transaction has ended already.
    """
    # Of those that are open, it is the innermost.
    block: Any = session.sync_session._trans_context_manager  # noqa: SLF001 - there is no public name for it
    if block is None or (savepoints_only and not block.nested):
        return
    name = "savepoint (`session.begin_nested()`, or 'savepoint' and 'nested')" if block.nested else "`session.begin()`"
    raise TransactionAlreadyActiveError(
        f"This code is inside of the block of a {name} on {db!r}, which cannot go on when its transaction has ended: "
        "nothing was done. Commit after the block; or run what must stand by itself in a transaction beside it "
        "(`run_in_new_ctx`, or `transactional(db, 'requires_new')`)."
    )


def _unit(db: DBConnect) -> UnitOfWork:
    check_database(db)
    unit = _get_current_unit(None)
    if unit is None:
        raise ContextNotInitiatedError
    return unit.of(db)


def _usable_unit(db: DBConnect) -> UnitOfWork:
    unit = _unit(db)
    unit.check_usable()
    return unit
