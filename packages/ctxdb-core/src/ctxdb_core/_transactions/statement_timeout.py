"""`StatementTimeout`: limits how long the statements of a unit of work may take, in each of its transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._sqlalchemy.binds import begun_connections, is_autocommit, is_bound_to_connection
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.doors import wait_for_calls
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.mysql_errors import is_mysql
from ctxdb_core._sqlalchemy.poolers import is_behind_pooler
from ctxdb_core._transactions.rollback_only import set_rollback_only
from ctxdb_core._transactions.undo import undo_on_return
from ctxdb_core._wording import type_of
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError, DeadlineExceededError, TransactionOptionsError

__all__ = ["StatementTimeout", "check_statement_timeout", "limit_open_transaction", "limit_statements"]


def check_statement_timeout(seconds: object) -> None:
    """Raise the error that says what to give if `seconds`, a ``statement_timeout``, is no time; ``None`` is no limit.

    Raises:
        ArgumentTypeError: it is no number.
        ArgumentValueError: it is not positive, or not finite.
    """
    if seconds is None:
        return
    if not isinstance(seconds, int | float):
        raise ArgumentTypeError(
            f"{type_of(seconds)} is given as `statement_timeout`: give a number of seconds, or None for no limit."
        )
    if not 0 < seconds < float("inf"):
        raise ArgumentValueError(f"statement_timeout={seconds!r}: give seconds, more than 0, or None for no limit.")


@dataclass(frozen=True, slots=True)
class StatementTimeout:
    """A number of seconds for each statement, a point in time for all of them, or both.

    Args:
        seconds: how long each statement may take.
        deadline: when the last statement has to be done, on the event loop's clock (`loop.time()`).

    Raises:
        ValueError: `seconds` is not positive.
        TypeError: `seconds` or `deadline` is no number.
    """

    seconds: float | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        check_statement_timeout(self.seconds)
        if self.deadline is not None and not isinstance(self.deadline, int | float):
            raise ArgumentTypeError(
                f"{type_of(self.deadline)} is given as `deadline`: give a time on the event loop's clock, "
                "`loop.time() + 2.5` for instance."
            )

    def __bool__(self) -> bool:
        return self.seconds is not None or self.deadline is not None

    def left(self) -> float | None:
        """Return how many seconds a statement that begins now may take; ``None`` without a limit.

        Raises:
            DeadlineExceededError: the deadline has passed.
        """
        if self.deadline is None:
            return self.seconds
        left = self.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceededError(
                f"The deadline of this unit of work passed {-left:.3f} seconds ago, so the statement was not sent. Let "
                "the error propagate, so that the unit of work is rolled back, or give it more time."
            )
        return left if self.seconds is None else min(left, self.seconds)

    def milliseconds(self) -> int | None:
        """Return `left` in milliseconds, as PostgreSQL takes it; ``None`` without a limit.

        What is left until a deadline is rounded down to two digits: each other number is another statement to prepare,
        and drivers keep a limited number of those.
        """
        left = self.left()
        if left is None:
            return None
        is_fixed = left == self.seconds
        left = min(left * 1000, _MAX_MILLISECONDS)
        milliseconds = round(left) if is_fixed else int(left)
        if not is_fixed:
            milliseconds -= milliseconds % 10 ** max(0, len(str(milliseconds)) - 2)
        # To PostgreSQL, 0 is no limit.
        return max(1, milliseconds)


CurrentTimeout: TypeAlias = Callable[[], StatementTimeout | None]

_MAX_MILLISECONDS = 2**31 - 1

_LIMITED = "ctxdb.statement_timeout"


def limit_statements(session: AsyncSession, current: CurrentTimeout) -> None:
    """Let each transaction that a unit's `session` begins from now on have the limit that is `current` then."""
    guard = guard_of(session)
    door = guard.door
    assert door is not None, "the unit of work has given the session one"
    if _LIMITED in guard.info:
        return
    guard.info[_LIMITED] = True
    guard.deadline = lambda: None if (timeout := current()) is None else timeout.deadline

    def check() -> None:
        if timeout := current():
            timeout.left()

    door.check = check
    if is_bound_to_connection(session):
        # A transaction that other code began, such as a test, goes on after this unit: it keeps its own limit.
        return
    door.latest = lambda: _latest(current())

    @event.listens_for(guard, "after_begin")
    def limit(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        # A savepoint has the limit of its transaction.
        if not transaction.nested and (timeout := current()):
            _limit(session, connection, timeout, current)


async def limit_open_transaction(session: AsyncSession, current: CurrentTimeout) -> None:
    """Have the transaction that is open keep to the limit that is `current`, if the database knows of it already."""
    connections = begun_connections(session)
    if connections and not is_bound_to_connection(session):
        await wait_for_calls((session,))
        timeout = current() or StatementTimeout()

        def limit(session: Session) -> None:
            for connection in connections:
                _limit(session, connection, timeout, current)

        await session.run_sync(limit)


CLIENT_SECONDS = 1.0
"""How much later than the database ctxdb gives a call up: the database's own error tells more."""


def _latest(timeout: StatementTimeout | None) -> float | None:
    """Return when a call that begins now, or sends a statement now, is given up."""
    if not timeout:
        return None
    now = asyncio.get_running_loop().time()
    # The COMMIT of what was done in time is sent after the deadline as well.
    latest = float("inf") if timeout.deadline is None else max(timeout.deadline, now)
    return min(latest, now + (timeout.seconds or float("inf"))) + CLIENT_SECONDS


def _limit(session: Session, connection: Connection, timeout: StatementTimeout, current: CurrentTimeout) -> None:
    backend = connection.dialect.name
    door: Door | None = getattr(session, "door", None)
    if door is not None and connection not in _timed:
        _timed.add(connection)
        event.listen(connection, "before_cursor_execute", door.restart_limit)
    if backend == "postgresql":
        _set_on_server(connection, timeout.milliseconds())
    elif backend == "sqlite":
        if connection not in _interrupted:
            _interrupted.add(connection)
            _Interrupter(session, connection, current)
    elif not is_mysql(connection.dialect):
        # MySQL and MariaDB have no common limit, and MySQL's is for SELECT alone. Their statements are limited by ctxdb
        # alone, which has the server end the connection.
        raise TransactionOptionsError(
            f"A statement timeout is known for PostgreSQL, SQLite, MySQL and MariaDB, not for {backend}: leave it out."
        )


def _set_on_server(connection: Connection, milliseconds: int | None) -> None:
    value = "DEFAULT" if milliseconds is None else milliseconds
    # A plain SET, as set_config() is a query: it would take the snapshot of the transaction.
    if is_autocommit(connection):
        if is_behind_pooler(connection):
            # What a session sets would stay on the pooler's connection, and stop other programs' queries. The limit is
            # kept on the client's side alone.
            return
        undo_on_return(connection, "RESET statement_timeout")
        connection.exec_driver_sql(f"SET statement_timeout = {value}")
    else:
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {value}")


class _Interrupter:
    """Interrupts the statements of one connection to SQLite, which has no limit of its own, when their time is up.

    It is on one SQLAlchemy connection, which lasts as long as its transaction.
    """

    def __init__(self, session: Session, connection: Connection, current: CurrentTimeout) -> None:
        self.session = session
        self.connection = connection
        self.current = current
        self.timer: asyncio.TimerHandle | None = None
        event.listen(connection, "before_cursor_execute", self.start)
        for name in ("after_cursor_execute", "commit", "rollback"):
            event.listen(connection, name, self.stop)

    def start(self, connection: Connection, cursor: object, statement: str, *args: object) -> None:
        self.stop()
        timeout = self.current()
        # A roll-back is not limited.
        if timeout and not statement.startswith("ROLLBACK") and (left := timeout.left()) is not None:
            self.timer = asyncio.get_running_loop().call_later(left, self.interrupt)

    def stop(self, *args: object) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def interrupt(self) -> None:
        # A statement that failed does not stop the timer.
        if self.connection.closed or self.connection.invalidated:
            return
        # SQLite rolls the transaction of an interrupted write back by itself. If the error is swallowed, what follows
        # would be committed without what came before.
        set_rollback_only(self.session, _INTERRUPTED)
        driver_connection: Any = self.connection.connection.driver_connection
        with suppress(StopIteration):
            # A coroutine that waits for nothing: run to its end here, it hits this statement and no later one.
            driver_connection.interrupt().send(None)


_INTERRUPTED = (
    "A statement of this transaction was interrupted when its time was up, and its error was not propagated: the "
    "transaction cannot be committed. Let the error propagate, or give the statement more time."
)

# The connections on which a listener restarts the limit of the running call at each statement.
_timed: WeakSet[Connection] = WeakSet()

# The connections that have an interrupter already.
_interrupted: WeakSet[Connection] = WeakSet()
