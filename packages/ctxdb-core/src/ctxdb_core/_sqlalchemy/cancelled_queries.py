"""Stops the query of a cancelled task on the server, and keeps cancellations of tasks that wait for a pool."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import sqlalchemy
from greenlet import getcurrent  # what SQLAlchemy's asyncio extra is made of
from sqlalchemy import Dialect, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.cursors import take_left_cursors
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.private import (
    psycopg_connection_that_stops,
    read_psycopg_answer,
    replace_raw_connection,
    replace_terminate,
    request_asyncpg_cancellation,
)

logger = logging.getLogger("ctxdb")

__all__ = ["keep_cancellation_at_pool", "stop_cancelled_queries", "stop_seconds", "stops_under_way"]

STOP_QUERY_TIMEOUT_SECONDS = 5.0
"""How long a call may wait for the server to stop its query."""
REPEAT_SECONDS = 0.5
"""After how long a server that has not answered is asked once more to stop a query."""
LATE_STOP_TIMEOUT_SECONDS = 1.0
"""The same for a call whose own time limit is up: see `stop_seconds`."""


def stop_cancelled_queries(engine: AsyncEngine) -> None:
    """Make the database stop the query of a cancelled task, also when the task is cancelled again and again.

    SQLAlchemy throws the connection of a cancelled query away, and the driver stops the query while its connection is
    closed. An anyio cancel scope cancels the task once more, which interrupts the driver: the query goes on in the
    server, or in the driver's thread.
    """
    driver = engine.dialect.driver
    if driver == "asyncpg":
        _see_termination_through(engine, _close_asyncpg)
    elif driver == "aiosqlite":
        _see_termination_through(engine, _close_aiosqlite)
        event.listen(engine.sync_engine, "do_connect", _connect_aiosqlite)
    elif driver.startswith("psycopg"):
        event.listen(engine.sync_engine, "connect", _prepare_psycopg)
        event.listen(engine.sync_engine, "invalidate", _cancel_psycopg)
    elif driver in ("asyncmy", "aiomysql"):
        event.listen(engine.sync_engine, "invalidate", _MySQLKiller(engine.sync_engine).kill)


def _see_termination_through(engine: AsyncEngine, close: Callable[[Any, float], Coroutine[Any, Any, None]]) -> None:
    """Let no cancellation interrupt ``Dialect.do_terminate``, by which SQLAlchemy gives up a connection."""

    def terminate_to_completion(do_terminate: Callable[[Any], None], dbapi_connection: Any) -> None:
        if not in_greenlet():
            # Garbage collection: nothing can be waited for.
            do_terminate(dbapi_connection)
            return
        handled = sys.exc_info()[1]
        try:
            await_only(run_to_completion(_tracked(close(dbapi_connection.driver_connection, stop_seconds()))))
        except asyncio.CancelledError:
            # If a cancellation has led to this termination, SQLAlchemy raises that one again when this function
            # returns.
            if not isinstance(handled, asyncio.CancelledError):
                raise
        except Exception:  # noqa: BLE001 - a dead connection cannot be closed gracefully
            do_terminate(dbapi_connection)

    replace_terminate(engine.dialect, terminate_to_completion)


_closing: WeakSet[Any] = WeakSet()
"""The connections of asyncpg that are being closed."""


async def _close_asyncpg(connection: Any, seconds: float) -> None:
    if connection in _closing:
        # Two tasks that use one connection were cancelled at once. A second `close` of asyncpg drops the cancel request
        # that the first one waits for.
        return
    _closing.add(connection)
    # `close` of asyncpg stops a running query, and waits for a cancel request that is under way. The server ignores one
    # that overtakes its statement. The timer's context is empty, as a timer keeps its context until it is due.
    loop = asyncio.get_running_loop()
    again = loop.call_later(REPEAT_SECONDS, request_asyncpg_cancellation, connection, context=Context())
    try:
        async with asyncio.timeout(seconds):
            await connection.close(timeout=seconds)
    except Exception:  # noqa: BLE001 - the server does not answer, or is gone
        connection.terminate()
    finally:
        again.cancel()
        _closing.discard(connection)


async def _close_aiosqlite(connection: Any, seconds: float) -> None:
    await connection.interrupt()
    for cursor in take_left_cursors(connection):
        with suppress(Exception):
            await cursor.close()
    await connection.close()


def _connect_aiosqlite(
    dialect: Dialect, record: ConnectionPoolEntry, arguments: list[Any], options: dict[str, Any]
) -> Any:
    # aiosqlite opens the file in its thread: if the task that waits for that were cancelled, nothing would close the
    # file.
    opened: list[Any] = []

    async def connect() -> None:
        opened.append(await greenlet_spawn(dialect.connect, *arguments, **options))

    try:
        await_only(run_to_completion(connect()))
    except asyncio.CancelledError:
        for connection in opened:
            dialect.do_terminate(connection)
        raise
    return opened[0]


_cancel_keys: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""For each connection of psycopg, the object of libpq that sends its cancel requests."""


