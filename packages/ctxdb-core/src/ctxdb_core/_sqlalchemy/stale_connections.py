"""Replaces connections that the server, a pooler or a firewall has closed, before anything is sent on them.

A pool does not look at idle connections: after a restart of the server, each of them would fail one request. asyncpg
learns of a closed socket from the event loop, and tells: the pool is told then that it has to replace the connection
when that is taken next. psycopg does not listen to an idle connection, so its socket is asked when it is taken, without
a round trip. So are those of asyncmy and aiomysql, whose transactions have no BEGIN that could be sent again: what the
event loop has not come round to must be seen as well.

A connection of PostgreSQL may also be lost after it was taken, and before its transaction has begun. So the first BEGIN
on it is sent once more, on a new connection, if it fails because the connection was lost: a transaction that has not
begun has done nothing yet. A later BEGIN of code that keeps the connection is not, nor is the first one after code was
given the driver's own connection: what that code has set on the connection, a role for instance, would be missing in
silence.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

from sqlalchemy import Engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from ctxdb_core._sqlalchemy.private import (
    FirstStatement,
    asyncpg_adapter_that_begins,
    follow_handing_out,
    pool_numbers,
    psycopg_adapter_that_executes,
    swap_asyncpg_connections,
    transport_of,
)

__all__ = ["is_connection_error", "replace_closed_connections"]


def replace_closed_connections(engine: AsyncEngine) -> None:
    """Have the pool of `engine` open a new connection in the place of one that was closed while it was idle."""
    sync_engine = engine.sync_engine
    driver = engine.dialect.driver
    if driver == "asyncpg":
        _Asyncpg(sync_engine).attach(sync_engine)
    elif driver.startswith("psycopg"):
        _Psycopg(sync_engine).attach(sync_engine)
    elif driver in ("asyncmy", "aiomysql"):
        event.listen(sync_engine, "checkout", _check_mysql)
    elif driver == "aiosqlite":
        event.listen(sync_engine, "checkout", _check_aiosqlite)


def is_connection_error(sqlstate: object) -> bool:
    """Return whether an error with this SQLSTATE says that the connection has come to its end.

    Class 08 is "connection exception"; 57P01 to 57P05 are shutdowns, crashes, a dropped database and an idle time-out
    (PostgreSQL, "PostgreSQL Error Codes"). Poolers use 08P01 for the loss of their own connection to the server.
    """
    return isinstance(sqlstate, str) and sqlstate.startswith(("08", "57P"))


def _closed() -> DisconnectionError:
    return DisconnectionError("The connection was closed while it was idle.")


def _check_aiosqlite(dbapi_connection: Any, record: object, proxy: object) -> None:
    try:
        # A property that looks whether the driver still has its file.
        dbapi_connection._connection.in_transaction  # noqa: B018, SLF001 - of SQLAlchemy's adapter
    except AttributeError:
        # The connection of a shared transaction (`ctxdb_core.testing`), whose engine has inherited this listener.
        return
    except ValueError:
        raise _closed() from None


# --- sockets ----------------------------------------------------------------------------------------------------------

_SOCKET_CHECK = "ctxdb.socket_check"

# An idle connection of psycopg is not read. Without POLLRDHUP (it is Linux's), what the server sends on its own behalf,
# a changed parameter for instance, looks like the end of the connection, which is replaced then: that costs no more.
_GONE: int = getattr(select, "POLLRDHUP", getattr(select, "POLLIN", 0))


class _SocketCheck(NamedTuple):
    """What tells whether the peer has closed the socket of a connection."""

    owner: Any
    """Whose socket it is. After its end, the number of the socket may be another connection's."""
    number: int | None
    """The socket's; ``None`` where there is none to ask."""
    poll: Callable[[int], list[tuple[int, int]]]
    """Given a time-out in milliseconds, returns something if the peer has closed the socket."""


def _socket_check(info: dict[str, Any], owner: Any, number_of: Callable[[Any], int | None]) -> _SocketCheck:
    """Return what checks the socket of a connection; made once for each.

    Args:
        info: of the pool's record of the connection, which keeps it.
        owner: whose socket it is.
        number_of: returns the number of the owner's socket, if it has one.
    """
    check: _SocketCheck | None = info.get(_SOCKET_CHECK)
    if check is None or check.owner is not owner:
        number = number_of(owner) if hasattr(select, "poll") else None
        check = info[_SOCKET_CHECK] = _SocketCheck(owner, number, _poll_of(number))
    return check


