"""What is asked of a driver's connection itself, past SQLAlchemy: asyncpg's, psycopg's, or another one's."""

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

# As a number: the drivers disagree about what a WAL position is.
_POSITION = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::text"
# The functions of a CASE that is not taken are not called: on a standby they would raise.
_MASTER_TIMELINE = """
SELECT CASE WHEN NOT pg_is_in_recovery() THEN
    ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int::text END
"""
# In microseconds: as a number, as above.
_STARTED_AT = "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint::text"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def is_open(connection: Any) -> bool:
    """Return whether the connection is open, as far as its driver knows."""
    if hasattr(connection, "is_closed"):
        return not connection.is_closed()
    return not getattr(connection, "closed", False)


def abort(connection: Any) -> None:
    """Cut the connection off without a word to its server: what waits for an answer fails at once."""
    if hasattr(connection, "terminate"):
        connection.terminate()
    elif hasattr(connection, "pgconn"):
        # psycopg would wait on for a socket that is closed under it; one that is shut down tells it.
        with suppress(OSError, Exception), socket.socket(fileno=os.dup(connection.pgconn.socket)) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)


def in_recovery(connection: Any) -> bool:
    """Return whether the server has said on this connection that it is a standby: PostgreSQL 14 and newer say so."""
    if hasattr(connection, "get_settings"):
        return getattr(connection.get_settings(), "in_hot_standby", None) == "on"
    if hasattr(connection, "pgconn"):
        return bool(connection.pgconn.parameter_status(b"in_hot_standby") == b"on")
    return False


def read_position(connection: PoolProxiedConnection) -> int:
    """Return up to where the server has written its WAL, in bytes; the connection is in no transaction."""
    position = _read(connection, _POSITION)
    assert position is not None, "a server has a position"
    return int(position)


def read_master_timeline(connection: PoolProxiedConnection) -> int | None:
    """Return the timeline that the server writes; ``None`` if it is a standby. The connection is in no transaction."""
    timeline = _read(connection, _MASTER_TIMELINE)
    return None if timeline is None else int(timeline)


def read_start(adapted: Any) -> datetime:
    """Return when the server was started: which server it is. The connection is new, and in no transaction."""
    microseconds = _read_from(adapted, _STARTED_AT)
    assert microseconds is not None, "a server that answers has been started"
    return _EPOCH + timedelta(microseconds=int(microseconds))


def _read(connection: PoolProxiedConnection, query: str) -> str | None:
    return _read_from(connection.dbapi_connection, query)


def _fetch_value(driver_connection: Any, query: str) -> Any:
    return await_only(driver_connection.fetchval(query))


def _read_from(adapted: Any, query: str) -> str | None:
    driver_connection = adapted.driver_connection
    value: str | None
    if hasattr(driver_connection, "fetchval"):
        # asyncpg: outside of the transaction that SQLAlchemy's cursor would begin. asyncpg keeps the prepared statement
        # for minutes, by a timer with a copy of the context, which would keep the unit of work that has opened the
        # connection.
        return cast("str | None", call_out_of_sight(_fetch_value, driver_connection, query))
    cursor = adapted.cursor()
    try:
        cursor.execute(query)
        (value,) = cursor.fetchone()
    finally:
        cursor.close()
        adapted.rollback()
    return value
