"""`Door`: the one place that each call of a session passes on its way from asyncio code into SQLAlchemy.

Everything that a session of a unit of work does asks here, once for each call:

- Is this the event loop, and with it the thread, that the session belongs to? Is its unit of work still open?
- Whose turn is it? A session serves one task at a time. Tasks that use it at once are served one after the other, in
  the order in which they came, each call whole: with its autoflush, its statement and its result.
- Who wants to know? An observer is told of each statement before a connection is taken for it.

A session that no unit of work has taken has no door, and pays for none of this.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop, current_task  # the first is for implementers of event loops, and costs the least
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeAlias

from greenlet import getcurrent, greenlet  # what SQLAlchemy's asyncio extra is made of
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ctxdb_core._shield import LentTask, SeenThrough, run_to_completion
from ctxdb_core._sqlalchemy.call_limit import CallLimit
from ctxdb_core._sqlalchemy.greenlets import CallGreenlet, call_at_end_of_greenlet
from ctxdb_core._sqlalchemy.task_blocks import running_task
from ctxdb_core.errors import ContextNotInitiatedError, SessionAlreadyActiveError

__all__ = ["Door", "Refuse", "StatementObserver"]

StatementObserver: TypeAlias = Callable[[Session, Any], None]
"""Called with the session and the statement; in a flush, the statement is ``None``."""

Refuse: TypeAlias = Callable[[], NoReturn]
"""Raises the error that says why a session cannot be used any more."""

_FOREIGN_LOOP = (
    "The session found here belongs to another event loop, and a connection serves the loop that opened it: nothing "
    "was sent. Wrap the code that runs on this loop in `async with new_db_ctx():` for a session of its own, or run it "
    "on the first loop (`anyio.from_thread.run`, `await` instead of `asyncio.run`)."
)

_DEADLOCK = (
    "Two tasks use the sessions of two databases, each one inside of a call of the other session (`run_sync`, an "
    "`on_begin` callback, an event listener): each waits for the session that the other one has, and neither would "
    "ever go on. Use one session after the other, nest such calls in the same order everywhere, or give the task "
    "sessions of its own by `run_in_new_ctx(fn, ...)`."
)


class _Turn:
    """A turn that is taken for several calls, which may also be made by tasks that these start and wait for.

    A call that such a task has under way at the end of the block is waited for, or cancelled if an error leaves the
    block: the connection serves one call at a time. Its later calls wait for their turns as those of any other task.
    """

    __slots__ = ("_depth", "_is_one_step", "_token", "door", "is_over")

    def __init__(self, door: Door, *, is_one_step: bool) -> None:
        self.door = door
        self._is_one_step = is_one_step
        self.is_over = False

    async def __aenter__(self) -> None:
        if not self.door.enter():
            await self.door.wait()
        self.begin()

    def begin(self) -> None:
        """Let tasks that are started from now on make their calls in this turn; the door has given it."""
        self._depth = self.door.depth
        self._token = _turns.set((*_turns.get(), self))

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        door = self.door
        try:
            if exc is not None:
                if door.depth > self._depth:
                    door.cancel_guests()
                if self._is_one_step and _tells_of_success(exc) and door.take_back_interruption():
                    # A commit was seen through all the same: an error would say that nothing is stored.
                    return True
                door.answer_interruption()
        finally:
            _turns.reset(self._token)
            self.is_over = True
            try:
                if door.depth > self._depth:
                    await run_to_completion(door.wait_for_guests(self._depth))
            finally:
                door.leave()
        return False


_turns: ContextVar[tuple[_Turn, ...]] = ContextVar("ctxdb_turns", default=())
"""The turns that the running code has taken by `Door.turn`. Tasks that it starts inherit them, and may outlast them."""


class _Waiting(NamedTuple):
    """A task that waits for a door."""

    door: Door
    task: Any
    turns: tuple[_Turn, ...]
    """The turns that the waiting code is part of."""

    def keeps(self, door: Door) -> bool:
        """Return whether `door` stays taken for as long as this task waits."""
        return door.is_held_by(self.task) or door.is_taken_by(self.turns)


_all_waiting: set[_Waiting] = set()
"""The tasks that wait for a door, of all event loops."""


class Door:
    """The door of one session. It is made on the event loop that the session belongs to.

    Args:
        observer: told of each statement.
        loop: that event loop, where the caller knows it.
    """

    __slots__ = (
        "_guests",
        "_guests_wake",
        "_holder",
        "_interrupted",
        "_loop",
        "_nested",
        "_prepare",
        "_refuse",
        "_waiting",
        "check",
        "commit_is_unknown",
        "is_suspect",
        "latest",
        "limit",
        "observer",
    )

    def __init__(
        self, observer: StatementObserver | None = None, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self.observer = observer
        """Told of each statement before a connection is taken for it, in the task that makes it."""
        self.check: Callable[[], None] | None = None
        """Called before each statement; it may refuse the statement by an error."""
        self.latest: Callable[[], float | None] | None = None
        """Returns when a call that begins now is given up, on the event loop's clock; ``None`` without a limit."""
        self.limit: CallLimit | None = None
        """Gives up the running call when its time is up; ``None`` if the call has no limit."""
        self.commit_is_unknown = False
        """Whether the outcome of the session's last commit is unknown, as its answer was lost."""
        self.is_suspect = False
        """Whether a call has failed, so that the transaction may have been lost with its connection."""
        self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop() if loop is None else loop
        """The session's own loop; ``None`` once the session has ended, as no loop is its own then."""
        self._refuse: Refuse | None = None
        self._holder: Any = None
        """The task that has the turn, or a `_GreenletTurn`; ``None`` while the turn is free."""
        self._nested = 0
        """How many calls of the holder are made inside of its first one, by an event listener for instance."""
        self._guests: tuple[Any, ...] = ()
        """The tasks that were started inside of a turn, once for each call that they have under way in it."""
        self._guests_wake: tuple[asyncio.Future[None], ...] = ()
        """Done when a call of a guest has ended."""
        self._waiting: deque[tuple[asyncio.Future[None], Any]] | None = None
        """The tasks that wait for their turn, in the order in which they came."""
        self._prepare: Callable[[], Awaitable[object]] | None = None
        """Awaited by the next call, before it takes its turn."""
        self._interrupted: Refuse | None = None
        """Raises the error that the running call ends by, as it was interrupted."""

    # --- calls that pass the door -------------------------------------------------------------------------------------

    def enter(self) -> bool:
        """Take the turn for a call of the running task, if that takes no waiting; `leave` gives it back.

        Returns:
            Whether the turn was taken; if not, `wait` takes it.

        Raises:
            ContextNotInitiatedError: the session belongs to another event loop.
            ContextClosedError: the session has ended.
        """
        # Neither the thread nor a task of the session's loop tells as much: both are the same in a forked process, and
        # in a loop that is run inside of another one.
        loop = _get_running_loop()
        if loop is self._loop and self._holder is None and self._prepare is None:
            self._holder = current_task(loop)
            return True
        task = current_task(loop)
        if self._is_within(task):
            self._nested += 1
            if not self.is_held_by(task):
                self._guests = (*self._guests, _task_of(task))
            return True
        if loop is not self._loop:
            self._refuse_call()
        return False

    async def wait(self, *, ahead: bool = False) -> None:
        """Wait for the turn, and take it.

        Args:
            ahead: whether to take it before the tasks that wait already.

        Raises:
            ContextClosedError: the session has ended meanwhile.
        """
        while self._prepare is not None:
            await self._prepare()
        task = current_task()
        if self._holder is None:
            self._holder = task
        else:
            if self._waiting is None:
                self._waiting = deque()
            await self._wait_in(self._waiting, task, ahead=ahead)

    async def _wait_in(
        self, waiting: deque[tuple[asyncio.Future[None], Any]], task: Any, *, ahead: bool = False
    ) -> None:
        handed_over = asyncio.get_running_loop().create_future()
        place = (handed_over, task)
        mine = _Waiting(self, task, _turns.get())
        self._refuse_deadlock(mine)
        (waiting.appendleft if ahead else waiting.append)(place)
        _all_waiting.add(mine)
        try:
            await handed_over
        except BaseException:
            if handed_over.cancelled():
                # The task that had the turn may have taken this place out of the queue in the same moment.
                if place in waiting:
                    waiting.remove(place)
            elif handed_over.exception() is None:
                # The turn came in the same moment as the cancellation: the next task gets it.
                try:
                    self.answer_interruption()
                finally:
                    self.leave()
            raise
        finally:
            _all_waiting.discard(mine)

    def _refuse_deadlock(self, mine: _Waiting) -> None:
        """Raise an error if the holder of the turn waits for a door that `mine` keeps, directly or by way of others."""
        reached, doors = {self}, [self]
        while doors:
            door = doors.pop()
            for other in tuple(_all_waiting):
                if other.door not in reached and other.keeps(door):
                    if mine.keeps(other.door):
                        raise SessionAlreadyActiveError(_DEADLOCK)
                    reached.add(other.door)
                    doors.append(other.door)

    def is_held_by(self, task: Any) -> bool:
        """Return whether `task` has the turn."""
        return self._holder is not None and task is not None and _task_of(self._holder) is _task_of(task)

    def leave(self) -> None:
        """Give the turn back: to the task that has waited for the longest time."""
        if self._nested:
            self._nested -= 1
            if self._guests:
                self._leave_as_guest()
            return
        if self._interrupted is not None:
            # The call was cancelled by `interrupt` and has ended well all the same: its driver has swallowed the
            # cancellation.
            self._interrupted = None
            if (task := current_task()) is not None:
                task.uncancel()
        while self._waiting:
            handed_over, task = self._waiting.popleft()
            if not handed_over.done():
                # Handed over at once, so that no other call can come in between.
                self._holder = task
                handed_over.set_result(None)
                return
        self._holder = None

    def _leave_as_guest(self) -> None:
        guests, task = list(self._guests), running_task()
        if task in guests:
            guests.remove(task)
        self._guests = tuple(guests)
        waking, self._guests_wake = self._guests_wake, ()
        for future in waking:
            if not future.done():
                future.set_result(None)

    def turn(self, *, is_one_step: bool = False) -> _Turn:
        """Take the turn for several calls, which may also be made by tasks that these start and wait for.

        A session class of the user's may commit or close in a task of its own, for instance.

        Args:
            is_one_step: whether all of the block is one call that is run to completion, such as a commit. If the call
                is interrupted meanwhile and succeeds, the block ends without an error.
        """
        return _Turn(self, is_one_step=is_one_step)

    @property
    def depth(self) -> int:
        """How many calls are under way inside of the call that has the turn."""
        return self._nested

    def cancel_guests(self) -> None:
        """Cancel the tasks that were started inside of a turn and have a call under way in it."""
        for task in self._guests:
            task.cancel()

    async def wait_for_guests(self, depth: int) -> None:
        """Wait until no more than `depth` calls are under way inside of the call that has the turn."""
        while self._nested > depth:
            future = asyncio.get_running_loop().create_future()
            self._guests_wake = (*self._guests_wake, future)
            await future

    def _is_within(self, task: Any) -> bool:
        """Return whether `task` has the turn, or was started by the code that has it."""
        if self._holder is None:
            return False
        return self.is_held_by(task) or self.is_taken_by(_turns.get())

    def is_taken_by(self, turns: tuple[_Turn, ...]) -> bool:
        """Return whether the innermost of `turns` that is of this door goes on: its code has the turn."""
        return next((not turn.is_over for turn in reversed(turns) if turn.door is self), False)

    def restart_limit(self, *args: object) -> None:
        """Give the running call its time anew, as it sends another statement."""
        if self.limit is not None and self.latest is not None:
            self.limit.restart(self.latest())

    # --- statements that have not come through the door ---------------------------------------------------------------

    def look(self, session: Any, clause: Any) -> None:
        """Look once more before a connection is taken for a statement: called by ``Session.get_bind``.

        Lazy loading of ``AsyncAttrs``, for instance, starts a greenlet of SQLAlchemy's own, and has not come through
        the door. It takes the turn here, and keeps it until its greenlet has ended.
        """
        self.refuse_if_ended()
        current = getcurrent()
        if getattr(current, "entered", None) is not self:
            if not getattr(current, "__sqlalchemy_greenlet_provider__", False):
                # A plain call, outside of SQLAlchemy's greenlets, takes no connection.
                return
            self._enter_unannounced(current)
            if self.is_suspect:
                session.leave_lost_reading()
            # Nobody hears of it if this call is interrupted.
            self.is_suspect = True
        if self.check is not None:
            self.check()
        if self.observer is not None:
            self.observer(session, clause)

    def _enter_unannounced(self, current: greenlet) -> None:
        nested = self._nested
        if not self.enter():
            await_only(self.wait())
        elif self._nested > nested and self.is_held_by(current_task()):
            # The running task has the turn already, and keeps it for longer than this statement takes.
            self.leave()
            return
        if isinstance(current, CallGreenlet):
            # The greenlet serves a call of another session, and is used again after it: the turn ends with that call.
            current.also_entered = (*current.also_entered, self)
        elif self._nested > nested:
            call_at_end_of_greenlet(current, self.leave)
        else:
            self._holder = turn = _GreenletTurn(self._holder)
            call_at_end_of_greenlet(current, partial(self._leave_with_greenlet, turn))

    def _leave_with_greenlet(self, turn: _GreenletTurn) -> None:
        if self._holder is turn:
            self.leave()

    # --- for the unit of work -----------------------------------------------------------------------------------------

    def is_held(self) -> bool:
        """Return whether the running code has taken the turn by `turn` or `last_turn`."""
        return self._holder is not None and self.is_taken_by(_turns.get())

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return self._holder is not None

    @property
    def cancelled_task(self) -> asyncio.Task[Any] | None:
        """The task that has a call under way, if it has been cancelled."""
        task = self.running_task
        return task if task is not None and task.cancelling() > 0 else None

    @property
    def running_task(self) -> asyncio.Task[Any] | None:
        """The task that has a call under way."""
        task = None if self._holder is None else _task_of(self._holder)
        return task if isinstance(task, asyncio.Task) and not task.done() else None

    def prepare_next_call(self, prepare: Callable[[], Awaitable[object]] | None) -> None:
        """Have the next call await `prepare` before it takes its turn; ``None`` takes that back.

        Each call awaits `prepare` until that takes itself back, as it has to when it is done.
        """
        self._prepare = prepare

    def interrupt(self, refuse: Refuse) -> None:
        """Cancel the call that another task has under way: it ends by the error that `refuse` raises.

        The driver stops the query on the server, as for a cancelled task; the task itself goes on.
        """
        holder = self._holder
        if holder is None or self._is_within(current_task()):
            return
        if isinstance(holder, (_GreenletTurn, LentTask)):
            # A lent task runs to completion: a COMMIT, for instance, whose outcome would be unknown.
            return
        if self._interrupted is not None:
            # The call has held out against an earlier interruption. Only one cancellation is taken back when it ends.
            holder.uncancel()
        self._interrupted = refuse
        holder.cancel()

    @asynccontextmanager
    async def turn_ahead(self) -> AsyncIterator[None]:
        """Take the turn before the tasks that wait for theirs, as soon as the call that is under way has ended."""
        if not self.enter():
            await self.wait(ahead=True)
        try:
            async with self.turn():
                yield
        finally:
            self.leave()

    def answer_interruption(self) -> None:
        """Raise the error of a call that was interrupted, in the place of its cancellation; else do nothing."""
        refuse = self._interrupted
        if self.take_back_interruption() and refuse is not None:
            refuse()

    def take_back_interruption(self) -> bool:
        """Take the interruption of the running call back; return whether that is what it was cancelled by."""
        refuse, self._interrupted = self._interrupted, None
        task = current_task()
        return refuse is not None and task is not None and not task.uncancel()

    def end(self, refuse: Refuse) -> None:
        """Have each call from now on raise the error of `refuse`; calls that wait for their turn raise it at once."""
        self._refuse = refuse
        self._loop = None
        waiting, self._waiting = self._waiting, None
        for handed_over, _ in waiting or ():
            if not handed_over.done():
                handed_over.set_exception(_error_of(refuse))

    @asynccontextmanager
    async def last_turn(self, refuse: Refuse) -> AsyncIterator[None]:
        """End the session for everyone else, as by `end`, and take the turn after the call that is under way.

        What ends the session's transaction and closes it goes on inside of the block, also in tasks that are started
        there: see `turn`.
        """
        self.end(refuse)
        task = current_task()
        if self._is_within(task):
            self._nested += 1
            if not self.is_held_by(task):
                self._guests = (*self._guests, _task_of(task))
        elif self._holder is None:
            self._holder = task
        else:
            self._waiting = deque()
            await self._wait_in(self._waiting, task)
        turn = _Turn(self, is_one_step=False)
        turn.begin()
        try:
            yield
        except BaseException as exc:
            await turn.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        await turn.__aexit__(None, None, None)

    @property
    def has_ended(self) -> bool:
        """Whether the session refuses all calls."""
        return self._refuse is not None

    def refuse_if_ended(self) -> None:
        """Raise the error that says why the running code cannot use the session any more, if it cannot."""
        if self._refuse is not None and not self._is_within(None):
            self._refuse()

    def _refuse_call(self) -> NoReturn:
        if self._refuse is not None:
            self._refuse()
        raise ContextNotInitiatedError(_FOREIGN_LOOP)


class _GreenletTurn(NamedTuple):
    """The turn of a greenlet that has not come through the door; it ends with the greenlet."""

    task: Any


def _tells_of_success(error: BaseException) -> bool:
    """Return whether `error` is a cancellation that came late, as its task had something to be seen through.

    Its context is an error where that was the roll-back because of the error.
    """
    return isinstance(error.__cause__, SeenThrough) and error.__context__ is None


def _error_of(refuse: Refuse) -> BaseException:
    try:
        refuse()
    except Exception as exc:  # noqa: BLE001 - raised by the task that waits
        return exc


def _task_of(holder: Any) -> Any:
    """Return the task that `holder` stands for: a `LentTask` runs something to completion for another task."""
    task = holder.task if isinstance(holder, _GreenletTurn) else holder
    return task.host if isinstance(task, LentTask) else task