def _poll_of(number: int | None) -> Callable[[int], list[tuple[int, int]]]:
    if number is None:
        return _nothing
    polling = select.poll()
    polling.register(number, _GONE)
    return polling.poll


def _nothing(timeout: int) -> list[tuple[int, int]]:
    return []


# --- asyncpg and psycopg ----------------------------------------------------------------------------------------------


def _maybe(timeout: int, most: int) -> bool:
    return True


class _Sockets(ABC):
    """Knows the sockets of all connections of an engine, and replaces those that were lost."""

    def __init__(self, engine: Engine) -> None:
        self._engine = ref(engine)
        # Copies of an engine for other event loops, on threads of their own, have the same listeners.
        self._lock = threading.Lock()
        numbers = pool_numbers(engine.pool)
        # A pool that does not count may have a connection already.
        self._open = numbers.in_use + numbers.idle if isinstance(engine.pool, QueuePool) else 1
        """How many connections there are."""
        self._epoll: Any = None
        """Asks the sockets of all connections; ``None`` where there may be a connection that it does not know."""
        self.may_be_gone: Callable[[int, int], Any] = _maybe
        """Given a time-out and a number of sockets, returns something if one of the engine's may have been closed.

        Linux tells that of all sockets by one system call, in less time than it takes to ask for a single one. Only
        while a closed socket is among them, until the pool has replaced its connection, each socket is asked by itself.
        Where a connection is not known to it, each socket is asked.
        """

    def attach(self, engine: Engine) -> None:
        """Look after the connections of the engine from now on."""
        event.listen(engine, "connect", self._note_new)
        follow_handing_out(engine.dialect)
        event.listen(engine, "close", self._note_closed)

    def _note_closed(self, dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                # The next connection makes another one. An event of the engine would tell of its end, but a listener of
                # any of these makes each statement dearer.
                self._ask_each()

    def _ask_each(self) -> None:
        # The epoll is closed as soon as no thread asks it any more.
        self._epoll, self.may_be_gone = None, _maybe

    def _note_new(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        number = self._check_of(dbapi_connection, record).number
        with self._lock:
            self._open += 1
            if number is None or sys.platform != "linux":
                self._ask_each()
                return
            try:
                if self._open == 1:
                    # All connections that follow are going to be known to it.
                    self._epoll = select.epoll()
                    self.may_be_gone = self._epoll.poll
                if self._epoll is not None:
                    # The socket is left out by itself as soon as it is closed.
                    self._epoll.register(number, select.EPOLLRDHUP)
            except OSError:
                # The process may have no more descriptors.
                self._ask_each()

    @abstractmethod
    def _check_of(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> _SocketCheck:
        """Return what checks the socket of a connection."""

    async def _connect(self) -> PoolProxiedConnection:
        engine = self._engine()
        if engine is None:
            # The engine was thrown away, and a copy of it that has its listeners goes on.
            raise _closed()
        # A pool of its own: the engine's may be at its limit, or have no live connection to give.
        return await greenlet_spawn(engine.pool.recreate().connect)


def _nobody() -> None:
    return None


class _AsyncpgConnection:
    """What is known of a connection of asyncpg in a pool."""

    __slots__ = ("_used_in", "record")

    def __init__(self, record: Any) -> None:
        self.record = ref(record)
        self._used_in: Callable[[], object] = _nobody
        """Returns what the pool had handed out when the connection was used last; it is another object each time.

        This is not the pool's own reference, `fairy_ref`: that calls a function when its object goes, if it is kept.
        """

    def is_first_use(self) -> bool:
        """Note that the connection is used; return whether it is so for the first time since it was taken."""
        record = self.record()
        fairy = None if record is None or record.fairy_ref is None else record.fairy_ref()
        if fairy is None or fairy is self._used_in():
            return False
        self._used_in = ref(fairy)
        return True

    def follow(self, connection: Any) -> None:
        """Have the pool replace `connection`, asyncpg's own, when it is taken the next time after its end."""
        connection.add_termination_listener(self._note_lost)

    def follow_instead(self, connection: Any) -> None:
        """Follow `connection`, which has replaced a lost one; the pool was told of that loss: take that back."""
        self.follow(connection)
        record = self.record()
        if record is not None:
            # A record is marked as invalid by a time that is later than this one.
            record.starttime = time.time()

    def _note_lost(self, connection: Any) -> None:
        record = self.record()
        adapter = None if record is None else record.dbapi_connection
        # The pool may have closed it, or another one may be in its place.
        if record is not None and adapter is not None and adapter._connection is connection:  # noqa: SLF001 - see below
            record.invalidate(soft=True)


class _Asyncpg(_Sockets):
    """Replaces a lost connection of asyncpg when it is taken, and repeats its first BEGIN on a new one."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._classes: dict[type, type] = {}
        """For each class of adapters, the one that begins transactions by `_begin`."""
        self._connections: dict[int, _AsyncpgConnection] = {}
        """What is known of the connections, by the ids of SQLAlchemy's adapters."""

    def attach(self, engine: Engine) -> None:
        if self._open:
            # Connections that are older than this are met when they are taken. A listener makes that dearer.
            event.listen(engine, "checkout", self._adopt, insert=True)
        super().attach(engine)
        event.listen(engine, "detach", self._forget)

    def _adopt(self, dbapi_connection: Any, record: ConnectionPoolEntry, proxy: object) -> None:
        if id(dbapi_connection) in self._connections:
            return
        if self._follow(dbapi_connection, record) and _is_closed(dbapi_connection):
            raise _closed()

    def _note_new(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        super()._note_new(dbapi_connection, record)
        self._follow(dbapi_connection, record)

    def _follow(self, adapter: Any, record: ConnectionPoolEntry) -> bool:
        try:
            # The public property of SQLAlchemy's adapter, `driver_connection`, would tell that code was given it.
            driver_connection = adapter._connection  # noqa: SLF001
        except AttributeError:
            # The connection of a shared transaction (`ctxdb_core.testing`), whose engine has inherited this listener.
            return False
        cls = type(adapter)
        if hasattr(cls, "note_handed_out"):
            # Another engine's listener follows it: one of the same pool, or the one that this engine is a copy of.
            return False
        if cls not in self._classes:
            self._classes[cls] = asyncpg_adapter_that_begins(cls, self._begin, self._note_handed_out)
        adapter.__class__ = self._classes[cls]
        known = self._connections[id(adapter)] = _AsyncpgConnection(record)
        known.follow(driver_connection)
        return True

    def _note_closed(self, dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        self._forget(dbapi_connection)
        super()._note_closed(dbapi_connection, record)

    def _forget(self, dbapi_connection: object, *args: object) -> None:
        self._connections.pop(id(dbapi_connection), None)

    def _note_handed_out(self, adapter: Any) -> None:
        known = self._connections.get(id(adapter))
        if known is not None:
            known.is_first_use()

    def _check_of(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> _SocketCheck:
        return _socket_check(record.info, dbapi_connection.driver_connection, _socket_of_driver)

    async def _begin(self, adapter: Any, begin: Callable[[], Any]) -> None:
        known = self._connections.get(id(adapter))
        if known is None or not known.is_first_use():
            await begin()
            return
        lost: Exception | None = None
        if not self._has_hung_up(adapter, known):
            try:
                await begin()
            except Exception as exc:
                if not (_is_closed(adapter) or is_connection_error(getattr(exc, "sqlstate", None))):
                    raise
                lost = exc
            else:
                return
        try:
            fresh = await self._connect()
        except Exception as exc:
            if lost is None:
                raise
            # What becomes of the transaction is what its own connection says; why there is no other comes with it.
            raise lost from exc
        swap_asyncpg_connections(adapter, fresh.dbapi_connection)
        known.follow_instead(adapter._connection)  # noqa: SLF001 - see `_follow`
        # The dead one goes in the place of the new one.
        await greenlet_spawn(fresh.invalidate)
        await begin()

    def _has_hung_up(self, adapter: Any, known: _AsyncpgConnection) -> bool:
        """Return whether the connection is known to be lost before anything is sent on it."""
        if _is_closed(adapter):
            return True
        # In autocommit there is no BEGIN that could be sent again: the statement itself is the first thing to be sent.
        return (
            adapter.isolation_level == "autocommit"
            and bool(self.may_be_gone(0, 1))
            and (record := known.record()) is not None
            and bool(self._check_of(adapter, record).poll(0))
        )


def _is_closed(adapter: Any) -> bool:
    try:
        return bool(adapter._connection.is_closed())  # noqa: SLF001 - see `_Asyncpg._follow`
    except Exception:  # noqa: BLE001 - a pool of asyncpg's own, which the engine takes it out of, has it back at its end
        return True


def _socket_of_driver(connection: Any) -> int | None:
    transport = transport_of(connection)
    return None if transport is None else _socket_of_transport(transport)


# libpq's CONNECTION_BAD, and its PQTRANS_IDLE.
_BAD = 1
_IDLE = 0


class _Psycopg(_Sockets):
    """Replaces a lost connection of psycopg at its check-out, or where its BEGIN is lost with the first statement.

    SQLAlchemy's adapter of a connection has another class from its check-out on until its first statement. So the
    statements that come later pay for nothing.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._classes: dict[type, type] = {}
        """For each class of adapters, the one that they have before their first statement."""

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        # Before the listeners that the engine has: what they set on a connection would be missing on another one.
        event.listen(engine, "checkout", self._check, insert=True)

    def _note_unused(self, dbapi_connection: Any) -> None:
        """Let an adapter that is taken out of the pool see that its first statement meets a live connection."""
        cls = type(dbapi_connection)
        if cls not in self._classes:
            unused = self._classes[cls] = psycopg_adapter_that_executes(cls, self._execute)
            self._classes[unused] = unused
        dbapi_connection.__class__ = self._classes[cls]

    def _check_of(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> _SocketCheck:
        return _socket_check(record.info, dbapi_connection.driver_connection.pgconn, _socket_of_pgconn)

    def _check(self, dbapi_connection: Any, record: ConnectionPoolEntry, proxy: object) -> None:
        try:
            # The public property of SQLAlchemy's adapter, `driver_connection`, is slower: it calls a function.
            pgconn = dbapi_connection._connection.pgconn  # noqa: SLF001 - see above
        except AttributeError:
            # The connection of a shared transaction (`ctxdb_core.testing`), whose engine has inherited this listener.
            return
        # The status tells the same as `closed` of psycopg's connection, for a third of the time. A connection that was
        # idle for a moment only is asked as well: a restart of the server ends all connections at once, however
        # recently they were used.
        if pgconn.status == _BAD or (self.may_be_gone(0, 1) and self._check_of(dbapi_connection, record).poll(0)):
            raise _closed()
        try:
            dbapi_connection.__class__ = self._classes[type(dbapi_connection)]
        except KeyError:
            self._note_unused(dbapi_connection)

    def _execute(self, first: FirstStatement) -> Any:
        connection = first.connection
        if connection.pgconn.transaction_status != _IDLE:
            # Code that has the driver's connection, or a two-phase transaction, has begun already.
            return first.execute()
        lost: Exception | None = None
        # In autocommit there is no BEGIN: the statement itself is the first thing to be sent.
        if not (connection.autocommit and self._has_hung_up(connection.pgconn)):
            try:
                return first.execute()
            except Exception as exc:
                if first.may_have_been_sent or not (
                    connection.closed or is_connection_error(getattr(exc, "sqlstate", None))
                ):
                    raise
                lost = exc
        try:
            fresh = await_only(self._connect())
        except Exception as exc:
            if lost is None:
                raise
            # The transaction ends by the error of its own connection; why no new one could be opened comes with it.
            raise lost from exc
        first.swap_connections(fresh.dbapi_connection)
        fresh.invalidate()
        return first.execute()

    def _has_hung_up(self, pgconn: Any) -> bool:
        return pgconn.status == _BAD or bool(self.may_be_gone(0, 1) and _poll_of(pgconn.socket)(0))


def _socket_of_pgconn(pgconn: Any) -> int | None:
    number: int | None = None if pgconn.status == _BAD else pgconn.socket
    return number


# --- asyncmy, aiomysql ------------------------------------------------------------------------------------------------


def _check_mysql(dbapi_connection: object, record: ConnectionPoolEntry, proxy: object) -> None:
    # What the driver sends by: it is another one after the driver has connected anew.
    transport = transport_of(record.driver_connection)
    if transport is not None and (
        transport.is_closing() or _socket_check(record.info, transport, _socket_of_transport).poll(0)
    ):
        raise _closed()


def _socket_of_transport(transport: Any) -> int | None:
    socket = transport.get_extra_info("socket")
    number: int | None = None if socket is None else socket.fileno()
    return number
