"""`Callbacks`: what the user wants to be called when a transaction of a unit of work has ended.

A callback waits for an outcome: the commit of the work that is open when it is registered, or the roll-back of that
work. It goes with the innermost savepoint that is open then: where the savepoint is rolled back, so is the work that
the callback is about. A unit of work without callbacks has none of this.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from asyncio import _get_running_loop  # for implementers of event loops, and what costs the least
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import SeenThrough
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.traced_session import Ending

__all__ = ["Callback", "Callbacks", "OnCommit", "Outcome", "RunInUnit", "WaitingCallback"]

logger = logging.getLogger("ctxdb")

Callback: TypeAlias = Callable[[], object]
"""Called after the end of a transaction; what it returns is awaited if it can be."""

OnCommit: TypeAlias = Callback
"""A callback that waits for a commit."""

RunInUnit: TypeAlias = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
"""Awaits a function in a unit of work of its own."""


class Outcome(Enum):
    """What becomes of the work of a transaction."""

    COMMITTED = auto()
    ROLLED_BACK = auto()
    UNKNOWN = auto()
    """The answer to COMMIT was lost: no callback waits for that."""


@dataclass(slots=True)
class WaitingCallback:
    """A callback, the outcome that it waits for, and the innermost savepoint that was open when it was registered."""

    callback: Callback
    outcome: Outcome
    savepoint: SessionTransaction | None


class Callbacks:
    """The callbacks of one unit of work."""

    __slots__ = ("_due", "_run_in_unit", "_running", "_waiting", "is_held")

    def __init__(self, run_in_unit: RunInUnit) -> None:
        self._run_in_unit = run_in_unit
        self._waiting: dict[DBConnect, list[WaitingCallback]] = {}
        self._due: list[WaitingCallback] = []
        """The callbacks whose outcome has come, and which have not been started."""
        self._running: asyncio.Task[None] | None = None
        self.is_held: bool = False
        """Whether the unit of work is ending transactions: it starts the callbacks behind all of them."""

    def __bool__(self) -> bool:
        """Whether a callback waits, is due, or runs."""
        return bool(self._due) or any(self._waiting.values()) or not (self._running is None or self._running.done())

    def add(self, db: DBConnect, session: AsyncSession | None, outcome: Outcome, callback: Callback) -> None:
        """Let `callback` wait for the `outcome` of the work that is open on `db`, or that comes next.

        Args:
            db: where.
            session: the unit's session there, if it has one already; else `watch_new` it when it has.
            outcome: what to wait for.
            callback: called once.
        """
        savepoint = None
        if session is not None:
            savepoint = session.sync_session.get_nested_transaction()
            self.watch(db, session)
        self._waiting.setdefault(db, []).append(WaitingCallback(callback, outcome, savepoint))

    def watch_new(self, db: DBConnect, session: AsyncSession) -> None:
        """Follow the transactions of a new session on `db`, if a callback waits for them."""
        if db in self._waiting:
            self.watch(db, session)

    def watch(self, db: DBConnect, session: AsyncSession) -> None:
        """Follow the transactions of `session`, as the user may end them without asking the unit of work."""
        sync_session = session.sync_session
        if _WATCHED in sync_session.info:
            return
        sync_session.info[_WATCHED] = True

        @event.listens_for(sync_session, "after_commit")
        def committed(session: Session) -> None:
            savepoint = session.get_nested_transaction()
            if savepoint is None:
                self._settle_by_code(db, Outcome.COMMITTED)
            else:
                _move_to_outer_savepoint(self._waiting.get(db, []), savepoint)

        @event.listens_for(sync_session, "after_transaction_end")
        def ended(session: Session, transaction: SessionTransaction) -> None:
            ending: Ending | None = getattr(session, "ending", None)
            if ending is Ending.LOST_READING:
                # Callbacks wait for the transaction that goes on in the place of this one.
                return
            if transaction.parent is None:
                # Where the transaction was committed, no callback waits any more, unless another listener has failed.
                unsuccessful = Outcome.UNKNOWN if _take_lost_commit(session) else Outcome.ROLLED_BACK
                self._settle_by_code(db, Outcome.COMMITTED if ending is Ending.COMMITTED else unsuccessful)
            elif transaction.nested:
                self._roll_back_savepoint(db, transaction)

    def _settle_by_code(self, db: DBConnect, outcome: Outcome) -> None:
        """Take note of what became of a transaction that the user's code may have ended, and start what is due.

        The unit may go on for hours, as that of a websocket does.
        """
        self.settle([db], outcome)
        if not self.is_held and _get_running_loop() is not None:
            self.start()

    def settle(self, dbs: Collection[DBConnect] | None, outcome: Outcome) -> None:
        """Take note of the `outcome` of what was open: callbacks that wait for it are due, the others are forgotten."""
        for db in list(self._waiting) if dbs is None else dbs:
            self._due += [each for each in self._waiting.pop(db, ()) if each.outcome is outcome]

    def set_aside(self) -> Mapping[DBConnect, Sequence[WaitingCallback]]:
        """Take out what waits, until `take_back`: others end their transactions first."""
        waiting, self._waiting = self._waiting, {}
        return waiting

    def take_back(self, waiting: Mapping[DBConnect, Sequence[WaitingCallback]]) -> None:
        """Let callbacks that were set aside wait again, before callbacks that were registered meanwhile."""
        for db, callbacks in waiting.items():
            self._waiting[db] = [*callbacks, *self._waiting.get(db, [])]

    def roll_back(self, waiting: Mapping[DBConnect, Sequence[WaitingCallback]]) -> None:
        """Call the callbacks in `waiting`, which were set aside, that wait for a roll-back; forget the others."""
        for callbacks in waiting.values():
            self._due += [each for each in callbacks if each.outcome is Outcome.ROLLED_BACK]
        self.start()

    def start(self) -> None:
        """Run the callbacks that are due, in a task."""
        if self._due:
            # Callbacks are the user's code. In a task, they get a context of their own, and code that is cancelled
            # while they run need not wait for them.
            due, self._due = self._due, []
            self._running = asyncio.create_task(_run(due, self._run_in_unit, self._running))
            _running.add(self._running)
            self._running.add_done_callback(_running.discard)

    async def wait(self) -> None:
        """Wait for the callbacks that were started."""
        running, self._running = self._running, None
        if running is not None:
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError as exc:
                # The callbacks go on, and what they have waited for has ended: so the cancellation says.
                raise exc from SeenThrough()

    def _roll_back_savepoint(self, db: DBConnect, savepoint: SessionTransaction) -> None:
        # The callbacks of a savepoint that was released have been moved to the one around it before.
        waiting = self._waiting.get(db, [])
        self._due += [each for each in waiting if each.savepoint is savepoint and each.outcome is Outcome.ROLLED_BACK]
        waiting[:] = [each for each in waiting if each.savepoint is not savepoint]


def _take_lost_commit(session: Session) -> bool:
    """Return whether the answer to the last commit of `session` was lost, and forget that."""
    door: Door | None = getattr(session, "door", None)
    if door is None or not door.commit_is_unknown:
        return False
    door.commit_is_unknown = False
    return True


_WATCHED = "ctxdb.callbacks"

# The tasks of callbacks: the event loop keeps none alive by itself.
_running: set[asyncio.Task[None]] = set()


def _move_to_outer_savepoint(waiting: list[WaitingCallback], savepoint: SessionTransaction) -> None:
    """Let the callbacks of a savepoint that was released go with the savepoint or transaction around it."""
    outer = savepoint.parent
    # A flush has a `SessionTransaction` of its own, which is no transaction of the database.
    while outer is not None and not outer.nested:
        outer = outer.parent
    for each in waiting:
        if each.savepoint is savepoint:
            each.savepoint = outer


async def _run(due: Sequence[WaitingCallback], run_in_unit: RunInUnit, earlier: asyncio.Task[None] | None) -> None:
    """Run each callback in a unit of work of its own. Its errors are logged: what it has waited for stands.

    Args:
        due: the callbacks.
        run_in_unit: gives each its unit of work.
        earlier: runs those of an earlier transaction, which come first.
    """
    if earlier is not None:
        await asyncio.wait([earlier])
    for each in due:

        async def call(callback: Callback = each.callback) -> None:
            result = callback()
            if inspect.isawaitable(result):
                await result

        try:
            await run_in_unit(call)
        except (Exception, asyncio.CancelledError):
            # This task is never cancelled: the cancellation is that of a task which the callback has waited for.
            logger.exception(_FAILED[each.outcome], each.callback)


_FAILED = {
    Outcome.COMMITTED: "The on_commit callback %r failed; the commit that it was waiting for stands",
    Outcome.ROLLED_BACK: "The on_rollback callback %r failed; the roll-back that it was waiting for stands",
}