_stopping: WeakKeyDictionary[type, type] = WeakKeyDictionary()
"""For each class of psycopg's connections, the derived class that stops cancelled queries by this module."""


def _prepare_psycopg(dbapi_connection: object, record: ConnectionPoolEntry) -> None:
    connection: Any = record.driver_connection
    # psycopg closes a connection whose cancel request is interrupted, and a closed connection gives out no key.
    _cancel_keys[connection] = _cancel_key_of(connection)
    cls = type(connection)
    if not hasattr(cls, "cancel_safe"):
        # Before psycopg 3.2.
        return
    if cls not in _stopping:
        _stopping[cls] = psycopg_connection_that_stops(cls, _stop_query_of_psycopg)
    connection.__class__ = _stopping[cls]


async def _stop_query_of_psycopg(connection: Any) -> None:
    cancellation = sys.exc_info()[1]
    try:
        await _tracked(_request_until_answered(connection))
    except Exception:
        logger.debug("A cancelled query could not be stopped", exc_info=True)
        # psycopg would wait for the answer of a server that does not answer: five seconds more, in 3.2 for ever.
        connection.pgconn.finish()
    else:
        cancellation = None
    # The request has been made, so `_cancel_psycopg` need not make another. If this function is interrupted before, the
    # key stays, and `_cancel_psycopg` makes the request.
    _cancel_keys.pop(connection, None)
    if cancellation is not None and not isinstance(cancellation, Exception):
        raise cancellation


async def _request_until_answered(connection: Any) -> None:
    """Have the server asked to stop the query until it has answered that: a request may overtake its query."""
    # The group waits for its task, however often it is cancelled: the reading ends before psycopg closes the socket.
    # `asyncio.wait_for` of Python 3.11 would not wait, and uvloop stands still when a socket that it watches is closed.
    async with asyncio.timeout(STOP_QUERY_TIMEOUT_SECONDS), asyncio.TaskGroup() as group:
        reading = group.create_task(read_psycopg_answer(connection))
        while not reading.done():
            if connection.closed:
                # Another task has closed it: there is nothing to read any more.
                reading.cancel()
                break
            await connection.cancel_safe(timeout=STOP_QUERY_TIMEOUT_SECONDS)
            await asyncio.wait([reading], timeout=REPEAT_SECONDS)


def _cancel_key_of(connection: Any) -> Any:
    try:
        # libpq 17 sends the request without blocking. An older libpq blocks, and psycopg's binary package holds the GIL
        # meanwhile: while the peer does not answer, the whole process stands still.
        return connection.pgconn.cancel_conn()
    except Exception:  # noqa: BLE001 - an older libpq, or an older psycopg
        return connection.pgconn.get_cancel()


def _cancel_psycopg(dbapi_connection: object, record: ConnectionPoolEntry, exception: BaseException | None) -> None:
    connection: Any = record.driver_connection
    if not isinstance(exception, asyncio.CancelledError):
        return
    key = _cancel_keys.get(connection)
    if key is None and not connection.closed:
        # A connection that is older than the guards.
        key = _cancel_key_of(connection)
    if key is not None and (connection.closed or connection.info.transaction_status.name == "ACTIVE"):
        request = _send_cancel_request(key) if hasattr(key, "poll") else asyncio.to_thread(key.cancel)
        _await_request(request)


def _await_request(request: Coroutine[Any, Any, Any]) -> None:
    """Wait for `request`, which asks the server to stop a query, for up to `stop_seconds`; log it if it fails."""
    try:
        await_only(run_to_completion(_tracked(asyncio.wait_for(request, stop_seconds()))))
    except asyncio.CancelledError:
        # SQLAlchemy raises the cancellation that has led here again.
        pass
    except Exception:
        logger.debug("A cancelled query could not be stopped", exc_info=True)


