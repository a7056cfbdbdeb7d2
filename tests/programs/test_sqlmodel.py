"""Programs whose sessions are SQLModel's, with its `exec`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from tests.support.application import Reply
from tests.support.database import Database, Item
from tests.support.world import World

from ctxdb_core import DBConnect, StatementInterruptedError, db_session

sqlmodel: Any = pytest.importorskip("sqlmodel")
AsyncSession: Any = pytest.importorskip("sqlmodel.ext.asyncio.session").AsyncSession


@pytest.fixture
async def world(world: World, database: Database) -> AsyncIterator[World]:
    def make(engine: AsyncEngine) -> async_sessionmaker[Any]:
        return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)

    async with DBConnect(lambda host: database.watch_new(pool_size=1, pool_timeout=5), make, host="127.0.0.1") as db:
        world.db = db
        yield world
        await world.stop()
        await database.assert_quiet()


async def test_parts_of_a_page_find_what_they_have_added(world: World) -> None:
    async def part(number: int) -> str:
        session: Any = await db_session(world.db)
        session.add(Item(name=str(number)))
        found = await session.exec(sqlmodel.select(Item).where(Item.name == str(number)))
        return str(found.one().name)

    async def page() -> Reply:
        return Reply(" ".join(await asyncio.gather(*map(part, range(5)))))

    assert (await world.get(page)).text == "0 1 2 3 4"
    assert await world.names() == ["0", "1", "2", "3", "4"]


@pytest.mark.exception_handlers
@pytest.mark.parametrize("has_written", [False, True])
async def test_a_page_goes_on_without_its_slow_part_if_it_has_only_read(world: World, *, has_written: bool) -> None:
    async def page() -> Reply:
        session: Any = await db_session(world.db)
        if has_written:
            session.add(Item(name="order"))
        await session.exec(sqlmodel.select(Item))
        with suppress(TimeoutError):
            await asyncio.wait_for(session.exec(text("SELECT pg_sleep(300)")), 0.05)
        return Reply(str(len((await session.exec(sqlmodel.select(Item))).all())))

    world.application.exception_statuses[StatementInterruptedError] = 507
    response = await world.get(page)
    if has_written:
        assert response.status_code == 507
    else:
        assert (response.status_code, response.text) == (200, "0")
    assert await world.names() == []
