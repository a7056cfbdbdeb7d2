"""Keeps a transaction that MySQL or MariaDB has rolled back by itself from being committed in part.

By a deadlock, InnoDB rolls back the whole transaction; by a lock wait time-out the statement, or the transaction with
``innodb_rollback_on_timeout`` (MySQL, "InnoDB Error Handling"). The server goes on after that: the next statement
begins another transaction, and COMMIT succeeds, with the work after the error alone. So a transaction that has met such
an error is treated as PostgreSQL treats one in which a statement has failed: its further statements are refused, and so
is its commit. A savepoint contains a lock wait time-out, if the server still has the savepoint; nothing contains a
deadlock. Other errors undo their statement alone with every setting, and an application may go on after them.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core._sqlalchemy.binds import is_autocommit
from ctxdb_core._sqlalchemy.failures import failure_of, note_failure
from ctxdb_core._sqlalchemy.mysql_errors import LOCK_WAIT_TIMEOUT, NO_SUCH_SAVEPOINT, ROLLED_BACK, error_number
from ctxdb_core._sqlalchemy.private import follow_dialect
from ctxdb_core.errors import TransactionAbortedError

__all__ = ["detect_rollback_by_server"]

_doomed: WeakKeyDictionary[Connection, _Doom] = WeakKeyDictionary()
_watched: WeakSet[Connection] = WeakSet()


class _Doom:
    """Marks a transaction that cannot be committed any more."""

    is_whole = False
    """Whether the server has rolled back all of it, savepoints included."""


def detect_rollback_by_server(engine: AsyncEngine) -> None:
    """Raise an error where MySQL or MariaDB would commit only the work after a roll-back of its own."""
    event.listen(engine.sync_engine, "handle_error", _note)
    follow_dialect(engine.dialect, "do_rollback_to_savepoint", _roll_back_to_savepoint)


def _note(context: ExceptionContext) -> None:
    connection = context.connection
    number = error_number(context.original_exception)
    if connection is None or context.is_disconnect or (number not in ROLLED_BACK and number != LOCK_WAIT_TIMEOUT):
        return
    if context.statement is None or not connection.in_transaction() or is_autocommit(connection):
        # An error of COMMIT is raised anyway. Outside of a transaction, there is only the statement to undo.
        return
    note_failure(connection, context)
    doom = _doomed.setdefault(connection, _Doom())
    doom.is_whole = doom.is_whole or number in ROLLED_BACK
    if connection not in _watched:
        # The listeners are on this one connection of one session: they go when the transaction is over.
        _watched.add(connection)
        event.listen(connection, "before_cursor_execute", _check_statement)
        event.listen(connection, "commit", _check_commit)
        event.listen(connection, "rollback", _forget)


def _check_statement(connection: Connection, cursor: object, statement: str, *args: object) -> None:
    doom = _doomed.get(connection)
    if doom is not None and (doom.is_whole or not statement.startswith("ROLLBACK TO")):
        raise _aborted(connection)


def _check_commit(connection: Connection) -> None:
    if connection in _doomed:
        # SQLAlchemy takes a transaction for ended whose commit was refused by a listener: closing the session would
        # give the connection back as it is.
        connection.connection.rollback()
        raise _aborted(connection)


def _forget(connection: Connection) -> None:
    _doomed.pop(connection, None)


def _roll_back_to_savepoint(original: Callable[..., None], connection: Connection, name: str) -> None:
    doom = _doomed.get(connection)
    if doom is None:
        original(connection, name)
    elif not doom.is_whole:
        try:
            original(connection, name)
        except DBAPIError as exc:
            if error_number(exc.orig) != NO_SUCH_SAVEPOINT:
                raise
            # The server has rolled back the whole transaction, as `innodb_rollback_on_timeout` has it do.
            doom.is_whole = True
        else:
            _forget(connection)
    # Otherwise the server has no such savepoint any more, and nothing is sent: the error that cost it shall surface.


def _aborted(connection: Connection) -> TransactionAbortedError:
    return TransactionAbortedError(
        f"The statement {failure_of(connection)} of this transaction met another transaction, and its error was not "
        "propagated: the database may have rolled back the whole transaction, and would commit what follows without "
        "what came before. Let the error propagate (`retry_on_conflict` runs the unit of work again), or run a "
        "statement that may wait too long for a lock inside `async with session.begin_nested():`, which contains a "
        "time-out, but no deadlock."
    )
