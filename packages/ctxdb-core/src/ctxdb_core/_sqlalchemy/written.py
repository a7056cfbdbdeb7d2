"""Whether a transaction holds work: what its statements tell before they are sent, and what the database answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, TextClause
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.binds import begun_connections, is_autocommit
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.greenlets import call_in_greenlet

__all__ = ["UNANSWERED", "holds_work", "only_reads", "only_sets"]

_READING = re.compile(r"\s*(?:SELECT|SHOW|VALUES|TABLE|PRAGMA\s+\w+\s*(?:;|\(|$)|EXPLAIN(?!\s+ANALY))\b", re.IGNORECASE)
_WITH = re.compile(r"\s*WITH\b(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE)\b)", re.IGNORECASE | re.DOTALL)
_SETTING = re.compile(r"\s*(?:SET|RESET)\b[^;]*;?\s*$", re.IGNORECASE)


def only_reads(clause: Any) -> bool:
    """Return whether `clause` writes nothing; ``None``, as in a flush, may write anything.

    A ``SELECT`` counts as reading, although it may call a function that writes.
    """
    if isinstance(clause, TextClause):
        return _READING.match(clause.text) is not None or _WITH.match(clause.text) is not None
    return getattr(clause, "is_select", False)


def only_sets(clause: Any) -> bool:
    """Return whether `clause` only sets something for its transaction or connection, such as a role."""
    return isinstance(clause, TextClause) and _SETTING.match(clause.text) is not None


UNANSWERED = (DBAPIError, PendingRollbackError)
"""What `holds_work` raises where the database cannot tell: the transaction is aborted, or it was lost with its
connection, as when a time limit interrupts a statement.
"""


async def holds_work(session: AsyncSession, door: Door, by_statements: Callable[[], bool]) -> bool:
    """Ask the database whether the open transaction of `session` holds work, in a turn at its `door`.

    For a database that cannot be asked, the answer is that of `by_statements`.

    Raises:
        DBAPIError, PendingRollbackError: see `UNANSWERED`.
    """
    connections = {each for each in begun_connections(session) if not is_autocommit(each)}
    if not connections:
        return False
    drivers = {each: f"{each.dialect.name}+{each.dialect.driver}" for each in connections}
    if not _ANSWERS.keys() >= set(drivers.values()):
        return by_statements()
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


# A test's shared transaction, whose driver is "shared", has no entry: all work in it has one transaction id.
_ANSWERS: dict[str, Callable[[Connection], bool]] = {
    "postgresql+asyncpg": _has_written_postgresql,
    "postgresql+psycopg": _has_written_postgresql,
    "postgresql+psycopg_async": _has_written_postgresql,
    "sqlite+aiosqlite": _has_written_sqlite,
}
