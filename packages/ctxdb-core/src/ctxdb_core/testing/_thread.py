"""`LoopThread`: an event loop in a thread of its own, for connections that outlive the event loops of tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from ctxdb_core._databases.borrowed import guest_loops
from ctxdb_core.testing._errors import SharedTransactionError

T = TypeVar("T")
P = ParamSpec("P")


class LoopThread:
    """Runs coroutines on an event loop that runs while it is entered; a context manager.

    A connection of an asyncio driver serves the loop that opened it. Tests have a loop each, and synchronous test
    clients bring another one, while the test's own is blocked: so a connection that all of them share lives here.
    """

    loop: asyncio.AbstractEventLoop

    # The clock goes on where a test has stopped the time, as freezegun does, which replaces functions of `time` in all
    # modules: a transaction that waits for another one has to get its error in the end.
    _clock = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="ctxdb-testing", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _serve(self) -> None:
        # The runner's end closes the engines that were made on its loop.
        with asyncio.Runner() as runner:
            self.loop = runner.get_loop()
            self.loop.time = self._clock  # type: ignore[method-assign]  # for all that asyncio schedules
            guest_loops.add(self.loop)
            runner.run(self._wait_for_the_end())

    async def _wait_for_the_end(self) -> None:
        self._stopped = asyncio.Event()
        self._started.set()
        await self._stopped.wait()

    async def run(self, fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await ``fn(*args, **kwargs)`` on this loop, from any other one; a cancellation reaches it there."""
        self._check_alive()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_call(fn, *args, **kwargs), self.loop))

    def call(self, fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``fn(*args, **kwargs)`` on this loop, and block until it is done."""
        self._check_alive()
        tasks: list[asyncio.Task[Any]] = []
        try:
            return asyncio.run_coroutine_threadsafe(_call_in_task(tasks, fn, *args, **kwargs), self.loop).result()
        except BaseException:
            # This thread may have been interrupted, by pytest-timeout for instance: nothing must go on behind the test.
            asyncio.run_coroutine_threadsafe(_cancel(tasks), self.loop).result()
            raise

    def start(self, fn: Callable[P, Awaitable[object]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run ``fn(*args, **kwargs)`` on this loop some time, without waiting for it."""
        if not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(_call(fn, *args, **kwargs), self.loop)

    def _check_alive(self) -> None:
        if self.loop.is_closed():
            raise SharedTransactionError(
                "The shared transaction of this connection has ended, together with its test: a task, a session or a "
                "client outlives the block. End it inside of the block."
            )


async def _call(fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    return await fn(*args, **kwargs)


async def _call_in_task(
    tasks: list[asyncio.Task[Any]], fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    task = asyncio.current_task()
    assert task is not None
    tasks.append(task)
    return await fn(*args, **kwargs)


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
