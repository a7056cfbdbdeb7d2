"""`SharedConnection`: one connection, its outer transaction, and the turns of the transactions inside of that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import greenlet_spawn

from ctxdb_core._shield import run_to_completion
from ctxdb_core.testing._driver import Driver, check_driver, driver_of, own_backends
from ctxdb_core.testing._errors import SharedTransactionError
from ctxdb_core.testing._settings import Settings, assignment, names_set_by, query
from ctxdb_core.testing._statement import Kind, Result, Statement, open_savepoints
from ctxdb_core.testing._thread import LoopThread
from ctxdb_core.testing._transaction import Transaction

_ALTERNATIVE = "or test this with real commits (the fixture `ctxdb_clean_tables`, docs/testing.md)."


class SharedConnection:
    """The connection that test and application share. All of it runs on the loop of its thread, one call at a time."""

    def __init__(self, thread: LoopThread, timeout: float) -> None:
        self.thread = thread
        self.timeout = timeout
        self.problems: list[str] = []
        """Roll-backs that make the outcome of the test worthless, for the error at its end."""
        self.unusable: str | None = None
        """Why there can be no further statement."""
        self._open: list[Transaction] = []
        self._turns = asyncio.Condition()
        self._saw_ddl = False
        self._running: asyncio.Task[Any] | None = None
        """The task that is executing a statement."""
        self._executing: Transaction | None = None
        """The transaction of that statement."""
        self._was_interrupted = False
        """Whether a statement was stopped."""
        self._in_force = Settings()
        """The settings that the connection has now; any other is what the connection came with."""
        self._originals: dict[str, str] = {}
        """The values that the connection came with, of all settings that were changed at any time."""
        self._backend_pid: int | None = None

    async def begin(self, engine: AsyncEngine) -> None:
        """Take a connection of `engine`, and begin the outer transaction on it."""
        check_driver(engine.sync_engine)
        self._connection: AsyncConnection = await engine.connect()
        try:
            raw = await self._connection.get_raw_connection()
            dbapi_connection: Any = raw.dbapi_connection
            dialect = engine.dialect
            if dialect.detect_autocommit_setting(dbapi_connection):
                level: Any = getattr(dialect, "default_isolation_level", None) or "READ COMMITTED"
                await self._connection.execution_options(isolation_level=level)
            await self._connection.begin()
            self.driver: Driver = driver_of(engine.sync_engine, dbapi_connection)
            # The drivers begin a transaction at its first statement.
            await self._connection.exec_driver_sql("SELECT 1")
            await self.driver.begin()
            self._backend_pid = self.driver.backend_pid
            if self._backend_pid is not None:
                own_backends.add(self._backend_pid)
        except BaseException:
            await self._connection.close()
            raise

    async def end(self) -> None:
        """Roll everything back, and give the connection back. Code that still uses it gets an error."""
        if self._running is not None:
            # No task is left that would wait for it.
            self._running.cancel()
        if self._backend_pid is not None:
            own_backends.discard(self._backend_pid)
        async with self._turns:
            if self.unusable is None:
                self.unusable = (
                    "has ended, together with its test: a task, a session or a client outlives the block. End it "
                    "inside of the block."
                )
                # Open transactions end without the checks of a COMMIT, and no transaction waits for them any more.
                self._open.clear()
            else:
                await self._connection.invalidate()
            self._turns.notify_all()
            if self._saw_ddl and not self._connection.invalidated:
                # Statements that are prepared on it may know tables that are gone.
                await self._connection.invalidate()
            await self._connection.close()

    async def execute(self, transaction: Transaction, statement: Statement, task: object) -> Result:
        """Run a statement in its transaction."""
        async with self._turn_of(transaction, task, statement.kind):
            if transaction.savepoint is None:
                await run_to_completion(self._enforce(Settings()))
                await run_to_completion(self._set_savepoint(transaction))
            await run_to_completion(self._enforce(transaction.settings))
            transaction.task = task
            transaction.last = str(statement.arguments[0])[:80]
            transaction.wrote |= not _only_reads(transaction, statement.kind)
            transaction.locked |= statement.kind is Kind.LOCK
            if statement.kind is Kind.DDL:
                self._saw_ddl = True
                self.driver.forget_schema()
            names, is_local = await run_to_completion(self._names_set_by(transaction, statement))
            self._running, self._executing = asyncio.current_task(), transaction
            try:
                result = await self._run(transaction, statement)
            except BaseException as exc:
                transaction.failed = self.driver.aborts_on_error or isinstance(exc, asyncio.CancelledError)
                self._check_outer_transaction()
                if transaction.autocommit and self.unusable is None:
                    await run_to_completion(self._roll_back(transaction))
                raise
            finally:
                self._running = self._executing = None
                transaction.interrupted = False
            # In an aborted transaction, nothing but a roll-back to a savepoint succeeds.
            transaction.failed = False
            if statement.kind is Kind.SAVEPOINT:
                transaction.savepoints = open_savepoints(transaction.savepoints, str(statement.arguments[0]))
            self._check_outer_transaction()
            await run_to_completion(self._note_settings(transaction, statement, names, is_local=is_local))
            if transaction.autocommit:
                await run_to_completion(self._commit(transaction))
            return result

    async def _run(self, transaction: Transaction, statement: Statement) -> Result:
        if transaction.interrupted:
            raise self.driver.dbapi_connection.dbapi.OperationalError("interrupted")
        result: Result = await greenlet_spawn(statement.run, self.driver.dbapi_connection)
        return result

    async def commit(self, transaction: Transaction) -> None:
        """Release the savepoint of a transaction, if a COMMIT would succeed now."""
        async with self._change_of_turns():
            self._check_usable()
            self._check_not_undone(transaction)
            if transaction.savepoint is not None:
                while (top := self._open[-1]) is not transaction and top.gives_way:
                    await run_to_completion(self._give_way(top))
                await run_to_completion(self._commit(transaction))
            transaction.over = True

    async def roll_back(self, transaction: Transaction, task: object) -> None:
        """Roll a transaction back to its savepoint."""
        if self.unusable is not None:
            transaction.over = True
            return
        try:
            async with self._turn_of(transaction, task):
                if transaction.savepoint is not None:
                    await run_to_completion(self._roll_back(transaction))
                transaction.over = True
        except SharedTransactionError:
            await self.terminate(transaction)
            raise

    async def terminate(self, transaction: Transaction) -> None:
        """Roll a transaction back without waiting for its turn: transactions that began after it are undone with it."""
        async with self._change_of_turns():
            if self.unusable is None and transaction.savepoint is not None:
                await run_to_completion(self._roll_back(transaction))
            transaction.over = True

    async def interrupt(self, transaction: Transaction) -> None:
        """Stop the statement that a transaction has begun, also if the statement still waits for its turn."""
        if self._executing is transaction:
            self._was_interrupted = True
            await self.driver.interrupt()
        else:
            transaction.interrupted = True

    async def use_driver(self, fn: Any) -> Any:
        """Await `fn` with the driver's own connection, between two statements."""
        async with self._turns:
            self._check_usable()
            return await fn(self.driver.connection)

    @asynccontextmanager
    async def _change_of_turns(self) -> AsyncIterator[None]:
        """Hold the connection, and wake all that wait for a turn in the end, also after a commit that has failed."""
        async with self._turns:
            try:
                yield
            finally:
                self._turns.notify_all()

    @asynccontextmanager
    async def _turn_of(self, transaction: Transaction, task: object, kind: Kind | None = None) -> AsyncIterator[None]:
        async with self._turns:
            while not await self._has_turn(transaction, task, kind):
                pass
            try:
                if transaction.read_only and transaction.savepoint is not None:
                    await self.driver.set_read_only(on=True, savepoint=False)
                yield
            finally:
                if transaction.read_only and self.unusable is None:
                    await self.driver.set_read_only(on=False, savepoint=False)
                self._turns.notify_all()

    async def _has_turn(self, transaction: Transaction, task: object, kind: Kind | None) -> bool:
        self._check_usable()
        self._check_not_undone(transaction)
        top = self._open[-1] if self._open else None
        if top is None or top is transaction:
            return True
        if top.gives_way:
            await run_to_completion(self._give_way(top))
            return False
        if transaction.savepoint is None:
            if transaction.autocommit and kind is not None and _only_reads(transaction, kind) and not top.failed:
                # The transaction is over before another one could get in its way.
                return True
            if any(outer is top for outer in transaction.inside):
                return True
            reason = (
                f"a session needs the shared connection while another one has an open transaction on it ({top}) that "
                "has written, or taken a lock: commit or roll back that one first"
            )
        else:
            reason = (
                f"a session goes on with its transaction ({transaction}) while one that was begun after it ({top}) has "
                "written and is still open: commit or roll back that one first"
            )
            if top.task is task or transaction.overdue:
                raise _refusal(reason, 0)
        await self._wait(transaction, reason)
        return False

    def _check_not_undone(self, transaction: Transaction) -> None:
        if transaction.undone:
            raise SharedTransactionError(
                "This session's transaction was undone: it was begun while another one was open, and that was rolled "
                f"back before this one had ended. Let it end first, {_ALTERNATIVE}"
            )

    async def _wait(self, transaction: Transaction, reason: str) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                await self._turns.wait()
        except TimeoutError:
            transaction.overdue = True
            raise _refusal(reason, self.timeout) from None

    async def _give_way(self, transaction: Transaction) -> None:
        """Release the savepoint of a transaction with nothing to undo; its next statement sets another one."""
        if not transaction.failed:
            try:
                await self._release(transaction)
            except BaseException:
                # The transaction may have set a timeout for statements, which has stopped the release.
                transaction.failed = self.driver.aborts_on_error
                raise
            transaction.wrote = False
            return
        await self._roll_back(transaction)
        transaction.failed = True

    async def _set_savepoint(self, transaction: Transaction) -> None:
        transaction.savepoint = f"ctxdb_{len(self._open) + 1}"
        await self._control(f"SAVEPOINT {transaction.savepoint}")
        self._open.append(transaction)
        if transaction.read_only:
            await self.driver.set_read_only(on=True, savepoint=True)
        if transaction.failed:
            # Its statements had to be undone for another session's sake: to the application, it is still aborted.
            with suppress(Exception):
                await self.driver.run("ROLLBACK TO SAVEPOINT ctxdb_aborted")

    async def _commit(self, transaction: Transaction) -> None:
        if transaction.failed:
            # PostgreSQL answers COMMIT with a roll-back then, and no error.
            await self._roll_back(transaction)
            return
        assert transaction.savepoint is not None
        is_last = self._open[-1] is transaction
        # The checks of a COMMIT may depend on the settings, so these are restored after the checks.
        restore = self._restoration()
        try:
            if transaction.wrote:
                # Other transactions may have begun since. Then this savepoint stays until they have ended, and another
                # one is checked.
                checked = transaction.savepoint if is_last else "ctxdb_checked"
                if not is_last:
                    await self.driver.run(f"SAVEPOINT {checked}")
                try:
                    await self.driver.commit(checked, *restore)
                except BaseException:
                    if not is_last:
                        await self.driver.run(f"ROLLBACK TO SAVEPOINT {checked}", f"RELEASE SAVEPOINT {checked}")
                    raise
            elif is_last:
                await self.driver.run(*restore, f"RELEASE SAVEPOINT {transaction.savepoint}")
        except BaseException:
            # A COMMIT that fails ends its transaction.
            transaction.over = True
            self._check_outer_transaction()
            if self.unusable is None:
                await self._roll_back(transaction)
            raise
        if is_last:
            self._in_force = Settings()
            self._leave(transaction, committed=True)
            await self._release_committed()
        else:
            transaction.committed = True

    async def _release_committed(self) -> None:
        """Release the savepoints that have waited for the last one to go."""
        while self._open and self._open[-1].committed:
            await self._control(f"RELEASE SAVEPOINT {self._open[-1].savepoint}")
            self._leave(self._open[-1], committed=True)

    async def _roll_back(self, transaction: Transaction) -> None:
        while self._open[-1] is not transaction:
            inner = self._open[-1]
            inner.undone = not inner.committed
            self._complain(transaction, [*inner.within, str(inner)])
            self._leave(inner, committed=False)
        if transaction.within and not transaction.wrote and not transaction.failed:
            # The transaction has only read. What others have committed meanwhile must stand, as with connections of
            # their own.
            await self._release(transaction)
            return
        if transaction.within:
            self._complain(transaction, transaction.within)
        await self._control(
            f"ROLLBACK TO SAVEPOINT {transaction.savepoint}", f"RELEASE SAVEPOINT {transaction.savepoint}"
        )
        # The settings of a transaction are made behind its savepoint, and have been undone with it.
        self._in_force = Settings()
        self._leave(transaction, committed=False)
        await self._release_committed()

    async def _names_set_by(self, transaction: Transaction, statement: Statement) -> tuple[set[str], bool]:
        """Return what a statement is about to set, and whether for its transaction alone."""
        if not self.driver.has_settings or transaction.failed:
            return set(), True
        names, is_local = names_set_by(statement, local=True), True
        if transaction.autocommit and not names:
            names, is_local = names_set_by(statement, local=False), False
        if new := sorted(names - self._originals.keys()):
            self._originals |= await self._values_of(new)
        return names, is_local

    async def _note_settings(
        self, transaction: Transaction, statement: Statement, names: set[str], *, is_local: bool
    ) -> None:
        settings = transaction.settings
        # Its own savepoints undo what was set since them.
        if not names and not (statement.kind is Kind.SAVEPOINT and settings.values):
            return
        if transaction.autocommit and is_local:
            # The setting ends with the statement: the transaction with the next turn sets its own.
            settings = self._in_force = Settings(dict(settings.values))
        settings.values = await self._values_of(sorted(names | settings.values.keys()))

    async def _values_of(self, names: Sequence[str]) -> dict[str, str]:
        ((*values,),) = await self.driver.fetch(query(names))
        return dict(zip(names, values, strict=True))

    async def _enforce(self, settings: Settings) -> None:
        """Replace the settings that are in force."""
        if settings is not self._in_force:
            if statement := assignment(self._overridden(), settings.values):
                await self._control(statement)
            self._in_force = settings

    def _restoration(self) -> list[str]:
        """Return the statements that put the settings in force back to what the connection came with.

        They belong behind the savepoint: a timeout that hits one of them must not abort the outer transaction.
        """
        statement = assignment(self._overridden(), {})
        return [] if statement is None else [statement]

    def _overridden(self) -> dict[str, str]:
        return {name: self._originals[name] for name in self._in_force.values}

    async def _release(self, transaction: Transaction) -> None:
        """Release the savepoint of the transaction that has begun last."""
        await self._control(*self._restoration(), f"RELEASE SAVEPOINT {transaction.savepoint}")
        self._in_force = Settings()
        self._leave(transaction, committed=True)
        await self._release_committed()

    async def _control(self, *statements: str) -> None:
        try:
            await self.driver.run(*statements)
        except BaseException:
            self._check_outer_transaction()
            raise

    def _leave(self, transaction: Transaction, *, committed: bool) -> None:
        self._open.remove(transaction)
        transaction.savepoint = None
        if committed and self._open:
            self._open[-1].within += transaction.within
            if transaction.wrote:
                self._open[-1].within.append(str(transaction))
        transaction.within = []
        transaction.savepoints = []
        transaction.failed = transaction.locked = False

    def _complain(self, outer: Transaction, undone: list[str]) -> None:
        self.problems.append(
            f"A roll-back ({outer}) has undone what another session had committed since the transaction began "
            f"({', '.join(undone)}), which would stand on connections of their own. Commit before the other session "
            f"begins, {_ALTERNATIVE}"
        )

    def _check_outer_transaction(self) -> None:
        if self.unusable is None and not self.driver.in_transaction:
            self.unusable = (
                "was lost: when a statement that writes is interrupted, as its time is up, SQLite undoes all that the "
                f"connection has done. Give that statement the time that it needs, {_ALTERNATIVE}"
                if self._was_interrupted
                else "was lost: its connection was closed, or a statement has ended the outer transaction. What "
                "follows would be committed for good."
            )

    def _check_usable(self) -> None:
        if self.unusable is not None:
            raise SharedTransactionError(f"The shared transaction {self.unusable}")


def _only_reads(transaction: Transaction, kind: Kind) -> bool:
    """Return whether a statement leaves nothing that could be undone."""
    return kind in (Kind.READ, Kind.LOCK, Kind.SET_LOCAL) or (transaction.autocommit and kind is Kind.SET)


def _refusal(reason: str, waited: float) -> SharedTransactionError:
    seconds = f" (it has waited for {waited:g} s)" if waited else ""
    return SharedTransactionError(
        f"In a shared transaction there is one connection: {reason}{seconds}; {_ALTERNATIVE} A transaction that has "
        "only read lets no other one wait."
    )
