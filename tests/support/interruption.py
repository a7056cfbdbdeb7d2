"""Cancellation at a chosen step of some work: each ``await`` that has to wait is a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from types import coroutine
from typing import Any

import anyio
import pytest
from sqlalchemy import text
from tests.support.database import Database

from ctxdb_core import DBConnect, db_session, new_db_ctx

Execute = Callable[..., Awaitable[object]]


class Interruption:
    """Lets work be cancelled when it waits for the n-th time."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.waits = 0
        self.is_over = False
        self._cancel: Callable[[], object] | None = None

    def cancel_when(self, cancel: Callable[[], object]) -> None:
        self._cancel = cancel

    @property
    def has_been_missed(self) -> bool:
        """Whether the work has ended before the chosen step."""
        return self.is_over and self.waits < self.step

    @coroutine
    def run(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Do what ``yield from work`` does, and count what it waits for."""
        resume: Callable[[Any], Any] = work.send
        argument: Any = None
        while True:
            try:
                awaited = resume(argument)
            except BaseException as exc:
                self.is_over = True
                if isinstance(exc, StopIteration):
                    return
                raise
            self.waits += 1
            if self.waits == self.step and self._cancel is not None:
                asyncio.get_running_loop().call_soon(self._cancel)
            resume = work.send
            try:
                argument = yield awaited
            except BaseException as exc:  # noqa: BLE001 - it is the work's
                resume, argument = work.throw, exc


async def at_each_step(
    run_cancelled: Callable[..., Awaitable[None]], work: Callable[[int], Coroutine[Any, Any, None]]
) -> AsyncIterator[int]:
    """Run `work`, cancelled when it waits for the first time, for the second, and so on, until it is done before."""
    for step in range(1, 1000):
        interruption = Interruption(step)
        await run_cancelled(lambda: interruption.run(work(step)), interruption.cancel_when)  # noqa: B023 - awaited here
        yield step
        if interruption.has_been_missed:
            return
    raise AssertionError("the work does not come to an end")


async def insert_halves(execute: Execute, step: int) -> None:
    """Insert two rows that belong together, and are named after `step`."""
    for half in ("a", "b"):
        await execute(text("INSERT INTO item VALUES (:name)"), {"name": f"{step:03}{half}"})


async def assert_halves_belong_together(database: Database, last_step: int) -> None:
    """Check that of each step both rows or none are stored, and those of the last one, which nothing cancelled."""
    names = await database.names()
    assert names == [f"{name[:3]}{half}" for name in names[::2] for half in ("a", "b")]
    assert names[-1] == f"{last_step:03}b"


async def assert_units_are_whole_or_absent(
    database: Database, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]], *, connected: bool
) -> None:
    """Check that a unit of work that is cancelled at any step leaves both of its rows or none, and no connection.

    Args:
        database: where they are stored.
        db: leads there.
        run_cancelled: one of `CANCELLERS`.
        connected: whether the pool keeps its connection from one step to the next.
    """

    async def work(step: int) -> None:
        async with new_db_ctx():
            await insert_halves((await db_session(db)).execute, step)

    step = 0
    async for step in at_each_step(run_cancelled, work):  # noqa: B007 - used behind the loop
        assert database.checked_out == 0
        if not connected:
            await db.close()
    await assert_halves_belong_together(database, step)


async def _natively(work: Callable[[], Awaitable[None]], cancel_when: Callable[[Callable[[], object]], None]) -> None:
    task = asyncio.ensure_future(work())
    cancel_when(task.cancel)
    with suppress(asyncio.CancelledError):
        await task


async def _again_and_again(
    work: Callable[[], Awaitable[None]], cancel_when: Callable[[Callable[[], object]], None]
) -> None:
    task = asyncio.ensure_future(work())
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        if not task.done():
            task.cancel()
            loop.call_soon(cancel)

    cancel_when(cancel)
    with suppress(asyncio.CancelledError):
        await task


async def _by_anyio(work: Callable[[], Awaitable[None]], cancel_when: Callable[[Callable[[], object]], None]) -> None:
    with anyio.CancelScope() as scope:
        cancel_when(scope.cancel)
        await work()


CANCELLERS = pytest.mark.parametrize("run_cancelled", [_natively, _again_and_again, _by_anyio])
"""Each way in which a task is cancelled."""
