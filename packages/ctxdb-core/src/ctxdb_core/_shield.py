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
    cancellation = _Cancellation(loop)
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
                    cancellation.note(*exc.args)
                continue
            awaited._asyncio_future_blocking = False  # noqa: SLF001 - as a task does for each future it waits on
            lent.awaited = awaited
            if lent.must_cancel:
                # The coroutine has cancelled its task before it waits: a task group does where an eager task fails.
                lent.cancel_awaited()
            try:
                # An exception of `awaited` ends this wait as well, and reaches `coro` when that asks for the result.
                yield _Waiter(awaited, cancellation)
            except GeneratorExit:
                raise
            except BaseException:  # noqa: BLE001, S110 - see above; a cancellation is noted by the waiter
                pass
            while not awaited.done():
                if shield is None:
                    shield = _anyio_shield()
                    shield.__enter__()
                    cancellation.wakes = False
                    # A server that does not answer any more must not hold a cancelled task for ever.
                    deadline = loop.call_later(GRACE_SECONDS, lent.cancel)
                try:
                    yield _Waiter(awaited, cancellation)
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
    if cancellation.requested:
        raise asyncio.CancelledError(*cancellation.args) from SeenThrough()
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


class _Cancellation:
    """What is known of the real task's cancellation."""

    __slots__ = ("args", "loop", "requested", "wakes")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.requested = False
        self.args: tuple[Any, ...] = ()
        # The first request wakes the task, so that it can keep anyio from asking again at every turn of the loop.
        self.wakes = True

    def note(self, *args: Any) -> None:
        if not self.requested:
            self.requested = True
            self.args = args


class _Waiter:
    """What the real task waits on: the awaited future, but with a `cancel` that only takes note."""

    __slots__ = ("_asyncio_future_blocking", "_callback", "_cancellation", "_context", "_future")

    def __init__(self, future: asyncio.Future[Any], cancellation: _Cancellation) -> None:
        self._asyncio_future_blocking = True
        self._future = future
        self._cancellation = cancellation

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._cancellation.loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None:
        self._callback = callback
        self._context = context
        self._future.add_done_callback(callback, context=context)

    def cancel(self, msg: Any | None = None) -> bool:
        cancellation = self._cancellation
        cancellation.note(*(() if msg is None else (msg,)))
        if cancellation.wakes and not self._future.done():
            cancellation.wakes = False
            self._future.remove_done_callback(self._callback)
            alarm = cancellation.loop.create_future()
            alarm.cancel(msg)
            cancellation.loop.call_soon(self._callback, alarm, context=self._context)
        return True


def _anyio_shield() -> AbstractContextManager[object]:
    # Where anyio was never imported there is no cancel scope of it to be shielded from.
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return nullcontext()
    shield: AbstractContextManager[object] = anyio.CancelScope(shield=True)
    return shield
