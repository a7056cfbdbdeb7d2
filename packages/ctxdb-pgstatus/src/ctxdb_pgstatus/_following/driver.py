"""Questions to a driver's connection, past SQLAlchemy: to one of asyncpg, psycopg or another driver.

The kind of driver is told by the methods of its connection, so that no driver has to be imported.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ctxdb_core.adapters import call_out_of_sight

__all__ = ["abort", "in_recovery", "is_open", "read_master_timeline", "read_position", "read_start"]

# Each query returns text, as the drivers return other values as different types: asyncpg a WAL position as a number,
# psycopg as text.
# The first 8 digits of a WAL file's name are its timeline.
_POSITION = (
    "SELECT pg_wal_lsn_diff(lsn, '0/0') || ' ' || left(pg_walfile_name(lsn), 8) FROM pg_current_wal_insert_lsn() AS lsn"
)
# On a standby, these functions would raise an error: CASE does not call them there.
_MASTER_TIMELINE = """
SELECT CASE WHEN NOT pg_is_in_recovery() THEN
    ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int::text END
"""
# In microseconds, which is PostgreSQL's own precision.
_STARTED_AT = "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint::text"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def is_open(connection: Any) -> bool:
    """Return whether the connection is open, as far as its driver knows."""
    if hasattr(connection, "is_closed"):
        return not connection.is_closed()
    return not getattr(connection, "closed", False)


def abort(connection: Any) -> None:
    """Cut the connection off without a word to its server: a call that waits for an answer fails at once."""
    if hasattr(connection, "terminate"):
        connection.terminate()
    elif hasattr(connection, "pgconn"):
        # psycopg waits until the socket is readable: a socket that is shut down is, and one that is closed under
        # psycopg never would be. The duplicate is closed here, and the descriptor of libpq stays open.
        with suppress(OSError, Exception), socket.socket(fileno=os.dup(connection.pgconn.socket)) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)


def in_recovery(connection: Any) -> bool:
    """Return whether the server has reported to this connection that it is a standby.

    PostgreSQL 14 and newer report ``in_hot_standby`` at the start of a connection, and whenever it changes
    (PostgreSQL, "libpq", on `PQparameterStatus`).
    """
    if hasattr(connection, "get_settings"):
        return getattr(connection.get_settings(), "in_hot_standby", None) == "on"
    if hasattr(connection, "pgconn"):
        return bool(connection.pgconn.parameter_status(b"in_hot_standby") == b"on")
    return False


def read_position(connection: PoolProxiedConnection) -> tuple[int, int]:
    """Return the WAL position in bytes up to which the server has written, and its timeline.

    The connection is in no transaction.
    """
    found = _read(connection, _POSITION)
    assert found is not None, "a primary has a WAL position"
    position, timeline = found.split()
    return int(position), int(timeline, 16)


def read_master_timeline(connection: PoolProxiedConnection) -> int | None:
    """Return the timeline that the server writes; ``None`` for a standby. The connection is in no transaction."""
    timeline = _read(connection, _MASTER_TIMELINE)
    return None if timeline is None else int(timeline)


def read_start(adapted: Any) -> datetime:
    """Return when the server was started, by which it is known. The connection `adapted` is new: in no transaction."""
    microseconds = _read_from(adapted, _STARTED_AT)
    assert microseconds is not None, "a server that answers was started at some time"
    return _EPOCH + timedelta(microseconds=int(microseconds))


def _read(connection: PoolProxiedConnection, query: str) -> str | None:
    return _read_from(connection.dbapi_connection, query)


def _fetch_value(driver_connection: Any, query: str) -> Any:
    return await_only(driver_connection.fetchval(query))


def _read_from(adapted: Any, query: str) -> str | None:
    driver_connection = adapted.driver_connection
    value: str | None
    if hasattr(driver_connection, "fetchval"):
        # This is asyncpg's connection. SQLAlchemy's cursor would begin a transaction on it. asyncpg keeps the prepared
        # statement for minutes, by a timer with a copy of the context; out of the unit's sight, the copy does not keep
        # the unit of work that has opened the connection.
        return cast("str | None", call_out_of_sight(_fetch_value, driver_connection, query))
    cursor = adapted.cursor()
    try:
        cursor.execute(query)
        (value,) = cursor.fetchone()
    finally:
        cursor.close()
        adapted.rollback()
    return value
