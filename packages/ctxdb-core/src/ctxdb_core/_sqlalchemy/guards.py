"""What every engine is taught: to stop cancelled queries on the server, and not to take a roll-back for a commit."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Dialect, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.failures import failure_of, note_failure
from ctxdb_core._sqlalchemy.private import replace_raw_connection, replace_terminate
from ctxdb_core.errors import TransactionAbortedError

logger = logging.getLogger("ctxdb")

STOP_QUERY_TIMEOUT_SECONDS = 5.0


def stop_cancelled_queries(engine: AsyncEngine) -> None:
    """Make the database stop the query of a cancelled task, also when the task is cancelled again and again.

    SQLAlchemy throws the connection of a cancelled query away; the drivers stop the query while it does. An anyio
    cancel scope interrupts that as well: the query runs on, or the driver's thread does.
    """
    driver = engine.dialect.driver
    if driver == "asyncpg":
        _see_termination_through(engine, _close_asyncpg)
    elif driver == "aiosqlite":
        _see_termination_through(engine, _close_aiosqlite)
        event.listen(engine.sync_engine, "do_connect", _connect_aiosqlite)
    elif driver.startswith("psycopg"):
        event.listen(engine.sync_engine, "connect", _keep_cancel_key)
        event.listen(engine.sync_engine, "invalidate", _cancel_psycopg)


def _see_termination_through(engine: AsyncEngine, close: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Let no cancellation interrupt ``Dialect.do_terminate``, by which SQLAlchemy gives up a connection."""

    def terminate_to_completion(do_terminate: Callable[[Any], None], dbapi_connection: Any) -> None:
        if not in_greenlet():
            # Garbage collection: nothing can be waited for.
            do_terminate(dbapi_connection)
            return
        handled = sys.exc_info()[1]
        try:
            await_only(run_to_completion(close(dbapi_connection.driver_connection)))
        except asyncio.CancelledError:
            # A cancellation that brought us here goes on, and is what the task gets to see.
            if not isinstance(handled, asyncio.CancelledError):
                raise
        except Exception:  # noqa: BLE001 - a dead connection cannot be closed gracefully
            do_terminate(dbapi_connection)

    replace_terminate(engine.dialect, terminate_to_completion)


async def _close_asyncpg(connection: Any) -> None:
    # Stops a query that is running, and waits for a cancel request that is under way.
    try:
        async with asyncio.timeout(STOP_QUERY_TIMEOUT_SECONDS):
            await connection.close(timeout=STOP_QUERY_TIMEOUT_SECONDS)
    except Exception:  # noqa: BLE001 - the server does not answer, or is gone
        connection.terminate()


async def _close_aiosqlite(connection: Any) -> None:
    await connection.interrupt()
    await connection.close()


def _connect_aiosqlite(
    dialect: Dialect, record: ConnectionPoolEntry, arguments: list[Any], options: dict[str, Any]
) -> Any:
    # A file is opened in the driver's thread, and nobody would close it if the task that waits for it were cancelled.
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


_CANCEL_KEY = "ctxdb.cancel_key"


def _keep_cancel_key(dbapi_connection: object, record: ConnectionPoolEntry) -> None:
    # psycopg closes a connection whose cancel request is interrupted, and the key would be gone with it.
    connection: Any = record.driver_connection
    record.info[_CANCEL_KEY] = connection.pgconn.get_cancel()


def _cancel_psycopg(dbapi_connection: object, record: ConnectionPoolEntry, exception: BaseException | None) -> None:
    connection: Any = record.driver_connection
    if not isinstance(exception, asyncio.CancelledError):
        return
    key = record.info.get(_CANCEL_KEY)
    if key is None and not connection.closed:
        # A connection that is older than the guards.
        key = connection.pgconn.get_cancel()
    if key is not None and (connection.closed or connection.info.transaction_status.name == "ACTIVE"):
        request = asyncio.to_thread(key.cancel)
        try:
            await_only(run_to_completion(asyncio.wait_for(request, STOP_QUERY_TIMEOUT_SECONDS)))
        except asyncio.CancelledError:
            # The cancellation that brought us here goes on.
            pass
        except Exception:
            logger.debug("A cancelled query could not be stopped", exc_info=True)


