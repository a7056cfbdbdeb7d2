"""`UnitOfWork`: the sessions of one request, job or message, and how they end together."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop  # for implementers of event loops, and what costs the least
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from contextvars import ContextVar, Token
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._databases.status import open_units
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.connection_context import hide_from_connections
from ctxdb_core._sqlalchemy.cursors import has_open_cursor
from ctxdb_core._sqlalchemy.door import Door, Refuse, StatementObserver
from ctxdb_core._sqlalchemy.doors import is_busy, wait_for_calls
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.second_connections import note_second_session
from ctxdb_core._sqlalchemy.session_factory import guarded
from ctxdb_core._transactions.rollback_only import check_commits
from ctxdb_core._transactions.statement_timeout import StatementTimeout, limit_open_transaction, limit_statements
from ctxdb_core._units import session_end
from ctxdb_core._units.abandonment import HandlerCalls
from ctxdb_core._units.callbacks import Callback, Callbacks, Outcome
from ctxdb_core._units.commit import (
    BeforeCommit,
    Sessions,
    commit_in_order,
    is_in_before_commit,
    prepare,
    roll_back,
)
from ctxdb_core._units.ids import id_of_request, new_unit_id
from ctxdb_core._units.leak import LeakGuard
from ctxdb_core._units.open_results import has_only_read, is_kept_for_cursor
from ctxdb_core._units.reading import ReadsFrom
from ctxdb_core._units.scheduler_jobs import sessions_beside_schedulers
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.watcher import UnitWatcher, request_line, tell
from ctxdb_core.errors import (
    ContextClosedError,
    ContextNotInitiatedError,
    TransactionAlreadyActiveError,
    TransactionRequiredError,
    UnexpectedRollbackError,
)

__all__ = [
    "CreateSession",
    "UnitOfWork",
    "current_unit",
    "inherited_before_commit",
    "running_unit",
]

current_unit: ContextVar[UnitOfWork] = ContextVar("ctxdb_unit_of_work")
"""The unit of work of the running code. Tasks inherit it, so code that reads it must expect a unit that has ended."""

BeginHook: TypeAlias = Callable[[AsyncSession], Awaitable[object]]
"""Awaited with the session at the beginning of each of its transactions."""

CreateSession: TypeAlias = Callable[[], Awaitable[AsyncSession]]
"""Makes a session, where it is not the `DBConnect` that does."""

# What `sessions` of a unit that has ended is. Never written to: sessions are opened in units that have not.
_CLOSED: dict[DBConnect, AsyncSession] = {}


class UnitOfWork:
    """The sessions that belong together, at most one for each `DBConnect`.

    Its transactions can end more than once: for a response when it starts, and again for what was done while it was
    sent. After `finish` it hands out no session any more.
    """

    # Defaults are the class's: a request that uses no database pays for what it sets.
    shared = False
    """Whether a middleware may join the unit when it finds it in its context: only a test harness may wish that."""

    autocommit = False
    """Whether its sessions have no transactions: each statement is committed by itself."""

    is_block = False
    """Whether it is one block of the user's, which is committed or undone as a whole, as that of `transactional` is."""

    calls: HandlerCalls | None = None
    """The calls of handlers, where a middleware may give up on one of them (see `follow_calls`)."""
    statement_timeout: StatementTimeout | None = None
    """How long its statements may take, and when the last of them has to be done; ``None`` without a limit."""
    callbacks: Callbacks | None = None
    """What is to be called when its transactions have ended; ``None`` as long as nothing was asked for."""
    begin_hooks: dict[DBConnect, list[BeginHook]] | None = None
    """What is to be awaited at the beginning of each transaction; ``None`` as long as nothing was asked for."""
    rollback_only: frozenset[DBConnect | None] = frozenset()
    """Where what is open is rolled back instead of committed; ``None`` among them stands for everywhere."""
    closing: tuple[AsyncSession, ...] = ()
    """The sessions that `close_session` has not closed yet: it may have to wait for a statement of another task."""
    blocks = 0
    """How many blocks are open that share its transactions, and end them or have others end them."""
    leak_guard: LeakGuard | None = None
    """Warns if the unit is thrown away with open sessions; made together with the first of them."""
    token: Token[UnitOfWork] | None = None
    """What `leave` makes current again."""
    reads_from: ReadsFrom | None = None
    """Whose sessions the unit has in the place of those of other databases; ``None`` for nobody else's."""
    origin: Any = None
    """The request that the unit belongs to: an ASGI scope, or the framework's request; ``None`` outside of requests."""
    watchers: tuple[UnitWatcher, ...] = ()
    """Who is told of the response and of the end: see `watch`."""
    opened: float
    """When the first session was opened, by `time.perf_counter`."""
    _id: str | None = None
    _reference: ref[UnitOfWork] | None = None
    """What `open_units` has of this unit."""

    def __init__(self, before_commit: BeforeCommit | None = None) -> None:
        self.sessions: dict[DBConnect, AsyncSession] = {}
        """Those that are open, in the order in which they were opened."""
        self.before_commit = before_commit
        """Awaited with each session that is about to be committed."""
        self.loop: asyncio.AbstractEventLoop | None = _get_running_loop()
        """The event loop that the unit belongs to, as its connections serve that one alone."""

    @classmethod
    def ended(cls) -> UnitOfWork:
        """Return a unit that has ended already: it hides one that was inherited."""
        unit = cls()
        unit.sessions = _CLOSED
        return unit

    @property
    def id(self) -> str:
        """What tells this unit from all others, also from those of other processes; made when it is first asked for."""
        if self._id is None:
            self._id = id_of_request(self.origin) or new_unit_id()
        return self._id

    @property
    def request(self) -> str | None:
        """Method and path of the request that the unit belongs to, without its query; ``None`` outside of requests.

        A unit that was opened inside of another one belongs to the request of that one.
        """
        if self.origin is not None:
            return request_line(self.origin)
        unit: UnitOfWork | None = self
        while unit is not None and unit.origin is None:
            unit = unit.enclosing()
        return None if unit is None else request_line(unit.origin)

    def enclosing(self) -> UnitOfWork | None:
        """Return the unit that was current when this one was entered, unless that one has ended."""
        around = None if self.token is None else self.token.old_value
        return around if isinstance(around, UnitOfWork) and not around.closed else None

    def answering(self, db: DBConnect | None = None) -> UnitOfWork | None:
        """Return the unit that the running code finds where this one is current: this one, unless it stands for others.

        Args:
            db: the database that the code asks about.
        """
        return self

    def watch(self, watcher: UnitWatcher) -> None:
        """Tell `watcher` of the start of the response and of the end of the unit, which are still to come."""
        self.watchers = (*self.watchers, watcher)

    def enter(self) -> None:
        """Make this the current unit of work of the running context."""
        self.token = current_unit.set(self)

    def leave(self) -> None:
        """Make the unit current again that was so before `enter`."""
        if self.token is None:
            return
        try:  # noqa: SIM105 - `suppress` takes a third of what an idle request costs
            current_unit.reset(self.token)
        except (ValueError, RuntimeError):
            # It was entered in another context (a task of its own, an async generator fixture), which went with its
            # variables. Or it was left already: an adapter may finalize twice.
            pass

    @property
    def closed(self) -> bool:
        """Whether the unit of work has ended."""
        return self.sessions is _CLOSED

    def of(self, db: DBConnect) -> UnitOfWork:
        """Return the unit that answers for `db`: this one, unless it is about another database alone."""
        return self

    async def open_session(self, db: DBConnect, create: CreateSession | None = None) -> AsyncSession:
        """Return the session on `db`, made now if need be.

        Args:
            db: where.
            create: makes the session, if not `db` itself, and if this unit does not know better.

        Raises:
            ContextClosedError: the unit of work has ended.
            ContextNotInitiatedError: it belongs to another thread's event loop.
        """
        self.check_usable()
        if db in self.sessions:
            return self.sessions[db]
        source = db if self.reads_from is None else self.source_of(db)
        if source is not db:
            create = None
        session = source.create_session_at_once() if create is None else None
        if session is None:
            session = await (create or source.create_session)()
            if self.sessions is _CLOSED or db in self.sessions:
                # Meanwhile, the unit has ended, or another of its tasks has made the session.
                await session_end.close(session, None, db)
                return await self.open_session(db)
        self._take(db, session)
        return session

    def source_of(self, db: DBConnect) -> DBConnect:
        """Return the database whose sessions this unit uses where the code asks for `db`.

        That is `db` itself, or a reader in its place (see `reads_from`). Where a test leads `db` alone to another
        database, such as to the connection that it shares with the application, there is no other reader of that.
        """
        reader = None if self.reads_from is None else self.reads_from.get(db)
        return db if reader is None or (db.is_overridden and not reader.is_overridden) else reader

    def create_session_at_once(self, db: DBConnect, create: Callable[[], AsyncSession | None]) -> AsyncSession | None:
        """Return a new session on `db`, to be adopted; ``None`` if making one takes an ``await``.

        Args:
            db: where.
            create: makes it, if this unit does not know better.
        """
        source = self.source_of(db)
        return create() if source is db else source.create_session_at_once()

    def adopt_session(self, db: DBConnect, session: AsyncSession) -> AsyncSession:
        """Take `session`, which is new, as the one on `db`; return the one that is there instead, if one is.

        Raises:
            ContextClosedError, ContextNotInitiatedError: as `open_session`.
        """
        self.check_usable()
        if db in self.sessions:
            return self.sessions[db]
        self._take(db, session)
        return session

    def _take(self, db: DBConnect, session: AsyncSession) -> None:
        if self.leak_guard is None:
            watched = sessions_beside_schedulers(current_unit)
            if watched is not None:
                self.sessions = watched
            self.leak_guard = LeakGuard(self.sessions)
            self.opened = perf_counter()
            self._reference = reference = ref(self, open_units.discard)
            open_units.add(reference)
        self.prepare_session(db, session)
        self.sessions[db] = session
        if self.token is not None and isinstance(outer := self.token.old_value, UnitOfWork):
            outer.note_second_session(db, session)
        if self.callbacks is not None:
            self.callbacks.watch_new(db, session)

    def note_second_session(self, db: DBConnect, session: AsyncSession) -> None:
        """Note that code which this unit may wait for opens a `session` of its own on `db`."""
        if self.sessions is _CLOSED or not self.is_on_its_loop():
            return
        unit = self.of(db)
        first = unit.sessions.get(db)
        if first is not None:
            # A reader in the place of `db` has a pool of its own.
            if unit.source_of(db) is db:
                note_second_session(db, session, first)
        elif self.token is not None and isinstance(outer := self.token.old_value, UnitOfWork):
            outer.note_second_session(db, session)

    def prepare_session(self, db: DBConnect, session: AsyncSession) -> None:
        """Make a new session one of this unit."""
        guard = guard_of(guarded(session))
        guard.door = Door(self.statement_observer())
        guard.before_close = session_end.may_be_closed
        if self.rollback_only:
            check_commits(guard, partial(self.check_may_commit, db))
        if self.begin_hooks is not None and db in self.begin_hooks:
            guard.on_begin = partial(_run_begin_hooks, self.begin_hooks[db])
        if self.statement_timeout:
            limit_statements(session, self.current_statement_timeout)

    def current_statement_timeout(self) -> StatementTimeout | None:
        """Return how long statements may take now; a session asks it at each transaction."""
        return self.statement_timeout

    def share_statement_timeout(self, outer: UnitOfWork | None) -> None:
        """Take over the limit of the unit that waits for this one."""
        if outer is not None and not outer.closed:
            self.statement_timeout = outer.statement_timeout

    async def limit_statements(self, timeout: StatementTimeout | None) -> None:
        """Let the statements of the unit take no longer than `timeout` from now on."""
        self.check_usable()
        self.statement_timeout = timeout
        for session in list(self.sessions.values()):
            limit_statements(session, self.current_statement_timeout)
            await limit_open_transaction(session, self.current_statement_timeout)

    def statement_observer(self) -> StatementObserver | None:
        """Return what is called before each statement of a session that is opened now."""
        return None if self.calls is None else self.calls.observe

    def is_on_its_loop(self) -> bool:
        """Return whether the running code is on the event loop, and so on the thread, that the unit belongs to."""
        return self.loop is _get_running_loop()

    def check_usable(self) -> None:
        """Raise the error that says why the running code cannot use this unit, if it cannot."""
        if self.sessions is _CLOSED:
            raise ContextClosedError
        if not self.is_on_its_loop():
            if self.shared:
                raise ContextNotInitiatedError(
                    "The unit of work found here is a test's, on another thread's event loop, and its connection "
                    "serves that loop alone. For an application that runs on a thread of its own, let the test use "
                    "`ctxdb_core.testing.shared_transaction`, which serves every loop."
                )
            raise ContextNotInitiatedError(
                "The unit of work found here belongs to another event loop, that of another thread for instance, and a "
                "connection serves the loop that opened it. Wrap the code that runs here in `async with "
                "new_db_ctx():`, or run it on the first loop (`anyio.from_thread.run`)."
            )

    def on_outcome(self, db: DBConnect, outcome: Outcome, callback: Callback) -> None:
        """Run `callback` once the work that is open on `db`, or comes next, has the `outcome`; forget it otherwise.

        The roll-back of a savepoint counts for what was registered since that savepoint.
        """
        self.check_usable()
        if self.callbacks is None:
            self.callbacks = Callbacks(self._run_in_unit)
        self.callbacks.add(db, self.sessions.get(db), outcome, callback)

    def add_begin_hook(self, db: DBConnect, hook: BeginHook) -> None:
        """Await `hook` with the session on `db` at the beginning of each further transaction.

        Raises:
            TransactionAlreadyActiveError: a transaction is open in which a statement has been made, or a savepoint set.
            TransactionRequiredError: there are no transactions here.
        """
        self.check_usable()
        if self.autocommit:
            raise TransactionRequiredError(
                "This block runs without a transaction, so nothing could be set for one: the next statement would be "
                "executed without it. Use `transactional(db)`, which begins one."
            )
        session = self.sessions.get(db)
        guard = None if session is None else guard_of(session)
        if guard is not None and guard.in_nested_transaction():
            raise TransactionAlreadyActiveError(
                f"`on_begin` was called inside of a savepoint on {db!r}: what it sets for the transaction would be "
                "undone with the savepoint, and the transaction would go on without it. Call `on_begin` before "
                "`session.begin_nested()`, `atomic_db_session(db, 'savepoint')` and the like."
            )
        if guard is not None and not guard.begins_with_next_call:
            raise TransactionAlreadyActiveError(
                f"A statement has been made on {db!r} in the open transaction, without what `on_begin` is to set for "
                "it. Call `on_begin` before the first statement, in a dependency or middleware for instance, or end "
                "the transaction first (`await commit_db_session(db)`)."
            )
        if self.begin_hooks is None:
            self.begin_hooks = {}
        hooks = self.begin_hooks.setdefault(db, [])
        hooks.append(hook)
        # Where there are others already, the session has them, or is running them at this moment.
        if guard is not None and len(hooks) == 1:
            guard.on_begin = partial(_run_begin_hooks, hooks)

    def set_rollback_only(self, db: DBConnect | None) -> None:
        """Roll back what is open on `db`, or everywhere, where it would be committed.

        Raises:
            TransactionRequiredError: there are no transactions here.
        """
        self.check_usable()
        if self.autocommit:
            raise TransactionRequiredError(
                "This block runs without a transaction, so there is nothing that could be rolled back at its end. Use "
                "`transactional(db)`, which begins one."
            )
        self.rollback_only |= {db}
        for each, session in self.sessions.items():
            check_commits(session.sync_session, partial(self.check_may_commit, each))

    def check_may_commit(self, db: DBConnect) -> None:
        """Raise an error if what is open on `db` is to be rolled back.

        Raises:
            UnexpectedRollbackError: it is, as `set_rollback_only` was called.
        """
        if self._is_rollback_only(db):
            raise UnexpectedRollbackError(
                f"`set_rollback_only` was called, so what is open on {db!r} is going to be rolled back: nothing was "
                "committed. Do not commit after it, or commit in a unit of work of its own (`run_in_new_ctx`)."
            )

    def _is_rollback_only(self, db: DBConnect) -> bool:
        return db in self.rollback_only or None in self.rollback_only

    async def _roll_back_marked(self, dbs: Collection[DBConnect] | None) -> Collection[DBConnect] | None:
        """Roll back what `set_rollback_only` has named out of `dbs`; return where there may be something to commit."""
        if None in self.rollback_only and dbs is None:
            await self.roll_back(None, None)
            self.rollback_only = frozenset()
            return []
        named = [db for db in (self.rollback_only if dbs is None else dbs) if db and self._is_rollback_only(db)]
        await self.roll_back(None, named)
        if dbs is None:
            self.rollback_only = frozenset()
            return [db for db in self.sessions if db not in named]
        self.rollback_only -= set(named)
        return [db for db in dbs if db not in named]

    async def commit(self, dbs: Collection[DBConnect] | None = None, *, ends_body: bool = False) -> None:
        """Commit the open transactions in the order in which their sessions were opened; the unit stays usable.

        Where nobody asks for a certain database, a transaction that has only read stays open for a result that has not
        been read to its end.

        Args:
            dbs: where to commit; everywhere by default.
            ends_body: whether the body of the response has been made, so that nothing will read such a result on.

        Raises:
            OpenCursorError: a result is to be read on in a transaction that has written. All is rolled back.
            BaseException: the first error of `before_commit` or of a commit. What was to be committed and was not is
                rolled back, and the error names what was.
        """
        try:
            if self.rollback_only:
                dbs = await self._roll_back_marked(dbs)
            if len(self.sessions) == 1 and self.before_commit is None and dbs is None and self.callbacks is None:
                # The common case, without what several sessions, hooks and callbacks need.
                (session,) = self.sessions.values()
                if in_transaction(session):
                    if is_busy(session):
                        await wait_for_calls((session,))
                    if has_open_cursor(session) and await is_kept_for_cursor(session, ends_body=ends_body):
                        return
                    await run_to_completion(session_end.commit(session))
                    session_end.leave_blocks(session)
            else:
                await prepare(self.sessions, dbs, self._hook())
                sessions = self.sessions if dbs is not None else await self._without_kept(ends_body=ends_body)
                await run_to_completion(self._commit(sessions, dbs))
                self._leave_blocks(dbs)
                await self._wait_for_callbacks()
        except BaseException as exc:
            await self.roll_back(exc, dbs)
            raise

    async def _without_kept(self, *, ends_body: bool) -> Sessions:
        """Return the sessions whose transactions are not kept for a result that is still read."""
        return {
            db: session
            for db, session in list(self.sessions.items())
            if not (has_open_cursor(session) and await is_kept_for_cursor(session, ends_body=ends_body))
        }

    async def end_reading(self) -> None:
        """End the transactions that have only read, so that no connection is held while a part of a body is sent.

        A transaction stays open if a result is still read from it, if the code is inside of a block of it
        (``session.begin()``, a savepoint, those of ctxdb), if a statement is under way, if a callback waits for its
        outcome, and if anything was done in it that is not known to be reading.
        """
        if self.callbacks or self.rollback_only or self.blocks:
            return
        for db, session in list(self.sessions.items()):
            if in_transaction(session) and await has_only_read(session):
                try:
                    await run_to_completion(session_end.commit(session))
                except Exception as exc:  # noqa: BLE001 - it is logged, and nothing is lost with it
                    session_end.report(exc, None, f"a transaction on {db!r} that had only read could not be ended")
                    await run_to_completion(session_end.roll_back(session, exc, db))

    async def roll_back(self, error: BaseException | None = None, dbs: Collection[DBConnect] | None = None) -> None:
        """Roll back the open transactions; the unit stays usable.

        Args:
            error: what made it necessary; if rolling back fails, too, that is attached to it, and else logged.
            dbs: where to roll back; everywhere by default.
        """
        await run_to_completion(self._roll_back(self.sessions, error, dbs))
        self._leave_blocks(dbs)
        await self._wait_for_callbacks()

    def _leave_blocks(self, dbs: Collection[DBConnect] | None) -> None:
        if dbs is None:
            # The response starts inside of a dependency's block, for instance, and a background task works on in it.
            for session in self.sessions.values():
                session_end.leave_blocks(session)

    async def close_session(self, db: DBConnect, refuse: Refuse = session_end.refuse_after_close) -> None:
        """Close the session on `db`, if there is one, without a commit: its connection goes back to the pool.

        Args:
            db: where.
            refuse: raises the error that further use of the session gets.
        """
        self.check_usable()
        session = self.sessions.pop(db, None)
        if self.callbacks is not None:
            self.callbacks.settle([db], Outcome.ROLLED_BACK)
        if session is not None:
            self.closing = (*self.closing, session)
            try:
                await run_to_completion(session_end.end(session, None, db, refuse))
            except ContextClosedError:
                # The unit of work has ended meanwhile, and has closed the session.
                if not self.closed:
                    raise
            # After an error, the end of the unit tries again.
            self.closing = tuple(each for each in self.closing if each is not session)

    def finish_idle(self) -> bool:
        """End the unit without waiting for anything, if nothing is left to do; return whether it was ended so."""
        if self.callbacks or self.closing:
            return False
        if not self.sessions:
            self.sessions = _CLOSED
            if self.leak_guard is not None or self.watchers:
                self._note_end(None)
            return True
        for session in self.sessions.values():
            if not session_end.ends_without_io(session):
                return False
        sessions, self.sessions = self.sessions, _CLOSED
        for session in sessions.values():
            session_end.end_at_once(session, session_end.refuse_after_unit)
        self._note_end(None)
        return True

    def hand_over_sessions(self) -> None:
        """End the unit and leave its sessions, as they are, to the code that has them."""
        self.sessions = _CLOSED
        self._note_end(None)

    async def finish(self, *, commit: bool, error: BaseException | None = None) -> None:
        """Commit or roll back what is open, close every session, and hand out none from now on.

        Args:
            commit: whether to commit.
            error: what ended the unit early; if ending it fails, too, that is attached to it, and else logged.

        Raises:
            BaseException: as `commit` does; every session is closed all the same.
        """
        if commit:
            try:
                await self.commit()
                if self.finish_idle():
                    return
                # A call of another task has come in between.
                await prepare(self.sessions, None, self._hook())
            except BaseException as exc:
                await run_to_completion(self._finish(commit=False, error=exc))
                raise
        try:
            await run_to_completion(self._finish(commit=commit, error=error))
        finally:
            await self._wait_for_callbacks()

    async def _finish(self, *, commit: bool, error: BaseException | None) -> None:
        sessions, self.sessions = self.sessions, _CLOSED
        # The turns of all sessions are kept to the end: no call of another task comes between a commit and the end.
        async with AsyncExitStack() as turns:
            for db, session in list(sessions.items()):
                last_turn = session_end.last_turn(
                    session, session_end.refuse_after_unit, interrupt=not commit, error=error
                )
                if not await turns.enter_async_context(last_turn):
                    del sessions[db]
            for session in self.closing:
                last_turn = session_end.last_turn(
                    session, session_end.refuse_after_unit, interrupt=not commit, error=error
                )
                if await turns.enter_async_context(last_turn):
                    await session_end.close(session, error, "a session that was being closed")
            try:
                if commit:
                    await self._commit(sessions, None)
                else:
                    await self._roll_back(sessions, error, None)
            except BaseException as exc:
                error = exc
                raise
            finally:
                for db, session in sessions.items():
                    await session_end.close(session, error, db)
                self._note_end(error)

    async def _commit(self, sessions: Sessions, dbs: Collection[DBConnect] | None) -> None:
        try:
            await commit_in_order(sessions, dbs)
        except BaseException:
            self._settle(dbs, Outcome.ROLLED_BACK)
            raise
        # Where there was nothing to commit, the commit has succeeded as well.
        self._settle(dbs, Outcome.COMMITTED)

    async def _roll_back(
        self, sessions: Sessions, error: BaseException | None, dbs: Collection[DBConnect] | None
    ) -> None:
        try:
            await roll_back(sessions, dbs, error)
        finally:
            self._settle(dbs, Outcome.ROLLED_BACK)

    def _settle(self, dbs: Collection[DBConnect] | None, outcome: Outcome) -> None:
        if self.callbacks is not None:
            self.callbacks.settle(dbs, outcome)
            self.callbacks.start()

    async def _wait_for_callbacks(self) -> None:
        if self.callbacks is not None:
            await self.callbacks.wait()

    async def _run_in_unit(self, fn: Callable[[], Awaitable[None]]) -> None:
        """Await `fn` in a unit of work of its own, with the same `before_commit`: what a callback runs in."""
        unit = UnitOfWork(self.before_commit)
        unit.enter()
        try:
            await fn()
        except BaseException as exc:
            await unit.finish(commit=False, error=exc)
            raise
        await unit.finish(commit=True)

    def _hook(self) -> BeforeCommit | None:
        # A statement that was committed by itself is nobody's to prepare, and what the hook commits is not its own.
        return None if self.autocommit or is_in_before_commit(self.sessions) else self.before_commit

    def _note_end(self, error: BaseException | None) -> None:
        if self.leak_guard is not None:
            self.leak_guard.disarm()
        if self._reference is not None:
            open_units.discard(self._reference)
            self._reference = None
        watchers, self.watchers = self.watchers, ()
        for watcher in watchers:
            tell(watcher.unit_ends, error)


async def _run_begin_hooks(hooks: Collection[BeginHook], session: AsyncSession) -> None:
    for hook in hooks:
        await hook(session)


hide_from_connections(current_unit, UnitOfWork.ended())


def running_unit() -> UnitOfWork | None:
    """Return the unit of work that the running code is in; ``None`` outside of any, and where it has ended.

    A task inherits the unit of the code that has started it.
    """
    unit = current_unit.get(None)
    while unit is not None and (answering := unit.answering()) is not unit:
        unit = answering
    return None if unit is None or unit.closed else unit


def inherited_before_commit() -> BeforeCommit | None:
    """Return what a unit of work that is opened here asks before its commits, as the one around it does.

    A unit that `before_commit` itself opens has none: otherwise, the hook would call itself for ever.
    """
    unit = current_unit.get(None)
    return None if unit is None or is_in_before_commit() else unit.before_commit
