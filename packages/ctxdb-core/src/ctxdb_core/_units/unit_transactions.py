"""`UnitTransactions`: how the transactions of a unit of work end together, and the unit with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.cursors import has_open_cursor
from ctxdb_core._sqlalchemy.door import Refuse
from ctxdb_core._sqlalchemy.doors import is_busy, wait_for_calls
from ctxdb_core._units import session_end
from ctxdb_core._units.callbacks import Callback, Callbacks, Outcome
from ctxdb_core._units.commit import BeforeCommit, Sessions, commit_in_order, is_in_before_commit, prepare, roll_back
from ctxdb_core._units.open_results import has_only_read, is_kept_for_cursor
from ctxdb_core._units.registration import NO_WATCHERS
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.unit_hooks import BeginHook, UnitHooks
from ctxdb_core._units.unit_sessions import NO_SESSIONS_ANY_MORE, UnitSessions
from ctxdb_core._units.watcher import UnitWatcher, report_failure
from ctxdb_core.errors import ContextClosedError, TransactionRequiredError

__all__ = ["UnitTransactions"]


class UnitTransactions(UnitSessions):
    """The part of a unit of work that ends its transactions, with what the code has asked of their begin and end.

    Transactions can end more than once: for a response when it starts, and again for what was done while it was sent.
    After `finish`, there are no sessions any more.
    """

    # What a base class declares is declared again where it is set: type checkers would infer another type from that.
    sessions: dict[DBConnect, AsyncSession]
    hooks: UnitHooks | None

    @property
    def watchers(self) -> Mapping[object, UnitWatcher]:
        """What is told of the response and of the end of the unit, by the objects that have set it up: see `watch`."""
        return NO_WATCHERS if self.registration is None else self.registration.watchers

    def watch(self, watcher: UnitWatcher, owner: object = None) -> None:
        """Tell `watcher` of the start of the response and of the end of the unit, which are still to come.

        Args:
            watcher: what is told.
            owner: the object that watches many units. It finds its watcher of this unit in `watchers`.
        """
        registration = self._registered()
        key = object() if owner is None else owner
        # Most units have one watcher, if any: their mapping is made at once.
        registration.watchers = {**registration.watchers, key: watcher} if registration.watchers else {key: watcher}

    # --- what the code asks of its transactions -----------------------------------------------------------------------

    @property
    def callbacks(self) -> Callbacks | None:
        """The callbacks of `on_commit` and `on_rollback`; ``None`` as long as there were none."""
        return None if self.hooks is None else self.hooks.callbacks

    def on_outcome(self, db: DBConnect, outcome: Outcome, callback: Callback) -> None:
        """Run `callback` once the work that is open on `db`, or comes next, has the `outcome`; forget it otherwise.

        The roll-back of a savepoint counts for what was registered since that savepoint.
        """
        self.check_usable()
        self._hooks().add_callback(db, self.sessions.get(db), outcome, callback, self._run_in_unit)

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
        self._hooks().add_begin_hook(db, self.sessions.get(db), hook)

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
        self._hooks().mark_rollback_only(db, self.sessions)

    def check_may_commit(self, db: DBConnect) -> None:
        """Raise an error if what is open on `db` is to be rolled back.

        Raises:
            UnexpectedRollbackError: it is, as `set_rollback_only` was called.
        """
        if self.hooks is not None:
            self.hooks.check_may_commit(db)

    # --- the blocks that share its transactions -----------------------------------------------------------------------

    @property
    def is_block(self) -> bool:
        """Whether the unit is one block of the user's, which is committed or undone as a whole."""
        return self.hooks is not None and self.hooks.is_block

    def note_is_block(self) -> None:
        """Note that the unit is one block of the user's, which is committed or undone as a whole."""
        self._hooks().is_block = True

    @property
    def blocks(self) -> tuple[object, ...]:
        """The open blocks that share the unit's transactions (see `UnitHooks`)."""
        return () if self.hooks is None else self.hooks.blocks

    def join(self, block: object) -> None:
        """Note that `block` is open, and shares the unit's transactions."""
        hooks = self._hooks()
        hooks.blocks = (*hooks.blocks, block)

    def part_with(self, block: object) -> None:
        """Note that `block` is over."""
        hooks = self._hooks()
        hooks.blocks = tuple(each for each in hooks.blocks if each is not block)

    def _hooks(self) -> UnitHooks:
        if self.hooks is None:
            self.hooks = UnitHooks()
        return self.hooks

    async def _run_in_unit(self, fn: Callable[[], Awaitable[None]]) -> None:
        """Await `fn` in a unit of work of its own, with the same `before_commit`: what a callback runs in."""
        raise NotImplementedError

    # --- ending transactions ------------------------------------------------------------------------------------------

    async def commit(self, dbs: Collection[DBConnect] | None = None, *, ends_body: bool = False) -> None:
        """Commit the open transactions in the order in which their sessions were opened; the unit stays usable.

        Without `dbs`, a transaction that has only read stays open for a result that has not been read to its end.

        Args:
            dbs: where to commit; everywhere by default.
            ends_body: whether the body of the response has been made, or the unit ends: nothing will read such a result
                on.

        Raises:
            OpenCursorError: a result is to be read on in a transaction that has written. All is rolled back.
            BaseException: the first error of `before_commit` or of a commit. What was to be committed and was not is
                rolled back, and the error names what was.
        """
        try:
            hooks = self.hooks
            if hooks is not None and hooks.rollback_only:
                dbs = await self._roll_back_marked(hooks, dbs)
            if (
                len(self.sessions) == 1
                and dbs is None
                and self.settings.before_commit is None
                and (hooks is None or hooks.callbacks is None)
            ):
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

    async def _roll_back_marked(
        self, hooks: UnitHooks, dbs: Collection[DBConnect] | None
    ) -> Collection[DBConnect] | None:
        """Roll back what `set_rollback_only` has named out of `dbs`; return where there may be something to commit."""
        if dbs is None and None in hooks.rollback_only:
            await self.roll_back(None, None)
            return []
        named = hooks.marked(dbs)
        await self.roll_back(None, named)
        hooks.forget_marks(None if dbs is None else named)
        return [db for db in (self.sessions if dbs is None else dbs) if db not in named]

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
        hooks = self.hooks
        if hooks is not None and (hooks.blocks or hooks.callbacks or hooks.rollback_only):
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
        if dbs is None and self.hooks is not None:
            # `set_rollback_only` was about what was open. What a streamed body does next, for instance, is committed.
            self.hooks.forget_marks(None)
        self._leave_blocks(dbs)
        await self._wait_for_callbacks()

    def _leave_blocks(self, dbs: Collection[DBConnect] | None) -> None:
        if dbs is None:
            # A response may start while a dependency is inside of `async with session.begin():`, for instance.
            # SQLAlchemy would refuse further statements in that block, now that its transaction has ended.
            for session in self.sessions.values():
                session_end.leave_blocks(session)

    async def close_session(self, db: DBConnect, refuse: Refuse = session_end.refuse_after_close) -> None:
        """Close the session on `db`, if there is one, without a commit: its connection goes back to the pool.

        Args:
            db: where.
            refuse: raises the error that further use of the session gets.
        """
        self.check_usable()
        session = self.sessions.pop(db) if db in self.sessions else None
        if self.callbacks is not None:
            self.callbacks.settle([db], Outcome.ROLLED_BACK)
        registration = self.registration
        if session is not None and registration is not None:
            registration.closing = (*registration.closing, session)
            try:
                await run_to_completion(session_end.end(session, None, db, refuse))
            except ContextClosedError:
                # The unit of work has ended meanwhile, and has closed the session.
                if not self.closed:
                    raise
            # After an error, the session stays in `closing`, and the end of the unit tries again.
            registration.closing = tuple(each for each in registration.closing if each is not session)

    def finish_idle(self) -> bool:
        """End the unit without waiting for anything, if nothing is left to do; return whether it was ended so."""
        if self.hooks is not None and self.hooks.callbacks:
            return False
        registration = self.registration
        if registration is None:
            # The unit has never had a session or a watcher.
            self.sessions = NO_SESSIONS_ANY_MORE
            return True
        if registration.closing:
            return False
        for session in self.sessions.values():
            if not session_end.ends_without_io(session):
                return False
        sessions, self.sessions = self.sessions, NO_SESSIONS_ANY_MORE
        for session in sessions.values():
            session_end.end_at_once(session, session_end.refuse_after_unit)
        self._note_end(None)
        return True

    def hand_over_sessions(self) -> None:
        """End the unit and leave its sessions, as they are, to the code that has them."""
        self.sessions = NO_SESSIONS_ANY_MORE
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
                # Behind its end, nothing reads a result of the unit on.
                await self.commit(ends_body=True)
                if self.finish_idle():
                    return
                # A call of another task has come in between, and begun a transaction.
                await prepare(self.sessions, None, self._hook())
            except BaseException as exc:
                await run_to_completion(self._finish(commit=False, error=exc))
                await self._wait_for_callbacks()
                raise
        try:
            await run_to_completion(self._finish(commit=commit, error=error))
        finally:
            await self._wait_for_callbacks()

    async def _finish(self, *, commit: bool, error: BaseException | None) -> None:
        sessions, self.sessions = self.sessions, NO_SESSIONS_ANY_MORE
        # The turns of all sessions are kept to the end: no call of another task comes between a commit and the end.
        async with AsyncExitStack() as turns:
            for db, session in list(sessions.items()):
                last_turn = session_end.last_turn(
                    session, session_end.refuse_after_unit, interrupt=not commit, error=error
                )
                if not await turns.enter_async_context(last_turn):
                    del sessions[db]
            for session in () if self.registration is None else self.registration.closing:
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
        # A commit with nothing to commit has succeeded as well.
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

    def _hook(self) -> BeforeCommit | None:
        # In autocommit, each statement has been committed by itself: `before_commit` could add nothing to it. And what
        # `before_commit` itself commits is not prepared by another call of it.
        return None if self.autocommit or is_in_before_commit(self.sessions) else self.settings.before_commit

    def _note_end(self, error: BaseException | None) -> None:
        registration = self.registration
        if registration is None:
            return
        registration.end()
        watchers, registration.watchers = registration.watchers, NO_WATCHERS
        for watcher in watchers.values():
            try:
                watcher.unit_ends(error)
            except (Exception, asyncio.CancelledError):  # noqa: BLE001 - it is logged, and changes nothing
                report_failure(watcher)
