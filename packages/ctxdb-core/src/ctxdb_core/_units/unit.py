"""`UnitOfWork`: the sessions of one request, job or message, and how they end together."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar, Token
from threading import get_ident
from typing import NoReturn, TypeAlias

from sqlalchemy import event
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.connection_context import hide_from_connections
from ctxdb_core._sqlalchemy.gate import StatementGate, StatementObserver, close_gates, open_gates, wait_for_statements
from ctxdb_core._transactions.rollback_only import refuse_if_rollback_only
from ctxdb_core._transactions.statement_timeout import StatementTimeout, limit_open_transaction, limit_statements
from ctxdb_core._units import ending as session_end
from ctxdb_core._units.abandonment import HandlerCalls
from ctxdb_core._units.callbacks import WaitingCallback, drop_undone, hand_up
from ctxdb_core._units.ending import in_transaction
from ctxdb_core._units.leak import LeakGuard
from ctxdb_core.errors import ContextClosedError, ContextNotInitiatedError

__all__ = ["BeforeCommit", "CreateSession", "OnCommit", "UnitOfWork", "current_unit", "inherited_before_commit"]

logger = logging.getLogger("ctxdb")

BeforeCommit: TypeAlias = Callable[[AsyncSession], Awaitable[object]]
"""Awaited with each session that is about to be committed; an error of it rolls the unit of work back."""

OnCommit: TypeAlias = Callable[[], object]
"""Called after a commit; what it returns is awaited if it can be."""

current_unit: ContextVar[UnitOfWork] = ContextVar("ctxdb_unit_of_work")
"""The unit of work of the running code. Tasks inherit it: whoever reads it must expect it to have been closed."""

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

    calls: HandlerCalls | None = None
    """The calls of handlers, where a middleware may give up on one of them (see `follow_calls`)."""
    statement_timeout: StatementTimeout | None = None
    callbacks: dict[DBConnect, list[WaitingCallback]] | None = None
    due: Sequence[OnCommit] = ()
    """Callbacks whose commit has succeeded."""
    running_callbacks: asyncio.Task[None] | None = None
    leak_guard: LeakGuard | None = None
    token: Token[UnitOfWork]

    def __init__(self, before_commit: BeforeCommit | None = None) -> None:
        self.sessions: dict[DBConnect, AsyncSession] = {}
        self.before_commit = before_commit
        self.thread = get_ident()

    @classmethod
    def ended(cls) -> UnitOfWork:
        """Return a unit that has ended already: it hides one that was inherited."""
        unit = cls()
        unit.sessions = _CLOSED
        return unit

    def enter(self) -> None:
        """Make this the current unit of work of the running context."""
        self.token = current_unit.set(self)

    def leave(self) -> None:
        """Make the unit current again that was so before `enter`."""
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
            create: makes the session, if not `db` itself.

        Raises:
            ContextClosedError: the unit of work has ended.
            ContextNotInitiatedError: it belongs to another thread's event loop.
        """
        self.check_usable()
        if db in self.sessions:
            return self.sessions[db]
        session = await (create or db.create_session)()
        if self.sessions is _CLOSED or db in self.sessions:
            # Meanwhile, the unit has ended, or another of its tasks has made the session.
            await session_end.close(session, None, db)
            return await self.open_session(db)
        return self.adopt_session(db, session)

    def create_session_at_once(self, db: DBConnect, create: Callable[[], AsyncSession | None]) -> AsyncSession | None:
        """Return a new session on `db`, to be adopted; ``None`` if making one takes an ``await``.

        Args:
            db: where.
            create: makes it, if this unit does not know better.
        """
        return create()

    def adopt_session(self, db: DBConnect, session: AsyncSession) -> AsyncSession:
        """Take `session`, which is new, as the one on `db`; return the one that is there instead, if one is.

        Raises:
            ContextClosedError, ContextNotInitiatedError: as `open_session`.
        """
        self.check_usable()
        if db in self.sessions:
            return self.sessions[db]
        if self.leak_guard is None:
            self.leak_guard = LeakGuard(self.sessions)
        self.prepare_session(session)
        self.sessions[db] = session
        if self.callbacks and db in self.callbacks:
            self._watch(db, session)
        return session

    def prepare_session(self, session: AsyncSession) -> None:
        """Make a new session one of this unit."""
        StatementGate(session, self.statement_observer())
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

    def check_usable(self) -> None:
        """Raise the error that says why the running code cannot use this unit, if it cannot."""
        if self.sessions is _CLOSED:
            raise ContextClosedError
        if self.thread != get_ident():
            if self.shared:
                raise ContextNotInitiatedError(
                    "The unit of work found here is a test's, on another thread's event loop, and its connection "
                    "serves that loop alone. For an application that runs on a thread of its own, let the test use "
                    "`ctxdb_core.testing.shared_transaction`, which serves every loop."
                )
            raise ContextNotInitiatedError(
                "The unit of work found here belongs to another thread's event loop, and a connection serves the loop "
                "that opened it. Wrap the code that runs in this thread in `async with new_db_ctx():`, or run it on "
                "the first loop (`anyio.from_thread.run`)."
            )

    def on_commit(self, db: DBConnect, callback: OnCommit) -> None:
        """Run `callback` once the next commit on `db` has succeeded; forget it if there is a roll-back instead.

        The roll-back of a savepoint counts for what was registered since that savepoint.
        """
        self.check_usable()
        if self.callbacks is None:
            self.callbacks = {}
        savepoint = None
        if db in self.sessions:
            session = self.sessions[db]
            savepoint = session.sync_session.get_nested_transaction()
            self._watch(db, session)
        self.callbacks.setdefault(db, []).append(WaitingCallback(callback, savepoint))

    async def commit(self, dbs: Collection[DBConnect] | None = None) -> None:
        """Commit the open transactions in the order in which their sessions were opened; the unit stays usable.

        Args:
            dbs: where to commit; everywhere by default.

        Raises:
            BaseException: the first error of `before_commit` or of a commit. What was to be committed and was not is
                rolled back, and the error names what was.
        """
        try:
            if (
                len(self.sessions) == 1
                and self.before_commit is None
                and dbs is None
                and not (self.callbacks or self.due)
            ):
                # The common case, without what several sessions, hooks and callbacks need.
                (session,) = self.sessions.values()
                if in_transaction(session):
                    await wait_for_statements((session,))
                    await run_to_completion(_commit_alone(session))
                    session_end.leave_blocks(session)
            else:
                await self._prepare(dbs)
                await run_to_completion(self._commit(self.sessions, dbs))
                if dbs is None:
                    self._leave_blocks()
                await self._wait_for_callbacks()
        except BaseException as exc:
            await self.roll_back(exc, dbs)
            raise

    async def roll_back(self, error: BaseException | None = None, dbs: Collection[DBConnect] | None = None) -> None:
        """Roll back the open transactions; the unit stays usable.

        Args:
            error: what made it necessary; if rolling back fails, too, that is attached to it, and else logged.
            dbs: where to roll back; everywhere by default.
        """
        await run_to_completion(self._roll_back(self.sessions, error, dbs))
        if dbs is None:
            self._leave_blocks()
        await self._wait_for_callbacks()

    def _leave_blocks(self) -> None:
        # The response starts inside of a dependency's block, for instance, and a background task works on in it.
        for session in self.sessions.values():
            session_end.leave_blocks(session)

    async def close_session(
        self, db: DBConnect, refuse: Callable[..., NoReturn] = session_end.refuse_after_close
    ) -> None:
        """Close the session on `db`, if there is one, without a commit: its connection goes back to the pool.

        Args:
            db: where.
            refuse: raises the error that further use of the session gets.
        """
        self.check_usable()
        session = self.sessions.pop(db, None)
        self._take_callbacks([db])
        if session is not None:
            session_end.refuse_further_use(session, refuse)
            await run_to_completion(session_end.close(session, None, db))

    def finish_idle(self) -> bool:
        """End the unit without waiting for anything, if nothing is left to do; return whether it was ended so."""
        if self.callbacks or self.due:
            return False
        if not self.sessions:
            self.sessions = _CLOSED
            return True
        for session in self.sessions.values():
            if not session_end.closes_without_io(session):
                return False
        sessions, self.sessions = self.sessions, _CLOSED
        for session in sessions.values():
            session.sync_session.close()
            session_end.refuse_further_use(session, session_end.refuse_after_unit)
        if self.leak_guard is not None:
            self.leak_guard.disarm()
        return True

    def hand_over_sessions(self) -> None:
        """End the unit and leave its sessions, as they are, to whoever has them."""
        self.sessions = _CLOSED
        if self.leak_guard is not None:
            self.leak_guard.disarm()

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
                await self._prepare(None)
            except BaseException as exc:
                await run_to_completion(self._finish(commit=False, error=exc))
                raise
        try:
            await run_to_completion(self._finish(commit=commit, error=error))
        finally:
            await self._wait_for_callbacks()

    async def _finish(self, *, commit: bool, error: BaseException | None) -> None:
        sessions, self.sessions = self.sessions, _CLOSED
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
                session_end.refuse_further_use(session, session_end.refuse_after_unit)
                await session_end.close(session, error, db)
            if self.leak_guard is not None:
                self.leak_guard.disarm()

    async def _prepare(self, dbs: Collection[DBConnect] | None) -> None:
        """Do all that may take its time, fail or be cancelled while nothing has been committed yet."""
        await wait_for_statements(self.sessions.values())
        if self.before_commit is None and len(self.sessions) < 2:
            return
        prepared: set[DBConnect] = set()
        # The hook may open sessions of its own, or write on others.
        while pending := [
            db for db in _affected(self.sessions, dbs) if db not in prepared and in_transaction(self.sessions[db])
        ]:
            for db in pending:
                prepared.add(db)
                session = self.sessions[db]
                if self.before_commit is not None and not self.autocommit:
                    token = _in_before_commit.set(True)
                    try:
                        await self.before_commit(session)
                    finally:
                        _in_before_commit.reset(token)
                if len(self.sessions) > 1:
                    # What can be refused at once is refused before the first commit.
                    refuse_if_rollback_only(session.sync_session)
                    await session.flush()

    async def _commit(self, sessions: Mapping[DBConnect, AsyncSession], dbs: Collection[DBConnect] | None) -> None:
        committed: list[DBConnect] = []
        token = close_gates(sessions.values())
        try:
            for db in _affected(sessions, dbs):
                session = sessions[db]
                if not in_transaction(session):
                    continue
                try:
                    await session.commit()
                except BaseException as exc:
                    _name_committed(exc, db, committed)
                    await self._roll_back(sessions, exc, dbs)
                    raise
                committed.append(db)
            if self.callbacks:
                # Where there was nothing to commit, the commit has succeeded as well.
                self.due = [*self.due, *self._take_callbacks(dbs)]
        finally:
            open_gates(sessions.values(), token)
            self._start_callbacks()

    async def _roll_back(
        self,
        sessions: Mapping[DBConnect, AsyncSession],
        error: BaseException | None,
        dbs: Collection[DBConnect] | None,
    ) -> None:
        self._take_callbacks(dbs)
        token = close_gates(sessions.values())
        try:
            for db in _affected(sessions, dbs):
                await session_end.roll_back(sessions[db], error, db)
        finally:
            open_gates(sessions.values(), token)
            # Of what was committed before.
            self._start_callbacks()

    def _watch(self, db: DBConnect, session: AsyncSession) -> None:
        """Follow the transactions of `session`, as the user may end them without asking the unit of work."""
        sync_session = session.sync_session
        if _WATCHED in sync_session.info:
            return
        sync_session.info[_WATCHED] = True

        @event.listens_for(sync_session, "after_commit")
        def committed(session: Session) -> None:
            savepoint = session.get_nested_transaction()
            if savepoint is None:
                self.due = [*self.due, *self._take_callbacks([db])]
            elif self.callbacks:
                hand_up(self.callbacks.get(db, []), savepoint)

        @event.listens_for(sync_session, "after_transaction_end")
        def ended(session: Session, transaction: SessionTransaction) -> None:
            if transaction.parent is None:
                self._take_callbacks([db])
            elif transaction.nested and self.callbacks:
                drop_undone(self.callbacks.get(db, []), transaction)

    def _start_callbacks(self) -> None:
        if self.due:
            # In a task, as the callbacks are the user's code: they get a context of their own, and whoever is cancelled
            # while they run need not wait for them.
            due, self.due = self.due, ()
            self.running_callbacks = asyncio.create_task(_run_callbacks(due, self.before_commit))
            _running_callbacks.add(self.running_callbacks)
            self.running_callbacks.add_done_callback(_running_callbacks.discard)

    async def _wait_for_callbacks(self) -> None:
        running, self.running_callbacks = self.running_callbacks, None
        if running is not None:
            await asyncio.shield(running)

    def _take_callbacks(self, dbs: Collection[DBConnect] | None) -> list[OnCommit]:
        if self.callbacks is None:
            return []
        taken = [self.callbacks.pop(db, []) for db in (list(self.callbacks) if dbs is None else dbs)]
        return [waiting.callback for callbacks in taken for waiting in callbacks]


