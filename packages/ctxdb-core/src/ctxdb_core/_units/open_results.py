"""Transactions that have only read: they are kept for a result that is still read, and end before bytes travel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.binds import begun_connections, is_autocommit
from ctxdb_core._sqlalchemy.cursors import has_open_cursor
from ctxdb_core._sqlalchemy.greenlets import call_in_greenlet
from ctxdb_core._sqlalchemy.private import innermost_block
from ctxdb_core._sqlalchemy.sessions import guard_of
from ctxdb_core.errors import OpenCursorError

__all__ = ["has_only_read", "is_kept_for_cursor"]


async def is_kept_for_cursor(session: AsyncSession, *, ends_body: bool) -> bool:
    """Return whether a transaction that was to be committed stays open, for a result that is still read from it.

    Args:
        session: whose transaction; it has an open cursor.
        ends_body: whether the body of the response has been made: what it has left open does not keep its work from
            being committed.

    Raises:
        OpenCursorError: the transaction has written, and the result is to be read on by the body.
    """
    try:
        await session.flush()
        has_written = await _has_written(session)
    except DBAPIError:
        # The commit says what is wrong with the transaction.
        return False
    if has_written and not ends_body:
        raise OpenCursorError
    return not has_written


async def has_only_read(session: AsyncSession) -> bool:
    """Return whether the open transaction of `session` can end with nothing lost, and nobody is in the middle of it.

    What is not known to read keeps it open, as does ``session.connection()``: what it has returned is of use in this
    transaction alone.
    """
    guard = guard_of(session)
    door = guard.door
    if (
        door is None
        or door.is_busy
        or innermost_block(guard) is not None
        or guard.has_written(beside_on_begin=True)
        or has_open_cursor(session)
    ):
        return False
    try:
        return not await _has_written(session)
    except DBAPIError:
        # The transaction is aborted: its end says so.
        return False


async def _has_written(session: AsyncSession) -> bool:
    """Ask the database whether the open transaction holds work, where it can tell; else go by the statements."""
    guard = guard_of(session)
    connections = {each for each in begun_connections(session) if not is_autocommit(each)}
    if not connections:
        return False
    drivers = {each: f"{each.dialect.name}+{each.dialect.driver}" for each in connections}
    if not _ANSWERS.keys() >= set(drivers.values()):
        return guard.has_written()
    door = guard.door
    assert door is not None
    async with door.turn():
        for each, driver in drivers.items():
            if await call_in_greenlet(_ANSWERS[driver], each):
                return True
    return False


def _has_written_postgresql(connection: Connection) -> bool:
    # A transaction has an id from its first write or row lock on (PostgreSQL, "Transactions and Identifiers"). The
    # statements alone do not tell: a function of a SELECT may write, and `SET LOCAL` is no write.
    return bool(connection.exec_driver_sql("SELECT txid_current_if_assigned() IS NOT NULL").scalar())


def _has_written_sqlite(connection: Connection) -> bool:
    # The driver begins a transaction before INSERT, UPDATE and DELETE alone (sqlite3, "Transaction control").
    driver_connection: Any = connection.connection.driver_connection
    return bool(driver_connection.in_transaction)


# In a test's shared transaction, whose driver is "shared", all work has one transaction id.
_ANSWERS: dict[str, Callable[[Connection], bool]] = {
    "postgresql+asyncpg": _has_written_postgresql,
    "postgresql+psycopg": _has_written_postgresql,
    "postgresql+psycopg_async": _has_written_postgresql,
    "sqlite+aiosqlite": _has_written_sqlite,
}
