"""Server-sent events that ask for a row's state, again and again, until it is what the client waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from tests.support.application import Reply, Stream
from tests.support.database import Database, insert
from tests.support.server import RawClient
from tests.support.world import World

from ctxdb_core import DBConnect, atomic_db_session, db_session


class Base(DeclarativeBase):
    pass


class Job(Base):
    __tablename__ = "job"
    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str]


@pytest.fixture(autouse=True)
async def jobs(world: World) -> AsyncGenerator[None]:
    await world.database.query("CREATE TABLE job (id INTEGER PRIMARY KEY, state VARCHAR(20))")
    await world.database.query("INSERT INTO job VALUES (1, 'running')")
    yield
    await world.database.query("DROP TABLE job")


async def by_query(db: DBConnect) -> Job:
    return (await (await db_session(db)).scalars(select(Job).where(Job.id == 1))).one()


async def by_get(db: DBConnect) -> Job:
    return await (await db_session(db)).get_one(Job, 1)


async def by_atomic_block(db: DBConnect) -> Job:
    async with atomic_db_session(db) as session:
        return (await session.scalars(select(Job).where(Job.id == 1))).one()


@pytest.mark.parametrize("look", [by_query, by_get, by_atomic_block])
async def test_events_tell_of_a_change_and_hold_no_connection(
    world: World, look: Callable[[DBConnect], Awaitable[Job]]
) -> None:
    polled, go_on = asyncio.Event(), asyncio.Event()

    async def events() -> Stream:
        known = await look(world.db)

        async def body() -> AsyncGenerator[str]:
            yield f"{known.state} "
            for _ in range(5):
                job = await look(world.db)
                yield f"{job.state} "
                if job.state == "done":
                    break
                polled.set()
                await go_on.wait()

        return Stream(body())

    client = await world.start(("/", events))
    listening = asyncio.create_task(client.get("/"))
    await asyncio.wait_for(polled.wait(), 10)
    await world.database.assert_quiet()
    await world.database.query("UPDATE job SET state = 'done'")
    go_on.set()
    assert (await listening).text.split() == ["running", "running", "done"]


async def test_three_readers_that_have_stopped_reading_delay_no_other_request(world: World, database: Database) -> None:
    sent, is_over = 0, False

    async def events() -> Stream:
        async def body() -> AsyncGenerator[str]:
            nonlocal sent
            # Some servers do not tell the application that a client has left.
            while not is_over:
                await by_query(world.db)
                sent += 1
                yield "x" * 200_000

        return Stream(body())

    async def order() -> Reply:
        await insert(world.db, "ordered")
        return Reply()

    async with database.connect(pool_size=3, pool_timeout=5) as db:
        world.db = db
        await world.start(("/events", events), ("/order", order))
        async with AsyncExitStack() as stalled:
            for _ in range(3):
                reader = await stalled.enter_async_context(RawClient.connect(world.base_url))
                await reader.send("/events")
                assert await reader.read_head() == 200
            await _stands_still(lambda: sent)
            async with RawClient.connect(world.base_url) as client:
                await client.send("/order")
                assert await client.read_head() == 200
            is_over = True
        await world.stop()
    assert await database.names() == ["ordered"]


async def _stands_still(count: Callable[[], int]) -> None:
    """Wait until `count` has not changed for some turns: the clients' and the server's buffers are full."""
    before, turns = -1, 0
    while turns < 20:
        await asyncio.sleep(0.01)
        turns = turns + 1 if count() == before else 0
        before = count()


async def test_a_row_lock_is_kept_until_the_body_has_ended(world: World) -> None:
    async def body() -> AsyncGenerator[str]:
        session = await db_session(world.db)
        job = (await session.scalars(select(Job).with_for_update())).one()
        yield "locked "
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        yield "locked "
        assert await session.scalar(text("SELECT pg_backend_pid()")) == pid
        assert (await world.database.query("SELECT id FROM job FOR UPDATE SKIP LOCKED")) == []
        job.state = "done"
        yield "written"

    async def handler() -> Stream:
        return Stream(body())

    assert (await world.get(handler)).text == "locked locked written"
    assert await world.database.query("SELECT state FROM job") == [("done",)]


async def test_a_block_around_the_chunks_has_one_transaction(world: World) -> None:
    async def body() -> AsyncGenerator[str]:
        async with atomic_db_session(world.db, isolation_level="REPEATABLE READ"):
            yield (await by_query(world.db)).state
            await world.database.query("UPDATE job SET state = 'done'")
            session = await db_session(world.db)
            yield str(await session.scalar(select(Job.state)))

    async def handler() -> Stream:
        return Stream(body())

    assert (await world.get(handler)).text == "runningrunning"