hide_from_connections(current_unit, UnitOfWork.ended())

_in_before_commit: ContextVar[bool] = ContextVar("ctxdb_in_before_commit", default=False)


def inherited_before_commit() -> BeforeCommit | None:
    """Return what a unit of work that is opened here asks before its commits, as the one around it does.

    One that `before_commit` itself opens asks nothing: it would never come to an end.
    """
    unit = current_unit.get(None)
    return None if unit is None or _in_before_commit.get() else unit.before_commit


async def _commit_alone(session: AsyncSession) -> None:
    token = close_gates((session,))
    try:
        await session.commit()
    finally:
        open_gates((session,), token)


def _affected(sessions: Mapping[DBConnect, AsyncSession], dbs: Collection[DBConnect] | None) -> list[DBConnect]:
    return list(sessions) if dbs is None else [db for db in dbs if db in sessions]


_WATCHED = "ctxdb.watched"

_running_callbacks: set[asyncio.Task[None]] = set()


async def _run_callbacks(callbacks: Sequence[OnCommit], before_commit: BeforeCommit | None) -> None:
    """Run each callback in a unit of work of its own. The commit stands whatever becomes of them: errors are logged."""
    for callback in callbacks:
        unit = UnitOfWork(before_commit)
        unit.enter()
        try:
            try:
                result = callback()
                if inspect.isawaitable(result):
                    await result
            except BaseException as exc:
                await unit.finish(commit=False, error=exc)
                raise
            await unit.finish(commit=True)
        except (Exception, asyncio.CancelledError):
            # Also of a cancelled task that the callback waited for; this task itself nobody cancels.
            logger.exception("The on_commit callback %r failed; the commit that it was waiting for stands", callback)


def _name_committed(error: BaseException, failed: DBConnect, committed: list[DBConnect]) -> None:
    if not committed:
        return
    names = ", ".join(map(repr, committed))
    message = f"ctxdb: the commit on {failed!r} failed after the one on {names} had succeeded; the rest was rolled back"
    error.add_note(message)
    if isinstance(error, StatementError):
        # SQLAlchemy's own errors show this in their text, too.
        error.add_detail(message)
