"""Undoes what was set on a connection for longer than a transaction, before the pool has the connection back."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from ctxdb_core._sqlalchemy.private import listen_once, pool_of

__all__ = ["undo_on_return"]

_UNDO = "ctxdb.undo"


def undo_on_return(connection: Connection, statement: str) -> None:
    """Have `statement` run when `connection` is given back to its pool, once.

    If it fails, the pool closes the connection.
    """
    pooled = connection.connection
    pooled.info.setdefault(_UNDO, set()).add(statement)
    # `ctxdb_pgstatus` lets engines take connections of other pools than their own.
    pool = pool_of(pooled, connection.engine.pool)
    listen_once(pool, "reset", _undo)


def _undo(dbapi_connection: Any, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
    # A connection that cannot be talked to now (garbage collection) is closed.
    if record is None or not state.asyncio_safe or _UNDO not in record.info:
        return
    cursor = dbapi_connection.cursor()
    for statement in record.info.pop(_UNDO):
        cursor.execute(statement)
    cursor.close()
