"""Has SQLite begin a transaction before its first savepoint."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["begin_before_savepoints"]


def begin_before_savepoints(engine: AsyncEngine) -> None:
    """Have SQLite begin a transaction before its first savepoint, which would be the transaction itself otherwise.

    The driver begins one before INSERT, UPDATE and DELETE alone (sqlite3, "Transaction control"): the release of a
    savepoint that was set earlier would commit.
    """
    if engine.dialect.driver == "aiosqlite":
        event.listen(engine.sync_engine, "savepoint", _begin_sqlite)


def _begin_sqlite(connection: Connection, name: str | None) -> None:
    if connection.dialect.driver != "aiosqlite":
        # The connection of a shared transaction (`ctxdb_core.testing`), whose engine has inherited this listener.
        return
    driver_connection: Any = connection.connection.driver_connection
    # With ``isolation_level=None``, the driver begins none: the user's code does.
    if driver_connection.isolation_level is not None and not driver_connection.in_transaction:
        connection.exec_driver_sql("BEGIN")
