"""Pages that ask for their parts at once: gathered coroutines, groups of tasks, and loaders in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from tests.support.application import Reply
from tests.support.database import Database, Item, insert
from tests.support.world import World

from ctxdb_core import DBConnect, db_session

PARTS = 8


async def part(db: DBConnect, number: int) -> int:
    session = await db_session(db)
    session.add(Item(name=f"seen {number}"))
    await session.scalars(select(Item))
    result: int | None = await session.scalar(text("SELECT CAST(:number AS INT)"), {"number": number})
    return -1 if result is None else result


async def by_gather(db: DBConnect) -> list[int]:
    return await asyncio.gather(*(part(db, number) for number in range(PARTS)))


async def by_task_group(db: DBConnect) -> list[int]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part(db, number)) for number in range(PARTS)]
    return [task.result() for task in tasks]


async def by_streams(db: DBConnect) -> list[int]:
    async def sum_up(number: int) -> int:
        rows = await (await db_session(db)).stream(text(f"SELECT {number} FROM generate_series(1, 100)"))
        numbers: list[int] = [row[0] async for row in rows]
        assert len(numbers) == 100
        await part(db, number)
        return numbers[99]

    return await asyncio.gather(*(sum_up(number) for number in range(PARTS)))


@pytest.mark.parametrize("ask", [by_gather, by_task_group, by_streams])
async def test_parts_of_a_page_come_whole_on_a_cold_pool(
    world: World, database: Database, ask: Callable[[DBConnect], Awaitable[list[int]]]
) -> None:
    async def page() -> Reply:
        return Reply(repr(await ask(world.db)))

    async with database.connect(pool_size=1, pool_timeout=5) as db:
        world.db = db
        client = await world.start(("/", page))
        response = await client.get("/")
        await world.stop()
    assert (response.status_code, response.text) == (200, repr(list(range(PARTS))))
    assert await world.names() == [f"seen {number}" for number in range(PARTS)]


@pytest.mark.exception_handlers
async def test_a_part_that_fails_fails_its_page_alone(world: World) -> None:
    async def page() -> Reply:
        await insert(world.db, "page")
        await asyncio.gather(*(part(world.db, number) for number in range(4)), insert(world.db, "page"))
        return Reply()

    async def order() -> Reply:
        await insert(world.db, f"order {len(await world.names())}")
        return Reply()

    world.application.exception_statuses[IntegrityError] = 409
    client = await world.start(("/page", page), ("/order", order))
    statuses = [(await client.get(path)).status_code for path in ["/page", "/order"] * 6]
    assert statuses == [409, 200] * 6
    assert await world.names() == [f"order {number}" for number in range(6)]
