"""Tasks that a handler starts by itself: helpers that it waits for, and jobs that go on without it."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.application import Reply
from tests.support.database import insert
from tests.support.world import World

from ctxdb_core import ContextClosedError, TransactionContext, db_session, run_in_new_ctx, transactional


@pytest.mark.parametrize("status", [200, 409])
async def test_helpers_that_a_handler_waits_for_take_part_in_its_transaction(world: World, status: int) -> None:
    context = TransactionContext(world.db)

    @transactional(world.db)
    async def joins(name: str) -> None:
        await insert(world.db, name)

    async def nests(name: str) -> None:
        async with context.transaction():
            await insert(world.db, name)

    async def handler() -> Reply:
        await insert(world.db, "handler")
        await asyncio.gather(joins("joined by one"), joins("joined by another"))
        async with asyncio.TaskGroup() as group:
            group.create_task(nests("nested"))
        await asyncio.create_task(insert(world.db, "bare"))
        return Reply(status=status)

    assert (await world.get(handler)).status_code == status
    names = ["bare", "handler", "joined by another", "joined by one", "nested"]
    assert await world.names() == (names if status == 200 else [])


@pytest.mark.parametrize("ends", ["before its request", "after its request"])
async def test_a_job_in_a_unit_of_its_own_stands_whatever_becomes_of_its_request(world: World, ends: str) -> None:
    answered = asyncio.Event()
    jobs: list[asyncio.Task[object]] = []

    async def job() -> None:
        if ends == "after its request":
            await answered.wait()
        await insert(world.db, "job")

    async def handler() -> Reply:
        await insert(world.db, "request")
        jobs.append(asyncio.create_task(run_in_new_ctx(job)))
        if ends == "before its request":
            await jobs[0]
        return Reply(status=409)

    assert (await world.get(handler)).status_code == 409
    await world.stop()
    answered.set()
    await jobs[0]
    assert await world.names() == ["job"]


async def test_a_task_that_is_left_behind_is_refused_the_session_and_can_begin_its_own_transaction(
    world: World,
) -> None:
    answered = asyncio.Event()
    jobs: list[asyncio.Task[object]] = []

    @transactional(world.db)
    async def write() -> None:
        await insert(world.db, "job")

    async def job() -> None:
        await answered.wait()
        with pytest.raises(ContextClosedError, match="run_in_new_ctx"):
            await db_session(world.db)
        await write()

    async def handler() -> Reply:
        jobs.append(asyncio.create_task(job()))
        return Reply()

    assert (await world.get(handler)).status_code == 200
    await world.stop()
    answered.set()
    await jobs[0]
    assert await world.names() == ["job"]


@pytest.mark.background
@pytest.mark.parametrize("fails", [False, True])
async def test_a_background_task_of_the_framework_is_part_of_its_request(world: World, *, fails: bool) -> None:
    done = asyncio.Event()

    @transactional(world.db)
    async def write() -> None:
        await insert(world.db, "background")

    async def background() -> None:
        try:
            await write()
            if fails:
                raise LookupError
        finally:
            done.set()

    async def handler() -> Reply:
        await insert(world.db, "request")
        return Reply(background=background)

    assert (await world.get(handler)).status_code == 200
    await done.wait()
    await world.stop()
    assert await world.names() == (["request"] if fails else ["background", "request"])
