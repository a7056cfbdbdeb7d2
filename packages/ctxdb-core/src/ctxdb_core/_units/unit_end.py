"""`UnitEnd`: how the transactions of a unit of work end together, and the unit with them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import AsyncExitStack

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import SeenThrough, run_to_completion
from ctxdb_core._sqlalchemy.cursors import has_open_cursor
from ctxdb_core._sqlalchemy.door import Refuse
from ctxdb_core._sqlalchemy.doors import interrupt_call, is_busy, wait_for_calls
from ctxdb_core._sqlalchemy.guarded_session import door_of
from ctxdb_core._sqlalchemy.private import forget_block
from ctxdb_core._units import session_end
from ctxdb_core._units.callbacks import Callbacks, Outcome
from ctxdb_core._units.commit import BeforeCommit, Sessions, commit_in_order, is_in_before_commit, prepare, roll_back
from ctxdb_core._units.open_results import has_only_read, is_kept_for_cursor
from ctxdb_core._units.registration import NO_WATCHERS
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.unit_hooks import UnitHooks
from ctxdb_core._units.unit_sessions import NO_SESSIONS_ANY_MORE, UnitSessions
from ctxdb_core._units.watcher import report_failure
from ctxdb_core.errors import ContextClosedError

__all__ = ["UnitEnd"]


class UnitEnd(UnitSessions):
    """The part of a unit of work that ends its transactions, gives back its connections, and ends the unit.

    Transactions can end more than once: for a response when it starts, and again for what was done while it was sent.
    After `finish`, there are no sessions any more.
    """

    # What a base class declares is declared again where it is set: type checkers would infer another type from that.
    sessions: dict[DBConnect, AsyncSession]

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
        hooks = self.hooks
        if (
            len(self.sessions) != 1
            or dbs is not None
            or self.settings.before_commit is not None
            or (hooks is not None and (hooks.callbacks is not None or hooks.rollback_only))
        ):
            await self._commit_with_hooks(dbs, ends_body=ends_body)
            return
        # The common case, without what several sessions, hooks and callbacks need.
        (session,) = self.sessions.values()
        if not in_transaction(session):
            return
        try:
            if is_busy(session):
                await wait_for_calls((session,))
            if has_open_cursor(session) and await is_kept_for_cursor(session, ends_body=ends_body):
                return
        except BaseException as exc:
            await self.roll_back(exc, None)
            raise
        try:
            await run_to_completion(session_end.commit(session))
        except BaseException as exc:
            await self._roll_back_unless_committed(exc, None)
            raise
        forget_block(session.sync_session)

    async def _commit_with_hooks(self, dbs: Collection[DBConnect] | None, *, ends_body: bool) -> None:
        """Commit as `commit` does, on several databases, or with what the code has asked of the end of transactions."""
        undone: list[DBConnect] = []
        try:
            if self.hooks is not None and self.hooks.rollback_only:
                undone += await self._roll_back_marked(self.hooks, dbs)
            await prepare(self.sessions, dbs, self._hook(), undone)
            if dbs is None and self.hooks is not None and self.hooks.rollback_only:
                # `before_commit`, or a listener of a flush, has called `set_rollback_only`.
                undone += await self._roll_back_marked(self.hooks, None)
            sessions = self.sessions if dbs is not None else await self._without_kept(ends_body=ends_body)
            if undone:
                sessions = {db: session for db, session in sessions.items() if db not in undone}
        except BaseException as exc:
            await self.roll_back(exc, dbs)
            if isinstance(exc.__cause__, SeenThrough):
                # What was seen through is a commit that `before_commit` has made elsewhere.
                raise asyncio.CancelledError(*exc.args) from exc
            raise
        try:
            await run_to_completion(self._commit(sessions, dbs))
        except BaseException as exc:
            await self._roll_back_unless_committed(exc, dbs)
            raise
        self._leave_blocks(dbs)
        await self._wait_for_callbacks()

    async def _roll_back_unless_committed(self, error: BaseException, dbs: Collection[DBConnect] | None) -> None:
        """Roll back for the `error` of commits, unless that is a cancellation, and the commits were seen through.

        Then a transaction that is open is another one, which other tasks have begun behind the commits.
        """
        if isinstance(error.__cause__, SeenThrough):
            self._leave_blocks(dbs)
            await self._wait_for_callbacks()
        else:
            await self.roll_back(error, dbs)

    async def _roll_back_marked(self, hooks: UnitHooks, dbs: Collection[DBConnect] | None) -> list[DBConnect]:
        """Roll back what `set_rollback_only` has named out of `dbs`; return where that was done."""
        if dbs is None and None in hooks.rollback_only:
            marked = list(self.sessions)
            await self.roll_back(None, None)
            return marked
        marked = hooks.marked(dbs)
        await self.roll_back(None, marked)
        hooks.forget_marks(None if dbs is None else marked)
        return marked

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

        The calls of other tasks that are under way may end first. But where everything is rolled back because of a
        cancellation, or this is cancelled while it waits for them, they are stopped: their work is undone anyway.

        Args:
            error: what made it necessary; if rolling back fails, too, that is attached to it, and else logged.
            dbs: where to roll back; everywhere by default.

        Raises:
            asyncio.CancelledError: the task was cancelled meanwhile; its cause is `error`, if there is one.
        """
        try:
            await self._roll_back_open(error, dbs)
        except asyncio.CancelledError as exc:
            if error is not None and isinstance(exc.__cause__, SeenThrough):
                # Only the roll-back was seen through. A response must not take that for its commit.
                raise exc from error
            raise

    async def _roll_back_open(self, error: BaseException | None, dbs: Collection[DBConnect] | None) -> None:
        if dbs is not None or not any(map(is_busy, self.sessions.values())):
            await run_to_completion(self._roll_back(self.sessions, error, dbs))
        elif isinstance(error, asyncio.CancelledError):
            await run_to_completion(self._stop_calls_and_roll_back(error))
        else:
            try:
                await wait_for_calls(self.sessions.values())
            except asyncio.CancelledError as exc:
                await self.roll_back(exc)
                raise
            await run_to_completion(self._roll_back(self.sessions, error, None))
        if dbs is None and self.hooks is not None:
            # `set_rollback_only` was about what was open. What a streamed body does next, for instance, is committed.
            self.hooks.forget_marks(None)
        self._leave_blocks(dbs)
        await self._wait_for_callbacks()

    async def _stop_calls_and_roll_back(self, error: asyncio.CancelledError) -> None:
        """Roll back everywhere, and stop the calls of other tasks that are under way.

        The unit ends with that if a call does not: it may be in a COMMIT, which is seen through, or in a driver that
        does not return.
        """
        sessions = list(self.sessions.values())
        for session in sessions:
            interrupt_call(session, session_end.because_of(error, session_end.refuse_after_roll_back))
        latest = asyncio.get_running_loop().time() + session_end.INTERRUPTION_SECONDS
        async with AsyncExitStack() as turns:
            try:
                async with asyncio.timeout_at(latest):
                    for session in sessions:
                        if (door := door_of(session)) is not None:
                            # A task that waits for its turn goes on in a transaction of its own.
                            await turns.enter_async_context(door.turn_ahead())
            except TimeoutError:
                pass
            else:
                await self._roll_back(self.sessions, error, None)
                return
        await self._finish(commit=False, error=error, latest=latest)

    def _leave_blocks(self, dbs: Collection[DBConnect] | None) -> None:
        if dbs is None:
            # A response may start while a dependency is inside of `async with session.begin():`, for instance.
            # SQLAlchemy would refuse further statements in that block, now that its transaction has ended.
            for session in self.sessions.values():
                forget_block(session.sync_session)

    # --- closing sessions, and ending the unit ------------------------------------------------------------------------

    async def close_session(self, db: DBConnect, refuse: Refuse = session_end.refuse_after_close) -> None:
        """Close the session on `db`, if there is one, without a commit: its connection goes back to the pool.

        Further use of the session gets the error of `refuse`.
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
            BaseException: as `commit` does; every session is closed all the same. The commit of what other tasks of the
                unit do behind that one is not told of, but logged if it fails.
        """
        if self.registration is None and self.finish_idle():
            return
        if commit:
            try:
                # Behind its end, nothing reads a result of the unit on.
                await self.commit(ends_body=True)
            except BaseException as exc:
                await run_to_completion(self._finish(commit=False, error=exc))
                await self._wait_for_callbacks()
                raise
            if not self.finish_idle():
                await self._finish_behind_commit()
            return
        try:
            await run_to_completion(self._finish(commit=False, error=error))
        finally:
            await self._wait_for_callbacks()

    async def _finish_behind_commit(self) -> None:
        """End the unit, on whose sessions other tasks have begun new transactions since its commit has succeeded.

        These are committed, too. If that fails, the error is logged: raised, it would make the commit that stands look
        like one that has failed.
        """
        try:
            await prepare(self.sessions, None, self._hook())
            await run_to_completion(self._finish(commit=True, error=None))
        except BaseException as exc:
            # If it was the commit that has failed, the unit has ended with it.
            await run_to_completion(self._finish(commit=False, error=exc))
            if not isinstance(exc, Exception):
                raise
            session_end.report(exc, None, "what its other tasks had done since its commit was not committed")
        finally:
            await self._wait_for_callbacks()

    async def _finish(self, *, commit: bool, error: BaseException | None, latest: float | None = None) -> None:
        """Do what `finish` does, without a step between the end of the transactions and that of the unit.

        The calls that a roll-back stops may end until `latest`, on the event loop's clock.
        """
        sessions, self.sessions = self.sessions, NO_SESSIONS_ANY_MORE
        refuse = session_end.refuse_after_unit
        closing = () if self.registration is None else self.registration.closing
        if not commit:
            # All are stopped at once, and have the same time to end: a cancelled task has `GRACE_SECONDS` for all this.
            for session in (*sessions.values(), *closing):
                session_end.interrupt(session, refuse, error)
            if latest is None:
                latest = asyncio.get_running_loop().time() + session_end.INTERRUPTION_SECONDS
        # The turns of all sessions are kept to the end: no call of another task comes between a commit and the end.
        async with AsyncExitStack() as turns:
            for db, session in list(sessions.items()):
                if not await turns.enter_async_context(session_end.last_turn(session, refuse, latest=latest)):
                    del sessions[db]
            for session in closing:
                if await turns.enter_async_context(session_end.last_turn(session, refuse, latest=latest)):
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

    # --- what both go through -----------------------------------------------------------------------------------------

    @property
    def callbacks(self) -> Callbacks | None:
        """The callbacks of `on_commit` and `on_rollback`; ``None`` as long as there were none."""
        return None if self.hooks is None else self.hooks.callbacks

    async def _commit(self, sessions: Sessions, dbs: Collection[DBConnect] | None) -> None:
        self._hold_callbacks()
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
        self._hold_callbacks()
        try:
            await roll_back(sessions, dbs, error)
        finally:
            self._settle(dbs, Outcome.ROLLED_BACK)

    def _hold_callbacks(self) -> None:
        if self.callbacks is not None:
            self.callbacks.is_held = True

    def _settle(self, dbs: Collection[DBConnect] | None, outcome: Outcome) -> None:
        if self.callbacks is not None:
            self.callbacks.is_held = False
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
