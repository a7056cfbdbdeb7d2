"""Databases in memory: each is one database, on whichever event loop it is used."""

from __future__ import annotations

import asyncio
import gc
import threading

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool
from tests.support.database import eventually

from ctxdb_core import DBConnect, db_session, new_db_ctx

URL = "sqlite+aiosqlite://"


async def create_table(db: DBConnect) -> None:
    async with new_db_ctx():
        await (await db_session(db)).execute(text("CREATE TABLE item (name TEXT)"))


async def count(db: DBConnect) -> int | None:
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(text("INSERT INTO item VALUES ('one')"))
        number: int | None = await session.scalar(text("SELECT count(*) FROM item"))
        return number


@pytest.fixture(
    params=[
        lambda: DBConnect.from_url(URL),
        lambda: DBConnect.from_url("sqlite+aiosqlite:///file:shop?mode=memory&uri=true", poolclass=StaticPool),
        lambda: DBConnect(lambda host: create_async_engine(URL, poolclass=StaticPool), host="memory"),
        lambda: DBConnect(lambda: create_async_engine(URL)),
        lambda: DBConnect.from_engine(create_async_engine(URL)),
    ],
    ids=["url", "uri", "creator", "creator without a host", "engine"],
)
def db(request: pytest.FixtureRequest) -> DBConnect:
    db: DBConnect = request.param()
    return db


def test_the_next_event_loop_finds_the_rows_that_the_first_has_stored(db: DBConnect) -> None:
    asyncio.run(create_table(db))
    assert [asyncio.run(count(db)) for _ in range(3)] == [1, 2, 3]
    asyncio.run(_dispose(db))


async def test_an_event_loop_of_another_thread_finds_the_rows_that_this_loop_has_stored(db: DBConnect) -> None:
    await create_table(db)
    assert await asyncio.to_thread(asyncio.run, count(db)) == 1
    assert await count(db) == 2
    await _dispose(db)


async def _dispose(db: DBConnect) -> None:
    engine = await db.engine()
    await db.close()
    await engine.dispose()


def test_listeners_are_told_once_of_the_engine_of_a_database_in_memory() -> None:
    db = DBConnect.from_url(URL)
    engines: list[AsyncEngine] = []
    db.on_engine(lambda host, engine: engines.append(engine))
    asyncio.run(create_table(db))
    asyncio.run(count(db))
    assert len(engines) == 1
    asyncio.run(db.close())


def test_a_closed_object_begins_with_an_empty_database() -> None:
    db = DBConnect.from_url(URL)
    asyncio.run(create_table(db))
    asyncio.run(db.close())
    asyncio.run(create_table(db))
    asyncio.run(db.close())


@pytest.mark.skipif(not hasattr(aiosqlite.Connection, "stop"), reason="the driver cannot end its thread without a loop")
async def test_a_database_that_is_thrown_away_after_its_event_loop_leaves_no_thread() -> None:
    threads = threading.active_count()

    def use_and_forget() -> None:
        asyncio.run(create_table(DBConnect.from_url(URL)))

    thread = threading.Thread(target=use_and_forget)
    thread.start()
    thread.join()
    gc.collect()
    await eventually(lambda: threading.active_count() <= threads, "the driver's thread goes on")