def keep_cancellation_at_pool(engine: AsyncEngine) -> None:
    """Let a task be cancelled whose turn at the pool comes in the same moment.

    SQLAlchemy 2.0 waits for it by `asyncio.wait_for`, which forgets the cancellation then on Python 3.11: a handler
    whose client has left would go on, and wait for the rest of its request, with the connection.
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
        raise asyncio.CancelledError
    return connection


def begin_before_savepoints(engine: AsyncEngine) -> None:
    """Have SQLite begin a transaction before its first savepoint, which would be the transaction itself otherwise.

    The driver begins one before INSERT, UPDATE and DELETE alone (sqlite3, "Transaction control"): the release of a
    savepoint that was set earlier would commit.
    """
    if engine.dialect.driver == "aiosqlite":
        event.listen(engine.sync_engine, "savepoint", _begin_sqlite)


def _begin_sqlite(connection: Connection, name: str | None) -> None:
    if connection.dialect.driver != "aiosqlite":
        # A shared transaction's (`ctxdb_core.testing`), whose engine has inherited this listener.
        return
    driver_connection: Any = connection.connection.driver_connection
    # Without an isolation level, the driver leaves transactions to whoever has chosen that.
    if driver_connection.isolation_level is not None and not driver_connection.in_transaction:
        connection.exec_driver_sql("BEGIN")


def trust_no_failed_transaction(engine: AsyncEngine) -> None:
    """Make what goes wrong in a transaction on PostgreSQL show when it ends, and stay out of the pool."""
    event.listen(engine.sync_engine, "handle_error", _note_interruption)
    if engine.dialect.name == "postgresql":
        event.listen(engine.sync_engine, "handle_error", _handle_error)


def _note_interruption(context: ExceptionContext) -> None:
    # The drivers stop a statement whose task is cancelled by giving up the connection.
    if context.connection is not None and not isinstance(context.original_exception, Exception):
        note_failure(context.connection, context)


_IN_FAILED_TRANSACTION = "25P02"
"""PostgreSQL's in_failed_sql_transaction: the statement is refused for what an earlier one has done."""


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or context.is_disconnect:
        return
    sqlstate = getattr(context.original_exception, "sqlstate", None)
    if sqlstate == _IN_FAILED_TRANSACTION:
        failure = failure_of(connection)
        if failure is not None and isinstance(context.sqlalchemy_exception, DBAPIError):
            context.sqlalchemy_exception.add_detail(
                f"ctxdb: the transaction was aborted by the statement {failure}, maybe of another task of this unit of "
                "work. Nothing more can be done in it: let that error propagate, run a statement that may fail inside "
                "`async with session.begin_nested():`, or give the task a unit of its own (`run_in_new_ctx`)."
            )
    elif sqlstate is not None:
        note_failure(connection, context)
    if context.statement is None and getattr(context.original_exception, "sqlstate", None) is None:
        # COMMIT or ROLLBACK was not refused by the server, it did not get there: another task is in the middle of a
        # query on this connection, for instance. SQLAlchemy takes the transaction for ended; the server does not.
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
    elif connection.in_transaction() and not event.contains(connection, "commit", _check_transaction):
        # A statement that fails aborts its transaction. If the application swallows the error, the transaction can only
        # be rolled back, and COMMIT does so without an error (PostgreSQL, "COMMIT": its command tag is then ROLLBACK).
        # The listener is on this one connection of this one session: it goes when the transaction is over.
        event.listen(connection, "commit", _check_transaction)


def _check_transaction(connection: Connection) -> None:
    # Not every error aborts the transaction (a savepoint may have contained it, the driver may have refused a parameter
    # before the server saw it), so the server is asked: any statement fails in an aborted transaction.
    try:
        connection.exec_driver_sql("SELECT 1")
    except DBAPIError as exc:
        # SQLAlchemy takes a transaction for ended whose commit was refused by a listener: closing the session would
        # give the connection back as it is.
        connection.connection.rollback()
        failure = failure_of(connection)
        statement = "A statement" if failure is None else f"The statement {failure}"
        raise TransactionAbortedError(
            f"{statement} of this transaction failed, and its error was not propagated: the transaction is aborted and "
            "cannot be committed. Let the error propagate, or run a statement that may fail inside "
            "`async with session.begin_nested():`."
        ) from exc
