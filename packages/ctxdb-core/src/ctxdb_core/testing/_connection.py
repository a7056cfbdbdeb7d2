"""The DBAPI connection that an application gets in a shared transaction: its transactions are savepoints."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._shield import LentTask, run_to_completion
from ctxdb_core.testing._settings import Settings
from ctxdb_core.testing._shared_connection import SharedConnection
from ctxdb_core.testing._statement import Kind, Result, Statement, kind_of
from ctxdb_core.testing._transaction import Transaction

# The transactions that the running code is in: inherited by the tasks and threads that it starts.
_inside: ContextVar[tuple[Transaction, ...]] = ContextVar("ctxdb_shared_transactions", default=())


class Cursor:
    """A cursor that hands each statement to the shared connection's thread, and keeps the result here.

    The dialect may set further attributes before it executes: they are passed on.
    """

    arraysize = 1

    def __init__(self, connection: Connection, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._own = (connection, arguments, options)
        self._result = Result(None, -1, None, [])
        self._rows: deque[Any] = deque()

    @property
    def description(self) -> Any:
        return self._result.description

    @property
    def rowcount(self) -> int:
        return self._result.rowcount

    @property
    def lastrowid(self) -> Any:
        return self._result.lastrowid

    def execute(self, operation: str, *parameters: Any) -> None:
        self._run("execute", operation, *parameters)

    def executemany(self, operation: str, *parameters: Any) -> None:
        self._run("executemany", operation, *parameters)

    def _run(self, method: str, operation: str, *parameters: Any) -> None:
        connection, arguments, options = self._own
        attributes = {name: value for name, value in vars(self).items() if name not in _OWN_ATTRIBUTES}
        kind = kind_of(operation)
        self._result = connection.execute(
            Statement(kind, method, (operation, *parameters), arguments, options, attributes)
        )
        self._rows = deque(self._result.rows)

    def fetchone(self) -> Any:
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        return [self._rows.popleft() for _ in range(min(size or self.arraysize, len(self._rows)))]

    def fetchall(self) -> list[Any]:
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def __iter__(self) -> Iterator[Any]:
        while self._rows:
            yield self._rows.popleft()

    def setinputsizes(self, *sizes: Any) -> None:
        """Do nothing: the drivers that are shared need no sizes."""

    def close(self) -> None:
        self._rows.clear()

    async def _async_soft_close(self) -> None:
        """Do nothing: the server has nothing left of a cursor (called by SQLAlchemy's asyncio results)."""


_OWN_ATTRIBUTES = {"_own", "_result", "_rows", "arraysize"}


class Connection(AdaptedConnection):
    """What the application's engine takes for a connection of its own.

    Its first statement sets a savepoint, COMMIT releases it, ROLLBACK goes back to it.
    """

    __slots__ = (
        "_autocommit",
        "_explicit",
        "_lenient",
        "_read_only",
        "_settings",
        "_shared",
        "_transaction",
        "isolation_level",
    )

    def __init__(self, shared: SharedConnection, *, autocommit: bool, read_only: bool, lenient: bool) -> None:
        self._shared = shared
        self._autocommit = autocommit
        self._read_only = read_only
        self._lenient = lenient
        self._explicit = False
        """Whether a BEGIN was written out, which interrupts autocommit."""
        self._transaction: Transaction | None = None
        self._settings = Settings()
        """What was set in autocommit, for all statements that follow."""
        self.isolation_level: str | None = None
        """The level that was set. It is only there to be read, as it makes no difference on a shared connection."""

    @property
    def autocommit(self) -> bool:
        """Whether each statement is a transaction of its own."""
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.rollback()
        self._autocommit = value

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._read_only

    @read_only.setter
    def read_only(self, value: bool) -> None:
        self._read_only = value

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be executed any more, on this or on any other part of the shared connection."""
        return self._shared.unusable is not None

    @property
    def driver_connection(self) -> Any:
        """The driver's connection; its coroutine methods run where it lives."""
        return _DriverConnection(self._shared, self._transaction)

    def run_async(self, fn: Callable[[Any], Awaitable[Any]]) -> Any:
        """Await `fn`, given the driver's connection, where that lives."""
        return await_only(self._shared.thread.run(self._shared.use_driver, fn))

    def cursor(self, *arguments: Any, **options: Any) -> Cursor:
        """Return a cursor. All of its rows are fetched at once: on the server, it would last to the end of the test."""
        options.pop("server_side", None)
        return Cursor(self, arguments, options)

    def execute(self, statement: Statement) -> Result:
        """Run a statement in the current transaction, or in a new one."""
        if statement.kind is Kind.BEGIN:
            self._explicit = True
        elif statement.kind is Kind.COMMIT:
            self.commit()
        elif statement.kind is Kind.ROLL_BACK:
            self.rollback()
        elif statement.kind is not Kind.ISOLATION_LEVEL:
            # The server would refuse a level, as the outer transaction has begun; it makes no difference here.
            transaction = self._begun()
            return await_only(self._shared.thread.run(self._shared.execute, transaction, statement, _current_task()))
        return Result(None, -1, None, [])

    def _begun(self) -> Transaction:
        transaction = self._transaction
        if transaction is None or transaction.over:
            autocommit = self._autocommit and not self._explicit
            transaction = self._transaction = Transaction(
                autocommit=autocommit,
                read_only=self._read_only,
                lenient=self._lenient,
                settings=self._settings if autocommit else Settings(),
            )
        transaction.inside = tuple(each for each in _inside.get() if not each.over and each is not transaction)
        if not transaction.autocommit:
            _inside.set((*transaction.inside, transaction))
        return transaction

    def commit(self) -> None:
        """Release the savepoint."""
        self._explicit = False
        transaction, self._transaction = self._transaction, None
        if transaction is not None and not transaction.over:
            try:
                await_only(self._shared.thread.run(self._shared.commit, transaction))
            except BaseException:
                # The commit may not have run, or its answer may not have arrived.
                self._transaction = transaction
                raise

    def rollback(self) -> None:
        """Roll back to the savepoint."""
        self._explicit = False
        transaction, self._transaction = self._transaction, None
        if transaction is not None and not transaction.over and not self.is_lost:
            await_only(self._shared.thread.run(self._shared.roll_back, transaction, _current_task()))

    def close(self) -> None:
        """Roll back what is open."""
        self.terminate()

    def terminate(self) -> None:
        """Roll back what is open, out of turn: its session is gone."""
        transaction, self._transaction = self._transaction, None
        if transaction is None or transaction.over or self.is_lost:
            return
        if in_greenlet():
            await_only(run_to_completion(self._shared.thread.run(self._shared.terminate, transaction)))
        else:
            # Garbage collection: nothing can be waited for.
            self._shared.thread.start(self._shared.terminate, transaction)


class _DriverConnection:
    def __init__(self, shared: SharedConnection, transaction: Transaction | None) -> None:
        self._shared = shared
        self._transaction = transaction

    async def interrupt(self) -> None:
        """Stop the statement of this transaction and of no other one, and do not wait for it: nor do the drivers."""
        if self._transaction is not None:
            self._shared.thread.start(self._shared.interrupt, self._transaction)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._shared.driver.connection, name)
        if not inspect.iscoroutinefunction(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._shared.thread.run(
                self._shared.use_driver, lambda connection: getattr(connection, name)(*args, **kwargs)
            )

        return call


def _current_task() -> object:
    task: object = asyncio.current_task()
    # While a coroutine runs to completion, a `LentTask` stands in for the running task.
    return task.host if isinstance(task, LentTask) else task
