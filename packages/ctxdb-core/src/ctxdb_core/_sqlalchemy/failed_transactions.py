"""Keeps a transaction that has failed from being taken for a committed one."""

from __future__ import annotations

from sqlalchemy import Connection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ctxdb_core._sqlalchemy.binds import begun_connections
from ctxdb_core._sqlalchemy.failures import failure_of, note_failure
from ctxdb_core._sqlalchemy.mysql_errors import is_mysql
from ctxdb_core._sqlalchemy.mysql_rollbacks import detect_rollback_by_server
from ctxdb_core._sqlalchemy.private import listen_once
from ctxdb_core.errors import TransactionAbortedError

__all__ = ["check_transaction", "detect_silent_rollback", "refuse_if_failed"]


def detect_silent_rollback(engine: AsyncEngine) -> None:
    """Raise an error where COMMIT would store only a part, or nothing; keep broken connections out of the pool."""
    event.listen(engine.sync_engine, "handle_error", _note_interruption)
    if engine.dialect.name == "postgresql":
        event.listen(engine.sync_engine, "handle_error", _handle_error)
    elif is_mysql(engine.dialect):
        detect_rollback_by_server(engine)


def _note_interruption(context: ExceptionContext) -> None:
    # The drivers stop a statement whose task is cancelled by giving up the connection.
    if context.connection is not None and not isinstance(context.original_exception, Exception):
        note_failure(context.connection, context)


_IN_FAILED_TRANSACTION = "25P02"
"""PostgreSQL's in_failed_sql_transaction: the statement is refused because an earlier one has failed."""


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
    if sqlstate is None and (context.statement is None or context.statement.startswith("ROLLBACK TO SAVEPOINT ")):
        # The server has not refused COMMIT or ROLLBACK: the driver has not sent it, as another task is in the middle of
        # a query on this connection, for instance. SQLAlchemy takes the transaction, or the savepoint, for ended; the
        # server does not.
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
    elif connection.in_transaction():
        # A statement that fails aborts its transaction. If the application swallows the error, the transaction can only
        # be rolled back, and COMMIT does so without an error (PostgreSQL, "COMMIT": its command tag is then ROLLBACK).
        # The listener is on the `Connection` object of this one transaction, and is gone with it.
        listen_once(connection, "commit", check_transaction)


def check_transaction(connection: Connection) -> None:
    """Raise an error if the transaction of `connection` is aborted: a listener of its commit.

    Raises:
        TransactionAbortedError: the transaction is aborted; it was rolled back.
        DBAPIError: the connection was lost with its transaction; or the driver is busy with another statement, and the
            connection is thrown away.
    """
    # Not every error aborts the transaction (a savepoint may have contained it, the driver may have refused a parameter
    # before the server saw it), so the server is asked: any statement fails in an aborted transaction.
    try:
        connection.exec_driver_sql("SELECT 1")
    except (DBAPIError, InvalidRequestError) as exc:
        # SQLAlchemy refuses the statement by an error of its own where the release of a savepoint has failed.
        if connection.invalidated or getattr(exc, "connection_invalidated", False):
            raise
        if isinstance(exc, DBAPIError) and getattr(exc.orig, "sqlstate", None) is None:
            # The server was not asked, as a task is in the middle of a statement on the driver's own connection: it
            # would get no ROLLBACK either, and the pool a connection with an open transaction.
            connection.invalidate(exc)
            raise
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


async def refuse_if_failed(session: AsyncSession) -> None:
    """Raise the error of a commit that can only fail, as a flush or a statement has failed before it.

    A unit of work with several databases asks before its first commit: one that is refused later comes too late.

    Raises:
        TransactionAbortedError: a statement has failed, and its error was not propagated.
        StatementInterruptedError: a statement was interrupted, and the connection was lost with it.
        PendingRollbackError: a flush has failed.
    """
    failed = [each for each in begun_connections(session) if failure_of(each) is not None]
    if not session.is_active or any(each.invalidated for each in failed):
        await session.connection()
    for connection in failed:
        if connection.dialect.name == "postgresql":
            await session.run_sync(_check, connection)


def _check(session: Session, connection: Connection) -> None:
    check_transaction(connection)
