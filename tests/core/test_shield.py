"""`run_to_completion`: cancellation waits, everything else works as in any task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
import pytest

from ctxdb_core._shield import run_to_completion

T = TypeVar("T")


class Work:
    """Work that waits for a release, and tells how far it got."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.started = asyncio.Event()
        self.finished = False

    async def __call__(self) -> str:
        self.started.set()
        await self.release.wait()
        await asyncio.sleep(0)
        self.finished = True
        return "result"


async def test_run_to_completion_returns_the_result_of_the_work() -> None:
    work = Work()
    work.release.set()
    assert await run_to_completion(work()) == "result"


async def test_run_to_completion_raises_the_error_of_the_work() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("it failed")

    with pytest.raises(LookupError, match="it failed"):
        await run_to_completion(fail())


async def test_a_cancelled_task_ends_after_the_work_is_done() -> None:
    work = Work()
    task = asyncio.create_task(_as_coroutine(work))
    await work.started.wait()
    task.cancel("enough")
    await asyncio.sleep(0)
    assert not task.done()
    work.release.set()
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task
    assert work.finished


async def test_cancelling_again_and_again_changes_nothing() -> None:
    work = Work()
    task = asyncio.create_task(_as_coroutine(work))
    await work.started.wait()
    for _ in range(50):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.finished


async def test_a_task_cancelled_before_its_first_wait_completes_the_work() -> None:
    work = Work()

    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await run_to_completion(work())

    task = asyncio.create_task(cancel_itself())
    await work.started.wait()
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.finished


async def test_work_inside_of_work_is_seen_through_as_well() -> None:
    work = Work()

    async def outer() -> str:
        return await run_to_completion(work())

    task = asyncio.create_task(_as_coroutine(outer))
    await work.started.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.finished


async def test_an_error_of_the_work_surfaces_although_the_task_was_cancelled() -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        started.set()
        await release.wait()
        raise LookupError("the commit failed")

    task = asyncio.create_task(_as_coroutine(fail))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(LookupError, match="the commit failed"):
        await task


async def test_an_outer_timeout_is_reported_as_such_once_the_work_is_done() -> None:
    work = Work()
    asyncio.get_running_loop().call_later(0.05, work.release.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await run_to_completion(work())
    assert work.finished


async def test_a_timeout_inside_the_work_still_fires() -> None:
    async def with_timeout() -> str:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "no time-out"

    assert await run_to_completion(with_timeout()) == "timed out"


async def test_wait_for_inside_the_work_still_fires() -> None:
    async def with_timeout() -> str:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.001)
        except TimeoutError:
            return "timed out"
        return "no time-out"

    assert await run_to_completion(with_timeout()) == "timed out"


async def test_a_task_group_inside_the_work_still_cancels_its_body() -> None:
    async def fail() -> None:
        raise LookupError

    async def with_group() -> str:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                await asyncio.Event().wait()
        except* LookupError:
            pass
        return "group ended"

    assert await run_to_completion(with_group()) == "group ended"


# A task group does this where an eager task (Python 3.12) fails at once.
async def test_work_that_cancels_its_own_task_does_not_wait() -> None:
    async def work() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await asyncio.Event().wait()
        task.uncancel()
        return "ended"

    assert await run_to_completion(work()) == "ended"


async def test_the_work_sees_its_task_by_name() -> None:
    async def name() -> str:
        task = asyncio.current_task()
        assert task is not None
        return task.get_name()

    task = asyncio.create_task(_as_coroutine(name), name="the request")
    assert await task == "the request"


async def test_the_current_task_is_itself_again_afterwards() -> None:
    before = asyncio.current_task()
    work = Work()
    work.release.set()
    await run_to_completion(work())
    assert asyncio.current_task() is before


@pytest.mark.parametrize("released_after", [0, 1, 5, 100])
async def test_an_anyio_scope_cannot_interrupt_the_work(released_after: int) -> None:
    work = Work()
    with anyio.CancelScope() as scope:
        scope.cancel()
        loop = asyncio.get_running_loop()
        _call_after_turns(loop, released_after, work.release.set)
        await run_to_completion(work())
        pytest.fail("the scope's cancellation was lost")
    assert work.finished
    assert scope.cancelled_caught


async def test_waiting_in_a_cancelled_anyio_scope_is_no_busy_loop() -> None:
    work = Work()
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1

    loop = asyncio.get_running_loop()
    original = loop._run_once  # type: ignore[attr-defined]

    def counting_run_once() -> None:
        count()
        original()

    with anyio.CancelScope() as scope:
        scope.cancel()
        loop.call_later(0.1, work.release.set)
        loop._run_once = counting_run_once  # type: ignore[attr-defined]
        try:
            await run_to_completion(work())
        finally:
            del loop._run_once  # type: ignore[attr-defined]
    assert work.finished
    assert turns < 50


def test_closing_the_coroutine_closes_the_work() -> None:
    closed = False

    async def work() -> None:
        nonlocal closed
        try:
            await asyncio.Event().wait()
        finally:
            closed = True

    async def step_and_close() -> None:
        outer = _as_coroutine(work)
        outer.send(None)
        outer.close()

    asyncio.run(step_and_close())
    assert closed


def _call_after_turns(loop: asyncio.AbstractEventLoop, turns: int, callback: Callable[[], None]) -> None:
    if turns:
        loop.call_soon(_call_after_turns, loop, turns - 1, callback)
    else:
        callback()


async def _as_coroutine(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return await run_to_completion(work())
