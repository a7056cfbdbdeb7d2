"""Running a coroutine to its end inside the current task, even if that task is cancelled meanwhile.

A commit that has been sent must be seen through. `asyncio.shield` does it with a second task, which costs a request of
one statement 4 % of its CPU, and waiting for it under an anyio cancel scope, which cancels again at every turn of the
event loop, is a busy loop. Here the coroutine is stepped by hand: the current task is lent to it, awaits the same
futures, and raises its own cancellation when the coroutine has ended.
"""

from __future__ import annotations

import asyncio
import sys
import types
from asyncio import _enter_task, _leave_task  # for implementers of tasks (Python docs, "Extending asyncio")
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""How long a task that was cancelled goes on waiting for its work, before the work is cancelled as well."""


@types.coroutine
def run_to_completion(coro: Coroutine[Any, Any, T]) -> Generator[Any, None, T]:
    """Run `coro` to its end in the current task, and only then let the task be cancelled.

    Once the task is cancelled, `coro` has `GRACE_SECONDS` left; then it is cancelled, too.

    Returns:
        What `coro` returns.

    Raises:
        asyncio.CancelledError: the task was cancelled meanwhile, and `coro` succeeded; its cause is `SeenThrough`.
        BaseException: the error of `coro`, also if the task was cancelled meanwhile.
    """
    loop = asyncio.get_running_loop()
    host: Any = asyncio.current_task(loop)
    if host is None:
        coro.close()
        raise RuntimeError("run_to_completion() needs a running task.")
    if isinstance(host, LentTask):
        # This run is inside of another run to completion, which protects it as well.
        return (yield from coro.__await__())
    lent = LentTask(host)
    waiter = _Waiter(loop)
    shield: AbstractContextManager[object] | None = None
    deadline: asyncio.TimerHandle | None = None
    try:
        while True:
            _leave_task(loop, host)
            _enter_task(loop, lent)  # type: ignore[arg-type]  # a stand-in, which is what this function is for
            try:
                awaited = coro.throw(lent.take_cancellation()) if lent.must_cancel else coro.send(None)
            except StopIteration as stop:
                result: T = stop.value
                break
            finally:
                _leave_task(loop, lent)  # type: ignore[arg-type]  # as above
                _enter_task(loop, host)
            if awaited is None:
                # A bare `yield`, as in `asyncio.sleep(0)`: there is nothing to wait on but the next turn of the loop.
                try:
                    yield None
                except asyncio.CancelledError as exc:
                    waiter.note_cancellation(*exc.args)
                continue
            awaited._asyncio_future_blocking = False  # noqa: SLF001 - as a task does for each future it waits on
            lent.awaited = awaited
            if lent.must_cancel:
                # The coroutine has cancelled its task before it waits: a task group does where an eager task fails.
                lent.cancel_awaited()
            try:
                # An exception of `awaited` ends this wait as well, and reaches `coro` when that asks for the result.
                yield waiter.on(awaited)
            except GeneratorExit:
                raise
            except BaseException:  # noqa: BLE001, S110 - see above; a cancellation is noted by the waiter
                pass
            while not awaited.done():
                if shield is None:
                    shield = _anyio_shield()
                    shield.__enter__()
                    waiter.wakes = False
                    # A server that does not answer any more must not hold a cancelled task for ever.
                    deadline = loop.call_later(GRACE_SECONDS, lent.cancel)
                try:
                    yield waiter.on(awaited)
                except GeneratorExit:
                    raise
                except BaseException:  # noqa: BLE001, S110 - as above
                    pass
            lent.awaited = None
    except GeneratorExit:
        coro.close()
        raise
    finally:
        if deadline is not None:
            deadline.cancel()
        if shield is not None:
            shield.__exit__(None, None, None)
    if waiter.is_cancelled:
        raise asyncio.CancelledError(*waiter.args) from SeenThrough()
    return result


class SeenThrough(Exception):  # noqa: N818 - no error: what a cancelled task was doing has succeeded
    """Why a task is told of its cancellation as late as that: what it was doing had to be seen through, and was."""

    def __init__(self) -> None:
        super().__init__("ctxdb has seen through what the task was doing when it was cancelled: it has succeeded.")


class LentTask:
    """What `asyncio.current_task()` returns inside the coroutine.

    `asyncio.timeout()` in a driver cancels the current task to wake its own code: that must reach the coroutine, while
    a cancellation of the real task must not.
    """

    __slots__ = ("__weakref__", "_cancel_args", "_cancel_requests", "awaited", "host", "must_cancel")

    def __init__(self, host: asyncio.Task[Any]) -> None:
        self.host = host
        self._cancel_requests = 0
        self.must_cancel = False
        self._cancel_args: tuple[Any, ...] = ()
        self.awaited: Any = None

    def take_cancellation(self) -> asyncio.CancelledError:
        self.must_cancel = False
        return asyncio.CancelledError(*self._cancel_args)

    def cancel(self, msg: Any | None = None) -> bool:
        self._cancel_requests += 1
        if self.awaited is None or not self.awaited.cancel(msg=msg):
            self.must_cancel = True
            self._cancel_args = () if msg is None else (msg,)
        return True

    def cancel_awaited(self) -> None:
        if self.awaited.cancel(*self._cancel_args):
            self.must_cancel = False

    def cancelling(self) -> int:
        return self._cancel_requests

    def uncancel(self) -> int:
        if self._cancel_requests:
            self._cancel_requests -= 1
            if not self._cancel_requests:
                self.must_cancel = False
        return self._cancel_requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)


class _Waiter:
    """What the real task waits on: the awaited future, but with a `cancel` that only takes note.

    Args:
        loop: the event loop of the task.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_future",
        "_loop",
        "args",
        "is_cancelled",
        "wakes",
    )

    _callback: Callable[[Any], object]
    _context: Context | None
    _future: asyncio.Future[Any]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.is_cancelled = False
        """Whether the real task was cancelled."""
        self.args: tuple[Any, ...] = ()
        """The arguments of its first cancellation."""
        self.wakes = True
        """Whether a cancellation wakes the task: the first one does, so that the task can keep anyio from asking again
        at every turn of the loop."""

    def on(self, future: asyncio.Future[Any]) -> _Waiter:
        """Have the task wait on `future`, and return what it is to yield."""
        self._asyncio_future_blocking = True
        self._future = future
        return self

    def note_cancellation(self, *args: Any) -> None:
        """Note that the real task was cancelled."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.args = args

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None:
        self._callback = callback
        self._context = context
        self._future.add_done_callback(callback, context=context)

    def cancel(self, msg: Any | None = None) -> bool:
        self.note_cancellation(*(() if msg is None else (msg,)))
        if self.wakes and not self._future.done():
            self.wakes = False
            self._future.remove_done_callback(self._callback)
            alarm = self._loop.create_future()
            alarm.cancel(msg)
            self._loop.call_soon(self._callback, alarm, context=self._context)
        return True


def _anyio_shield() -> AbstractContextManager[object]:
    # Where anyio was never imported there is no cancel scope of it to be shielded from.
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return nullcontext()
    shield: AbstractContextManager[object] = anyio.CancelScope(shield=True)
    return shield
