"""Greenlets that are used again keep nothing of a call, and each call has what a new one would have."""

from __future__ import annotations

import asyncio
import gc
import threading
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from typing import Any
from weakref import ref

import pytest
from greenlet import getcurrent
from sqlalchemy.util import await_only, greenlet_spawn

from ctxdb_core._sqlalchemy import greenlets
from ctxdb_core._sqlalchemy.greenlets import CallGreenlet, call_in_greenlet

variable: ContextVar[str] = ContextVar("variable", default="unset")


class Thing:
    pass


def pause() -> None:
    await_only(asyncio.sleep(0))


def this_greenlet() -> object:
    pause()
    return getcurrent()


async def running_greenlet() -> object:
    return await call_in_greenlet(this_greenlet)


async def test_calls_one_after_the_other_run_in_one_greenlet() -> None:
    assert await running_greenlet() is await running_greenlet()


async def test_calls_at_once_run_in_greenlets_of_their_own() -> None:
    used = await asyncio.gather(*(running_greenlet() for _ in range(5)))
    assert len(set(map(id, used))) == 5


async def test_no_more_greenlets_are_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenlets, "MOST_IDLE", 2)
    greenlets._idle.greenlets.clear()
    await asyncio.gather(*(running_greenlet() for _ in range(5)))
    assert len(greenlets._idle.greenlets) == 2


async def test_a_result_that_can_be_awaited_is_handed_back_as_it_is() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def call() -> asyncio.Future[None]:
        pause()
        return future

    assert await call_in_greenlet(call) is future


async def test_an_error_of_what_is_awaited_is_raised_where_the_call_waits() -> None:
    async def fail() -> None:
        raise LookupError

    def call() -> str:
        with pytest.raises(LookupError):
            await_only(fail())
        return "went on"

    assert await call_in_greenlet(call) == "went on"


async def test_an_error_of_the_call_leaves_its_greenlet_usable() -> None:
    def fail() -> None:
        pause()
        raise LookupError

    first = await running_greenlet()
    with pytest.raises(LookupError):
        await call_in_greenlet(fail)
    assert await running_greenlet() is first


@pytest.mark.parametrize("fails", [False, True])
async def test_an_idle_greenlet_keeps_nothing_of_its_call(fails: bool) -> None:
    thing = Thing()
    known = ref(thing)
    variable.set("seen")

    def call(thing: Thing) -> Thing:
        pause()
        if fails:
            raise LookupError(thing)
        return thing

    async def make_call(thing: Thing) -> None:
        with suppress(LookupError):
            await call_in_greenlet(call, thing)

    await make_call(thing)
    idle = greenlets._idle.greenlets[-1]
    assert (idle.gr_context, idle.entered, idle.also_entered) == (None, None, ())
    del thing
    gc.collect()
    assert known() is None


async def test_a_call_reads_and_sets_the_context_variables_of_its_task() -> None:
    def call() -> str:
        found = variable.get()
        pause()
        variable.set(f"{found}, changed")
        return found

    async def task(value: str) -> tuple[str, str]:
        variable.set(value)
        return await call_in_greenlet(call), variable.get()

    assert list(await asyncio.gather(task("a"), task("b"))) == [("a", "a, changed"), ("b", "b, changed")]


async def test_a_cancellation_reaches_the_call() -> None:
    seen: list[str] = []

    def call() -> None:
        try:
            await_only(asyncio.Event().wait())
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    task = asyncio.create_task(call_in_greenlet(call))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled"]


async def test_a_greenlet_whose_coroutine_was_thrown_away_is_not_used_again() -> None:
    used: list[object] = []

    def call() -> None:
        used.append(getcurrent())
        await_only(asyncio.sleep(0))

    coroutine: Any = call_in_greenlet(call)
    coroutine.send(None)
    coroutine.close()
    assert await running_greenlet() is not used[0]


async def test_a_thread_has_greenlets_of_its_own() -> None:
    here = await running_greenlet()
    elsewhere: list[object] = []
    thread = threading.Thread(target=lambda: elsewhere.append(asyncio.run(running_greenlet())))
    thread.start()
    thread.join()
    assert isinstance(elsewhere[0], CallGreenlet)
    assert elsewhere[0] is not here


async def test_the_traceback_of_an_error_does_not_show_a_later_call() -> None:
    def fail() -> None:
        pause()
        raise LookupError

    with pytest.raises(LookupError) as caught:
        await call_in_greenlet(fail)
    goes_on = asyncio.Event()
    later = asyncio.create_task(call_in_greenlet(lambda secret: await_only(goes_on.wait()), Thing()))
    await asyncio.sleep(0)
    # As reporters of errors do, at any time after the error.
    shown = [repr(frame.f_locals) for frame, _ in traceback.walk_tb(caught.tb) if frame.f_code.co_filename != __file__]
    goes_on.set()
    await later
    assert not any("Thing" in each for each in shown)


async def test_a_coroutine_that_is_thrown_away_inside_of_another_call_does_not_disturb_that() -> None:
    coroutine: Any = call_in_greenlet(pause)
    coroutine.send(None)

    def call() -> str:
        pause()
        # As the garbage collector does it, wherever it runs.
        coroutine.close()
        pause()
        return "went on"

    assert await call_in_greenlet(call) == "went on"


# A task that is started eagerly (Python 3.12) begins within the call that starts it, and goes on in the event loop.
@pytest.mark.parametrize("spawn", [call_in_greenlet, greenlet_spawn])
async def test_a_call_that_begins_within_another_one_goes_on_outside_of_it(
    spawn: Callable[..., Coroutine[Any, Any, object]],
) -> None:
    def call() -> object:
        pause()
        return await_only(greenlet_spawn(this_greenlet))

    begun: Any = call_in_greenlet(call)

    def begin() -> str:
        begun.send(None)
        pause()
        pause()
        return "has not been disturbed"

    async def go_on() -> None:
        await asyncio.sleep(0)
        with pytest.raises(StopIteration):
            for _ in range(10):
                begun.send(None)

    assert (await asyncio.gather(spawn(begin), go_on()))[0] == "has not been disturbed"
