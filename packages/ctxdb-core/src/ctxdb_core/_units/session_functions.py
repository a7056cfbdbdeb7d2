"""Sessions of the current unit of work, and sessions outside of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect, SessionT, check_database
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.private import innermost_block
from ctxdb_core._sqlalchemy.task_blocks import refuse_in_block_of_other_task
from ctxdb_core._units import session_end
from ctxdb_core._units.scheduler_jobs import refuse_in_other_job
from ctxdb_core._units.unit import UnitOfWork, current_unit
from ctxdb_core.errors import (
    ContextNotInitiatedError,
    TransactionAlreadyActiveError,
)

__all__ = [
    "check_no_block",
    "close_db_session",
    "commit_db_session",
    "db_session",
    "new_non_ctx_atomic_session",
    "new_non_ctx_session",
    "rollback_db_session",
    "unit_for",
]

# Bound once: looking the method up at each call is a third of what a call costs (Python 3.11).
_get_current_unit = current_unit.get


async def db_session(db: DBConnect[SessionT]) -> SessionT:
    """Return the session of the current unit of work on `db`: the same one each time, made at the first call.

    It needs no closing: the unit of work commits or rolls back, and gives the connection back. The connection is taken
    at the first statement.

    Raises:
        ContextNotInitiatedError: there is no unit of work here.
        ContextClosedError: the unit of work has ended; the error says what to do.
    """
    try:
        return _get_current_unit().sessions[db]  # type: ignore[return-value]  # `db` has made it; a cast would cost time
    except (LookupError, TypeError):
        # There is no unit of work, no session on `db` yet, or `db` is no database: the common case checks none of this.
        pass
    return cast("SessionT", await unit_for(db).open_session(db))


async def commit_db_session(db: DBConnect) -> None:
    """Commit what the current unit of work has done on `db` so far; its connection goes back to the pool.

    The session stays usable and begins a new transaction at its next statement. Does nothing if none is open.

    Raises:
        TransactionAlreadyActiveError: this is inside of the block of a savepoint, such as ``async with
            session.begin_nested():``, which would be ended with the transaction; nothing has been committed.
        SessionAlreadyActiveError: another task of the unit of work is inside of such a block.
        UnexpectedRollbackError: `set_rollback_only` was called.
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
        BaseException: the error of the commit; the transaction has been rolled back then.
    """
    unit = _usable_unit(db)
    session = unit.sessions.get(db)
    if session is None:
        unit.check_may_commit(db)
        await unit.commit([db])
        return
    # In one turn: no other task enters a block between the look and the commit.
    async with session_end.turn(session, is_one_step=True):
        unit.check_may_commit(db)
        check_no_block(session, db, savepoints_only=True)
        await unit.commit([db])


async def rollback_db_session(db: DBConnect) -> None:
    """Roll back what the current unit of work has done on `db` since its last commit; the session stays usable.

    Inside of a savepoint's block, this is true of the transaction around it, too. The session is usable again when the
    block has been left: SQLAlchemy refuses further statements in it (``InvalidRequestError``).

    The objects of the session keep what they had loaded; a query and ``session.get()`` read them anew.

    Raises:
        SessionAlreadyActiveError: another task of the unit of work is inside of the block of a savepoint, or of another
            one that its own task ends (`atomic_db_session`, `joining_session`, ``session.begin()``).
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    unit = _usable_unit(db)
    session = unit.sessions.get(db)
    if session is None:
        await unit.roll_back(None, [db])
        return
    async with session_end.turn(session, is_one_step=True):
        refuse_in_block_of_other_task(session.sync_session)
        await unit.roll_back(None, [db])


async def close_db_session(db: DBConnect) -> None:
    """Close the current unit's session on `db`, without a commit: its connection goes back to the pool at once.

    For long work that needs no database. The next `db_session` returns a new session; the closed one refuses further
    statements by `SessionClosedError`.

    Raises:
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
    """
    await _usable_unit(db).close_session(db)


@asynccontextmanager
async def new_non_ctx_session(db: DBConnect[SessionT]) -> AsyncIterator[SessionT]:
    """Open a session outside of any unit of work, and close it at the end of the block; nothing is committed for it.

    It needs a connection of its own, beside that of the unit of work: see "A second connection" in
    docs/transactions.md for the size of the pool.

    Raises:
        BaseException: what the block raised.
    """
    check_database(db)
    session = await db.create_session()
    around = _get_current_unit(None)
    if around is not None:
        around.note_second_session(db, session)
    try:
        yield session
    except BaseException as exc:
        await run_to_completion(session_end.close(session, exc, db))
        raise
    await run_to_completion(session_end.close(session, None, db))


@asynccontextmanager
async def new_non_ctx_atomic_session(db: DBConnect[SessionT]) -> AsyncIterator[SessionT]:
    """Open a session outside of any unit of work; commit it at the end of the block, or roll it back on an exception.

    Raises:
        BaseException: what the block raised, or the error of the commit.
    """
    async with new_non_ctx_session(db) as session:
        yield session
        await run_to_completion(session.commit())


def check_no_block(session: AsyncSession, db: DBConnect, *, savepoints_only: bool) -> None:
    """Raise the error that says so if ending the transaction would end a block of `session` that the code is in.

    SQLAlchemy refuses all that follows in such a block, when the transaction has ended already.
    """
    refuse_in_block_of_other_task(session.sync_session)
    block = innermost_block(session.sync_session)
    if block is None or (savepoints_only and not block.nested):
        return
    name = "savepoint (`session.begin_nested()`, or 'savepoint' and 'nested')" if block.nested else "`session.begin()`"
    raise TransactionAlreadyActiveError(
        f"This code is inside of the block of a {name} on {db!r}, which cannot go on when its transaction has ended: "
        "nothing was done. Commit after the block; or run what must stand by itself in a transaction beside it "
        "(`run_in_new_ctx`, or `transactional(db, 'requires_new')`)."
    )


def unit_for(db: DBConnect) -> UnitOfWork:
    """Return the unit of work that answers for `db` in the running code.

    Raises:
        ContextNotInitiatedError: there is none; or this is the job of a scheduler that ctxdb knows, and the unit is
            that of a request in whose context the job was started.
        ArgumentTypeError: `db` is no `DBConnect`.
    """
    check_database(db)
    unit = _get_current_unit(None)
    if unit is None:
        raise ContextNotInitiatedError
    if not unit.closed:
        refuse_in_other_job(current_unit)
    return unit.of(db)


def _usable_unit(db: DBConnect) -> UnitOfWork:
    unit = unit_for(db)
    unit.check_usable()
    return unit
