"""Replaces connections that the server, a pooler or a firewall has closed, before anything is sent on them.

A pool does not look at idle connections: after a restart of the server, each of them would fail one request. Here each
is looked at when it is taken, without a round trip: asyncpg learns of a closed socket from the event loop; psycopg does
not listen to an idle connection, so its socket is asked. So are those of asyncmy and aiomysql, whose transactions have
no BEGIN that could be sent again: what the event loop has not come round to must be seen as well.

asyncpg may learn of the end only after a busy event loop has come round to it. So a BEGIN that fails because its
connection was lost is sent once more, on a new one: a transaction that has not begun has done nothing yet.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import greenlet_spawn

from ctxdb_core._sqlalchemy.private import asyncpg_adapter_that_begins, swap_driver_connections, transport_of

__all__ = ["is_connection_error", "replace_closed_connections"]

_taught: WeakSet[Engine] = WeakSet()


def replace_closed_connections(engine: AsyncEngine) -> None:
    """Have the pool of `engine` open a new connection in the place of one that was closed while it was idle."""
    sync_engine = engine.sync_engine
    if sync_engine in _taught:
        return
    _taught.add(sync_engine)
    driver = engine.dialect.driver
    if driver == "asyncpg":
        event.listen(sync_engine, "checkout", _check_asyncpg)
        event.listen(sync_engine, "connect", _BeginsOnNewConnection(sync_engine).teach)
    elif driver.startswith("psycopg"):
        event.listen(sync_engine, "connect", _keep_socket_check)
        event.listen(sync_engine, "checkout", _check_psycopg)
    elif driver in ("asyncmy", "aiomysql"):
        event.listen(sync_engine, "checkout", _check_transport)
    elif driver == "aiosqlite":
        event.listen(sync_engine, "checkout", _check_aiosqlite)


def is_connection_error(sqlstate: object) -> bool:
    """Return whether an error with this SQLSTATE says that the connection has come to its end.

    Class 08 is "connection exception"; 57P01 to 57P05 are shutdowns, crashes, a dropped database and an idle time-out
    (PostgreSQL, "PostgreSQL Error Codes"). Poolers use 08P01 for the loss of their own connection to the server.
    """
    return isinstance(sqlstate, str) and sqlstate.startswith(("08", "57P"))


def _check_asyncpg(dbapi_connection: Any, record: ConnectionPoolEntry, proxy: object) -> None:
    try:
        # Of SQLAlchemy's adapter. Its property of that name costs as much again.
        is_closed = dbapi_connection._connection.is_closed()  # noqa: SLF001 - see above
    except AttributeError:
        # A shared transaction's (`ctxdb_core.testing`), whose engine has inherited this listener.
        return
    # In autocommit there is no BEGIN that could be sent again.
    if is_closed or (dbapi_connection.isolation_level == "autocommit" and _is_gone(record)):
        raise DisconnectionError("The connection was closed while it was idle.")


def _check_aiosqlite(dbapi_connection: Any, record: object, proxy: object) -> None:
    try:
        # A property that looks whether the driver still has its file.
        dbapi_connection._connection.in_transaction  # noqa: B018, SLF001 - see above
    except AttributeError:
        # As above.
        return
    except ValueError:
        raise DisconnectionError("The connection was closed while it was idle.") from None


# --- psycopg ----------------------------------------------------------------------------------------------------------

_SOCKET_CHECK = "ctxdb.socket_check"

# libpq's CONNECTION_BAD.
_BAD = 1

# An idle connection of psycopg is not read. Without POLLRDHUP (it is Linux's), what the server sends on its own behalf,
# a changed parameter for instance, looks like the end of the connection, which is replaced then: that costs no more.
_GONE: int = getattr(select, "POLLRDHUP", getattr(select, "POLLIN", 0))


def _keep_socket_check(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    if not hasattr(select, "poll"):
        return
    connection = dbapi_connection.driver_connection
    poll = select.poll()
    poll.register(connection.fileno(), _GONE)
    record.info[_SOCKET_CHECK] = connection.pgconn, poll.poll


def _check_psycopg(dbapi_connection: object, record: ConnectionPoolEntry, proxy: object) -> None:
    # The system call takes two thirds of this function's time. A connection that was idle for a moment only is asked as
    # well: a restart of the server ends all connections at once, however recently they were used.
    kept: tuple[Any, Callable[[int], list[tuple[int, int]]]] | None = record.info.get(_SOCKET_CHECK)
    # The status tells the same as `closed` of psycopg's connection, for a third of the time. It is looked at first, as
    # the number of a closed socket may be another connection's by now.
    if kept is not None and (kept[0].status == _BAD or kept[1](0)):
        raise DisconnectionError("The connection was closed while it was idle.")


# --- asyncmy, aiomysql, and asyncpg in autocommit ---------------------------------------------------------------------

_TRANSPORT = "ctxdb.transport"


def _keep_transport(driver_connection: Any, info: dict[str, Any]) -> None:
    transport = info[_TRANSPORT] = transport_of(driver_connection)
    socket = None if transport is None else transport.get_extra_info("socket")
    if socket is not None and hasattr(select, "poll"):
        poll = select.poll()
        poll.register(socket.fileno(), _GONE)
        info[_SOCKET_CHECK] = poll.poll


def _check_transport(dbapi_connection: object, record: ConnectionPoolEntry, proxy: object) -> None:
    if _is_gone(record):
        raise DisconnectionError("The connection was closed while it was idle.")


def _is_gone(record: ConnectionPoolEntry) -> bool:
    """Return whether the peer has closed a connection, also where the event loop has not come round to it."""
    info = record.info
    if _TRANSPORT not in info:
        # The connection was opened before the engine had guards, or has not been checked so far.
        _keep_transport(record.driver_connection, info)
    transport: Any = info[_TRANSPORT]
    is_gone: Callable[[int], list[tuple[int, int]]] | None = info.get(_SOCKET_CHECK)
    # The number of a socket that the transport has closed may be another connection's by now.
    return transport is not None and (transport.is_closing() or (is_gone is not None and bool(is_gone(0))))


# --- asyncpg: between check-out and BEGIN -----------------------------------------------------------------------------


class _BeginsOnNewConnection:
    """Sends the BEGIN of an engine's connections once more, on a new connection, where the first one was lost by it.

    Args:
        engine: whose connections.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = ref(engine)
        self._classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()

    def teach(self, dbapi_connection: Any, record: object) -> None:
        cls = type(dbapi_connection)
        if cls not in self._classes:
            self._classes[cls] = asyncpg_adapter_that_begins(cls, self._begin)
        dbapi_connection.__class__ = self._classes[cls]

    async def _begin(self, adapter: Any, begin: Callable[[], Any]) -> None:
        lost: Exception | None = None
        # Also in autocommit, where the statement itself would be the first thing to be sent.
        if not adapter.driver_connection.is_closed():
            try:
                await begin()
            except Exception as exc:
                if not (adapter.driver_connection.is_closed() or is_connection_error(getattr(exc, "sqlstate", None))):
                    raise
                lost = exc
            else:
                return
        try:
            await self._replace(adapter)
        except Exception as exc:
            if lost is None:
                raise
            # What becomes of the transaction is what its own connection says; why there is no other comes with it.
            raise lost from exc
        await begin()

    async def _replace(self, adapter: Any) -> None:
        engine = self._engine()
        assert engine is not None, "it has a connection in use"
        # A pool of its own: the engine's may be at its limit, or have no live connection to give.
        fresh = await greenlet_spawn(engine.pool.recreate().connect)
        swap_driver_connections(adapter, fresh.dbapi_connection)
        # The dead one goes in the place of the new one.
        await greenlet_spawn(fresh.invalidate)
