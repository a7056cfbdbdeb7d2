"""Follows results that are still read from the server, so that none is read after the end of its transaction.

`session.stream()`, and `stream()` of a connection, leave a cursor open on the server, which the result reads from bit
by bit. Such a result knows the connection of its transaction. If it read on when the transaction has ended, it would
do so in the transaction of another request, which has the connection by then: PostgreSQL would refuse the read, and
abort that transaction. So every result with an open cursor is known here, by its connection:

- A unit of work asks, before it ends a transaction, whether a result is still open.
- The end of the transaction ends the results: they refuse to be read any further.
- Reading from the server takes the turn of the session, as its statements do.

An engine's dialect makes the object that executes a statement from a class that is a public attribute,
``execution_ctx_cls``. The class that is put there overrides the one method that opens cursors on the server, so that
ordinary statements run the same code as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn, cast
from weakref import WeakKeyDictionary, WeakSet

from greenlet import getcurrent  # what SQLAlchemy's asyncio extra is made of
from sqlalchemy import Connection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util import await_only

from ctxdb_core._sqlalchemy.binds import begun_connections
from ctxdb_core._sqlalchemy.calls import in_time
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.private import (
    BufferedRowCursorFetchStrategy,
    close_psycopg_cursor,
    driver_cursor_of,
    number_of_savepoint,
    savepoints_set_on,
)
from ctxdb_core._sqlalchemy.rereading import note_changes
from ctxdb_core.errors import OpenCursorError

__all__ = ["follow_cursors", "has_open_cursor", "set_door_of_connection", "take_left_cursors"]

_open: WeakKeyDictionary[Connection, WeakSet[ServerCursor]] = WeakKeyDictionary()
"""The cursors that may be open on the server, by the connection that they were opened on."""

_left: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
"""For each connection of the driver, the driver's cursors that must be closed before it."""

_doors: WeakKeyDictionary[Connection, Door] = WeakKeyDictionary()
"""The doors of the sessions whose connection the user's code has asked for."""


def follow_cursors(engine: AsyncEngine) -> None:
    """Follow the results that `engine` opens on the server from now on."""
    dialect: Any = engine.dialect
    made_by = dialect.execution_ctx_cls
    if not issubclass(made_by, _FollowedExecution):
        dialect.execution_ctx_cls = type(made_by.__name__, (_FollowedExecution, made_by), {})
    if dialect.driver == "aiosqlite" or dialect.driver.startswith("psycopg"):
        event.listen(engine.sync_engine, "handle_error", _give_up_cursors)


def has_open_cursor(session: AsyncSession) -> bool:
    """Return whether a result of the session's open transaction is still read from the server."""
    if not _open:
        return False
    return any(
        cursor.is_open for connection in begun_connections(session) for cursor in tuple(_open.get(connection, ()))
    )


def set_door_of_connection(connection: Connection, door: Door) -> None:
    """Have the results that are opened on `connection` itself take the turns of its session."""
    _doors[connection] = door


class _FollowedExecution(DefaultExecutionContext):
    """The execution of a statement; this class comes before the dialect's own."""

    def create_server_side_cursor(self) -> Any:
        cursor = super().create_server_side_cursor()
        self.cursor_fetch_strategy = ServerCursor(self.root_connection, cursor, self.execution_options)
        return cursor


