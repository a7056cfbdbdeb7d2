"""Handlers that hand their session to a thread which runs an event loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Reply
from tests.support.database import insert
from tests.support.world import World

from ctxdb_core import ContextNotInitiatedError, db_session, new_db_ctx

pytestmark = pytest.mark.exception_handlers


async def store(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO item VALUES ('stored in a thread')"))


async def in_to_thread(session: AsyncSession) -> None:
    await asyncio.to_thread(lambda: asyncio.run(store(session)))


async def in_pool_of_threads(session: AsyncSession) -> None:
    with ThreadPoolExecutor(1) as pool:
        await asyncio.wrap_future(pool.submit(lambda: asyncio.run(store(session))))


@pytest.mark.parametrize("use", [in_to_thread, in_pool_of_threads])
async def test_a_session_in_another_loop_is_refused_and_harms_no_other_request(
    world: World, use: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    async def report() -> Reply:
        session = await db_session(world.db)
        await session.execute(text("SELECT 1"))
        await use(session)
        return Reply()

    async def order() -> Reply:
        await insert(world.db, f"order {len(await world.names())}")
        return Reply()

    world.application.exception_statuses[ContextNotInitiatedError] = 501
    client = await world.start(("/report", report), ("/order", order))
    # More often than the pool has connections.
    assert [(await client.get(path)).status_code for path in ["/report", "/order"] * 6] == [501, 200] * 6
    assert await world.names() == [f"order {number}" for number in range(6)]


async def test_a_thread_with_a_unit_of_its_own_stores_its_rows(world: World) -> None:
    async def job() -> None:
        async with new_db_ctx():
            await store(await db_session(world.db))

    async def report() -> Reply:
        await insert(world.db, "report")
        await asyncio.to_thread(lambda: asyncio.run(job()))
        return Reply(status=409)

    assert (await world.get(report)).status_code == 409
    assert await world.names() == ["stored in a thread"]