# libpq's answers about the progress of a request (PostgresPollingStatusType).
_READING, _WRITING, _OK = 1, 2, 3


async def _send_cancel_request(key: Any) -> None:
    """Send the request, and wait until the server has read it; without blocking."""
    loop = asyncio.get_running_loop()
    key.start()
    while (status := key.poll()) != _OK:
        if status not in (_READING, _WRITING):
            raise ConnectionError(key.get_error_message())
        ready = loop.create_future()
        number = key.socket
        (loop.add_reader if status == _READING else loop.add_writer)(number, _set_ready, ready)
        try:
            await ready
        finally:
            (loop.remove_reader if status == _READING else loop.remove_writer)(number)


def _set_ready(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class _MySQLKiller:
    """Ends the connections of cancelled tasks on the server.

    asyncmy and aiomysql close the socket, which neither MySQL nor MariaDB looks at while a statement runs or waits for
    a lock: it goes on, and holds its locks. Another connection has to say KILL.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = ref(engine)

    def kill(self, dbapi_connection: object, record: ConnectionPoolEntry, exception: BaseException | None) -> None:
        engine = self._engine()
        if engine is None or not isinstance(exception, asyncio.CancelledError):
            return
        connection: Any = record.driver_connection
        # KILL is sent by a pool of its own, as the engine's may be at its limit.
        request = greenlet_spawn(_kill, engine.pool.recreate(), connection.thread_id())
        _await_request(request)


def _kill(pool: Pool, number: int) -> None:
    connection = pool.connect()
    try:
        driver_connection: Any = connection.driver_connection
        cursor = connection.cursor()
        cursor.execute("SELECT CONNECTION_ID()")
        # A proxy may give connections numbers of its own. By such a number, the server would end a connection of
        # another client.
        if cursor.fetchone() == (driver_connection.thread_id(),):
            cursor.execute(f"KILL {number}")
        cursor.close()
    finally:
        connection.close()
        pool.dispose()


# --- stops that are under way -----------------------------------------------------------------------------------------

_stops: set[asyncio.Future[None]] = set()
"""A future for each query that is being stopped."""


async def _tracked(stop: Coroutine[Any, Any, None]) -> None:
    """Await `stop`, and count it as under way meanwhile."""
    under_way = asyncio.get_running_loop().create_future()
    _stops.add(under_way)
    try:
        await stop
    finally:
        _stops.discard(under_way)
        under_way.set_result(None)


def stops_under_way(loop: asyncio.AbstractEventLoop) -> list[asyncio.Future[None]]:
    """Return a future for each query that is being stopped on `loop`: done when it is stopped, or given up."""
    return [stop for stop in _stops if stop.get_loop() is loop]


def stop_seconds() -> float:
    """Return how long the running call may wait for the server to stop its query.

    Where the call has run out of time, the server has not stopped the query by itself, and will hardly answer.
    """
    door = getattr(getcurrent(), "entered", None)
    is_late = isinstance(door, Door) and door.limit is not None and door.limit.is_over
    return min(LATE_STOP_TIMEOUT_SECONDS, STOP_QUERY_TIMEOUT_SECONDS) if is_late else STOP_QUERY_TIMEOUT_SECONDS


def keep_cancellation_at_pool(engine: AsyncEngine) -> None:
    """Keep the cancellation of a task to which the pool gives a connection in the same moment.

    SQLAlchemy 2.0 waits for a connection by `asyncio.wait_for`, which loses such a cancellation on Python 3.11: a
    handler whose client has left would go on, and hold the connection while it waits for the rest of its request.
    """
    if sys.version_info >= (3, 12) or not sqlalchemy.__version__.startswith("2.0."):
        return
    replace_raw_connection(engine.sync_engine, _take_connection_unless_cancelled)


def _take_connection_unless_cancelled(take_connection: Callable[[], PoolProxiedConnection]) -> PoolProxiedConnection:
    task = asyncio.current_task() if in_greenlet() else None
    requests = task.cancelling() if task is not None else 0
    connection = take_connection()
    if task is not None and task.cancelling() > requests:
        connection.close()
        # A cancel scope of anyio knows its cancellations by their message. It cancels again in each round of the loop.
        for _ in range(2):
            await_only(asyncio.sleep(0))
        raise asyncio.CancelledError
    return connection