class ServerCursor(BufferedRowCursorFetchStrategy):
    """How a result fetches its rows from a cursor on the server."""

    def __init__(self, connection: Connection, dbapi_cursor: Any, execution_options: Any) -> None:
        # The buffer is given here, as SQLAlchemy would fetch rows to fill it, and the statement is executed only later.
        super().__init__(dbapi_cursor, execution_options, initial_buffer=deque())
        door: Door | None = getattr(getcurrent(), "entered", None) or _doors.get(connection)
        self._door = door
        self._cursor = dbapi_cursor
        self._is_closed = False
        self._has_ended = False
        if connection not in _open:
            _open[connection] = WeakSet()
            for name in ("commit", "rollback", "commit_twophase", "rollback_twophase"):
                event.listen(connection, name, _end_cursors)
            event.listen(connection, "rollback_savepoint", _end_cursors_of_savepoint)
        _open[connection].add(self)
        self.savepoints_before = savepoints_set_on(connection)
        """How many savepoints had been set on the connection before the cursor was opened."""

    @property
    def is_open(self) -> bool:
        """Whether there may be rows that have not been fetched."""
        if self._is_closed:
            return False
        try:
            # A statement that returns no rows, or has failed, has no cursor on the server.
            return self._cursor.description is not None
        except AttributeError:
            # SQLAlchemy has closed its adapter of a driver's cursor, as the statement has failed: there is none in it.
            return False

    def end(self) -> None:
        """Close the cursor, as its transaction is about to end; the result refuses to be read from then on."""
        if self.is_open:
            self._is_closed = self._has_ended = True
            self._rowbuffer.clear()
            try:
                self._cursor.close()
            except BaseException as exc:
                # A cursor that the server has closed, or does not answer for, needs no closing there.
                self.give_up()
                if not isinstance(exc, Exception):
                    raise

    def give_up(self) -> Any:
        """Close the driver's object alone, as its connection is given up: psycopg warns of cursors that are left open.

        Returns:
            SQLAlchemy's adapter of the driver's cursor.
        """
        self._is_closed = True
        close_psycopg_cursor(self._cursor)
        return self._cursor

    # --- methods that the result calls --------------------------------------------------------------------------------

    def fetchone(self, result: Any, dbapi_cursor: Any, hard_close: bool = False) -> Any:  # noqa: FBT001, FBT002 - SQLAlchemy's
        if self._rowbuffer:
            return self._rowbuffer.popleft()
        with self._turn():
            return super().fetchone(result, dbapi_cursor, hard_close)

    def fetchmany(self, result: Any, dbapi_cursor: Any, size: int | None = None) -> Any:
        with self._turn():
            return super().fetchmany(result, dbapi_cursor, size)

    def fetchall(self, result: Any, dbapi_cursor: Any) -> Any:
        with self._turn():
            return super().fetchall(result, dbapi_cursor)

    def soft_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._is_closed = True
        super().soft_close(result, dbapi_cursor)

    def hard_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._is_closed = True
        super().hard_close(result, dbapi_cursor)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Take the turn of the session while rows are fetched.

        The asynchronous results of SQLAlchemy fetch in greenlets of their own, which have not come through the door.
        """
        self._refuse_if_ended()
        door = self._door
        if door is None or getattr(getcurrent(), "entered", None) is door:
            yield
            note_changes()
            return
        if not door.enter():
            await_only(door.wait())
        # What gives the connection up asks this greenlet whether the time of its call is up.
        greenlet: Any = getcurrent()
        entered, greenlet.entered = getattr(greenlet, "entered", None), door
        try:
            # The transaction may have ended while another call had the turn.
            self._refuse_if_ended()
            # The limit of an outer call covers what is fetched inside of it.
            latest = None if door.limit is not None else door.latest
            with nullcontext() if latest is None else in_time(door, latest()):
                yield
            note_changes()
        except BaseException:
            if self._is_closed:
                # The result has been read to its end, and closing its cursor was interrupted.
                self.give_up()
            door.is_suspect = True
            door.answer_interruption()
            raise
        finally:
            greenlet.entered = entered
            door.leave()

    def _refuse_if_ended(self) -> None:
        if self._has_ended:
            _refuse()


def _refuse() -> NoReturn:
    raise OpenCursorError(
        "The transaction that this result was opened in has ended, and its connection may serve another request; or a "
        "savepoint was rolled back, and the cursor went with it: nothing more was read. Read the result to its end "
        "before the transaction is committed or rolled back, or open it where it is read."
    )


def take_left_cursors(driver_connection: object) -> list[Any]:
    """Return the driver's cursors that must be closed before `driver_connection`, of aiosqlite, is; forget them."""
    return _left.pop(driver_connection, [])


def _give_up_cursors(context: ExceptionContext) -> None:
    """Close the cursors of a connection that is about to be given up, as its task was cancelled for instance."""
    connection = context.connection
    is_given_up = context.is_disconnect or not isinstance(context.original_exception, Exception)
    if connection is None or not is_given_up:
        return
    cursors = [cursor.give_up() for cursor in tuple(_open.get(connection, ()))]
    # If the connection was lost before the statement had a cursor, there is none to close.
    cursor_of_statement = getattr(context.execution_context, "cursor", None)
    if cursor_of_statement is not None:
        close_psycopg_cursor(cursor_of_statement)
        cursors.append(cursor_of_statement)
    if connection.dialect.driver == "aiosqlite":
        # SQLite keeps the transaction of a closed connection, and its lock, until the connection's last statement is
        # closed. Without this, that is when the traceback of the error is thrown away.
        with suppress(InvalidRequestError):
            left = _left.setdefault(connection.connection.driver_connection, [])
            left.extend(filter(None, map(driver_cursor_of, cursors)))


def _end_cursors_of_savepoint(connection: Connection, name: str, context: None) -> None:
    # PostgreSQL closes the cursors that were opened after the savepoint: reading from one would abort the transaction.
    number = number_of_savepoint(name)
    for cursor in tuple(_open.get(connection, ())):
        if cursor.savepoints_before >= number:
            cursor.end()


def _end_cursors(connection: Connection, *args: object) -> None:
    for cursor in tuple(cast("WeakSet[ServerCursor]", _open.get(connection, ()))):
        cursor.end()
