"""`joining_session`: a session that may commit without ending the transaction of the unit of work that it joins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._blocks.shared_session import SharedSessionBlock
from ctxdb_core._databases.connect import DBConnect, SessionT
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.binds import begun_connections
from ctxdb_core._sqlalchemy.guarded_session import door_of, guard_of
from ctxdb_core._sqlalchemy.session_factory import guarded
from ctxdb_core._sqlalchemy.task_blocks import hold_block
from ctxdb_core._units import session_end
from ctxdb_core._units.session_functions import db_session, unit_for
from ctxdb_core.errors import TransactionRequiredError

__all__ = ["joining_session"]


@asynccontextmanager
async def joining_session(db: DBConnect[SessionT]) -> AsyncIterator[SessionT]:
    """Open a session on the connection of the current unit of work, whose own ``commit()`` releases a savepoint.

    For libraries that commit the session which they are given (fastapi-users, advanced-alchemy's `auto_commit`): what
    they have committed is committed with the rest, by the unit of work, and rolled back with the rest. Their
    ``rollback()`` goes back to their last commit. What is open at the end of the block is committed in the same way,
    and undone if an exception leaves the block. If the unit itself commits meanwhile (`commit_db_session`), what was
    sent by then is committed with it, and the session can be used no more.

    ``async with joining_session(db) as session: await SQLAlchemyUserDatabase(session, User).create(...)``

    Raises:
        SessionAlreadyActiveError: another task of the unit of work is inside of a block that shares its session.
        TransactionRequiredError: this is inside of a block without transactions (see `transactional`); or the unit has
            ended the transaction, and something was changed in the session since then. A statement of the session
            raises it then, too.
        ContextNotInitiatedError, ContextClosedError: as `db_session`.
        BaseException: what the block raised.
    """
    unit = unit_for(db)
    if unit.autocommit:
        raise TransactionRequiredError(
            "This block runs without a transaction, so there is none that a session could join. Use "
            "`transactional(db)`, which begins one."
        )
    session = await db_session(db)
    with SharedSessionBlock(unit, db, may_nest=True), hold_block(session.sync_session):
        # Without a flush, the joining session would not see the objects that were added to the unit's session.
        await session.flush()
        connection = await session.connection()
        joined = cast("SessionT", await _create(unit.source_of(db), session, connection))
        try:
            yield joined
        except BaseException as exc:
            await run_to_completion(session_end.close(joined, exc, db))
            raise
        try:
            # Where the unit itself has committed or rolled back meanwhile, by `commit_db_session` for instance, the
            # savepoint has ended with its transaction, and nothing is left to release.
            begun = begun_connections(joined)
            is_open = all(each.in_nested_transaction() for each in begun) if begun else connection.in_transaction()
            # A failed flush has undone what was written in the session: its commit says so.
            if is_open or not joined.is_active:
                # A commit that is interrupted would cost the unit of work its connection.
                await run_to_completion(joined.commit())
            elif joined.new or joined.dirty or joined.deleted:
                raise _ended()
        finally:
            await run_to_completion(session_end.close(joined, None, db))


async def _create(db: DBConnect, session: AsyncSession, connection: AsyncConnection) -> AsyncSession:
    maker = await db.session_maker()
    joined = guarded(maker(bind=connection, join_transaction_mode="create_savepoint"))
    guard = guard_of(joined)
    # Calls of both take turns: they have one connection.
    guard.door = door_of(session)
    guard.translate_bind = partial(_joined_bind, session, connection)
    return joined


def _joined_bind(session: AsyncSession, connection: AsyncConnection, bind: Engine | Connection) -> Engine | Connection:
    """Return the connection on which the unit's `session` executes what is to be executed on `bind`.

    A session that chooses its engine by itself (``get_bind``, ``binds=``) does so as a joining session, too, and would
    take a connection of its own from that engine: its commits would stand, whatever becomes of the unit.
    """
    first = connection.sync_connection
    if first is not None and first.closed:
        # SQLAlchemy fails by an assertion where it begins on a connection that was given back.
        raise _ended()
    if first is None or isinstance(bind, Connection) or not in_greenlet():
        return bind
    if bind is first.engine or not first.in_transaction():
        return first
    guard = guard_of(session)
    translated = bind if guard.translate_bind is None else guard.translate_bind(bind)
    return guard.connection({"bind": translated})


def _ended() -> TransactionRequiredError:
    return TransactionRequiredError(
        "The unit of work has ended the transaction that this joining session was in, and what is done in it since "
        "then cannot be stored. Flush it before `commit_db_session(db)`, or open another `joining_session(db)` for it."
    )
