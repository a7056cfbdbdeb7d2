"""Greenlets that run one synchronous call of SQLAlchemy after the other.

SQLAlchemy runs each call that may wait for the database in a greenlet of its own. Since Python 3.11, a greenlet maps a
stack for its Python frames, and unmaps the stack when it ends: two system calls and a page fault, 8 to 11 microseconds.
A greenlet that is used again costs one microsecond. So greenlets whose call has ended are kept here, a few for each
thread, as a greenlet cannot leave the thread in which it was started.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar
from weakref import ref

from greenlet import getcurrent, greenlet  # what SQLAlchemy's asyncio extra is made of

__all__ = ["CallGreenlet", "call_at_end_of_greenlet", "call_in_greenlet", "call_through"]

T = TypeVar("T")

MOST_IDLE = 64
"""How many idle greenlets a thread keeps. Requests beyond that many at once make new ones."""


class Leavable(Protocol):
    """A door."""

    def leave(self) -> None:
        """Give the turn back."""


class Waiting(Protocol):
    """An object that is told when a call waits."""

    def begin_waiting(self) -> None:
        """Note that other tasks are about to run."""

    def end_waiting(self) -> None:
        """Note that the call goes on."""


class CallGreenlet(greenlet):
    """Runs calls in which SQLAlchemy may wait for awaitables (``sqlalchemy.util.await_only``).

    It keeps nothing of a call that has ended: neither the function nor its arguments, result, error or context.
    """

    __sqlalchemy_greenlet_provider__ = True
    """By this, `await_only` knows that it may hand an awaitable to the greenlet's parent."""

    entered: object = None
    """The door through which the running call has come, if it has come through one."""
    also_entered: tuple[Leavable, ...] = ()
    """The doors of other sessions that the running call has used, and which are left when it ends."""

    waiting: Waiting | None = None
    """Told when the running call waits; ``None`` where nothing needs to know."""

    parent: greenlet  # the greenlet that awaits what the running call waits for

    def leave_doors(self) -> None:
        """Leave the doors of the other sessions that the call has used."""
        entered, self.also_entered = self.also_entered, ()
        for door in entered:
            door.leave()

    def run(self) -> None:
        # The first switch into a greenlet starts `run`. Each call, the first one too, comes by a later switch.
        call = self.parent.switch(None)
        while True:
            outcome = _Outcome()
            outcome.set_by(*call)
            call = None
            # The switch returns at the next call, and keeps its argument until then: so the caller empties the outcome.
            call = self.parent.switch(outcome)
            del outcome


class _Outcome:
    """What a call has come to; everything else that a greenlet hands to its parent is to be awaited."""

    __slots__ = ("error", "result")

    result: Any
    error: BaseException | None

    def set_by(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the call. The traceback of its error shows this frame, and none that goes on with other calls."""
        self.error = None
        try:
            self.result = fn(*args, **kwargs)
        except BaseException as exc:  # noqa: BLE001 - handed to the caller, who raises it
            self.error = exc


class _IdleGreenlets(threading.local):
    def __init__(self) -> None:
        self.greenlets: list[CallGreenlet] = []


_idle = _IdleGreenlets()


def call_in_greenlet(fn: Callable[..., T], *args: Any, **kwargs: Any) -> Coroutine[Any, Any, T]:
    """Return ``fn(*args, **kwargs)``, in which SQLAlchemy may await: as ``sqlalchemy.util.greenlet_spawn``."""
    return call_through(None, fn, args, kwargs)


async def call_through(entered: object, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Return ``fn(*args, **kwargs)``, in which SQLAlchemy may await.

    Args:
        entered: the door through which the call has come, if it has come through one.
        fn: a function that is not a coroutine function.
        args: its arguments.
        kwargs: its keyword arguments.

    Raises:
        BaseException: what `fn` raises.
    """
    current = getcurrent()
    if current.parent is not None and getattr(current, "__sqlalchemy_greenlet_provider__", False):
        # An eager task (Python 3.12) begins within the call that starts it, in the greenlet of that call. What this one
        # waits for would be handed to that call. The task goes on in the greenlet of the event loop.
        await asyncio.sleep(0)
        current = getcurrent()
    idle = _idle.greenlets
    if idle:
        worker = idle.pop()
        worker.parent = current
    else:
        worker = CallGreenlet(parent=current)
        worker.switch()
    # What the call reads and sets are the context variables of the running task.
    worker.gr_context = current.gr_context
    worker.entered = entered
    answer = worker.switch((fn, args, kwargs))
    while type(answer) is not _Outcome:
        waiting = worker.waiting
        try:
            if waiting is None:
                value = await answer
            else:
                waiting.begin_waiting()
                try:
                    value = await answer
                finally:
                    waiting.end_waiting()
        except GeneratorExit:
            # The coroutine is thrown away in the middle of the call, by garbage collection for instance. The greenlet
            # unwinds its call like any other error; it is not used again, as a clean-up in it may wait for something.
            # Garbage is collected anywhere, in the call of another greenlet too: that is where this one has to return.
            worker.parent = getcurrent()
            worker.throw(*sys.exc_info())
            worker.leave_doors()
            raise
        except BaseException:  # noqa: BLE001 - raised where the call waits
            answer = worker.throw(*sys.exc_info())
        else:
            answer = worker.switch(value)
    worker.entered = worker.gr_context = None
    if worker.also_entered:
        worker.leave_doors()
    if len(idle) < MOST_IDLE:
        idle.append(worker)
    error = answer.error
    if error is not None:
        answer.error = None
        try:
            raise error
        finally:
            # The error's traceback knows this frame: left in it, the two would be in a reference cycle.
            del error
    result, answer.result = answer.result, None
    return result  # type: ignore[no-any-return]  # the result of `fn`


def call_at_end_of_greenlet(current: greenlet, callback: Callable[[], object]) -> None:
    """Call `callback` when `current`, which is the running greenlet and not one of this module, has ended.

    A weak reference would tell it too late: the traceback of an error keeps the greenlet that the error was raised in.
    So all that the greenlet hands to its parent, its end included, passes through another one.
    """
    between = greenlet(_pass_on, current.parent)
    between.switch(ref(current), callback)
    current.parent = between


def _pass_on(child: ref[greenlet], callback: Callable[[], object]) -> Any:
    try:
        handed = _switch_to(child)
        while _is_alive(child):
            # What is awaited is handed back to the child itself.
            handed = getcurrent().parent.switch(handed)  # type: ignore[union-attr]  # it was made with a parent
        return handed
    finally:
        # Also if the child has raised an error, or is thrown away together with this greenlet.
        callback()


def _switch_to(child: ref[greenlet]) -> Any:
    running = child()
    assert running is not None
    switch = running.switch
    del running
    return switch()


def _is_alive(child: ref[greenlet]) -> bool:
    running = child()
    return running is not None and not running.dead
