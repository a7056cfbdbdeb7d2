"""Many requests at once, on a pool of five."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from tests.support.application import Refusal, Reply, current_request
from tests.support.database import eventually, insert, insert_row_that_fails_at_commit
from tests.support.world import World

from ctxdb_core import db_session, gather_in_new_ctx


async def test_forty_requests_share_a_pool_of_five(world: World) -> None:
    """A third of them is answered as an error: exactly the others are in the database."""

    async def handler() -> Reply:
        name = current_request.get().query
        await insert(world.db, name)
        return Reply(status=400 if int(name) % 3 == 0 else 200)

    client = await world.start(("/", handler))
    names = [f"{number:04}" for number in range(40)]
    statuses = await world.statuses(client, [f"/?{name}" for name in names])
    succeeded = [name for name, status in zip(names, statuses, strict=True) if status == 200]
    assert succeeded == [name for name in names if int(name) % 3]
    assert await world.names() == succeeded


@pytest.mark.postgresql
async def test_many_requests_that_fail_in_every_way_leave_the_pool_to_the_others(world: World) -> None:
    async def handler() -> Reply:
        name = current_request.get().query
        session = await insert(world.db, name)
        match int(name) % 6:
            case 0:
                raise LookupError
            case 1:
                raise Refusal(409)
            case 2:
                await insert_row_that_fails_at_commit(world.db)
            case 3:
                await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            case 4:
                await session.execute(text("SELECT 1 / 0"))
        return Reply()

    client = await world.start(("/", handler))
    names = [f"{number:04}" for number in range(36)]
    statuses = await world.statuses(client, [f"/?{name}" for name in names])
    assert statuses == [500, 409, 500, 500, 500, 200] * 6
    assert await world.names() == names[5::6]


@pytest.mark.postgresql
async def test_the_whole_pool_is_there_after_requests_that_were_given_up(world: World) -> None:
    """Thirty wait for a connection, or on the server: they are cancelled, and five more use the whole pool at once."""

    async def sleep() -> Reply:
        async with asyncio.timeout(None) as timeout:
            timeouts.append(timeout)
            await (await db_session(world.db)).execute(text("SELECT pg_sleep(300)"))
        return Reply()

    async def meet() -> Reply:
        await (await db_session(world.db)).execute(text("SELECT 1"))
        await barrier.wait()
        return Reply()

    timeouts: list[asyncio.Timeout] = []
    barrier = asyncio.Barrier(5)
    client = await world.start(("/sleep", sleep), ("/meet", meet))
    sleeping = asyncio.create_task(world.statuses(client, ["/sleep"] * 30))
    await eventually(lambda: len(timeouts) == 30, "the requests have not begun")
    await eventually(lambda: len(world.database.backends("wait_event = 'PgSleep'")) == 5, "no queries")
    for timeout in timeouts:
        timeout.reschedule(0)
    # aiohttp answers a TimeoutError by a 504.
    assert set(await sleeping) <= {500, 504}
    await eventually(lambda: not world.database.backends("wait_event = 'PgSleep'"), "queries run on")
    assert await world.statuses(client, ["/meet"] * 5) == [200] * 5


@pytest.mark.postgresql
async def test_requests_with_several_sessions_each_share_the_pool(world: World) -> None:
    async def handler() -> Reply:
        name = current_request.get().query

        async def write(part: int) -> None:
            await insert(world.db, f"{name} {part}")

        await gather_in_new_ctx(*(lambda part=part: write(part) for part in range(4)))
        return Reply()

    client = await world.start(("/", handler))
    assert await world.statuses(client, [f"/?{number:02}" for number in range(12)]) == [200] * 12
    assert await world.names() == [f"{number:02} {part}" for number in range(12) for part in range(4)]


@pytest.mark.postgresql
async def test_hosts_change_under_traffic_without_an_error(world: World) -> None:
    count = 0

    async def handler() -> Reply:
        nonlocal count
        count += 1
        name = f"{count:04}"
        await insert(world.db, name)
        await asyncio.sleep(0)
        return Reply(name)

    client = await world.start(("/", handler))

    async def request_repeatedly() -> None:
        for _ in range(8):
            assert (await client.post("/")).status_code == 200

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(request_repeatedly())
        for number in range(10):
            before = count
            await world.db.change_host(f"127.0.0.{number}")
            await eventually(lambda before=before: count > before or count >= 48, "no traffic")  # type: ignore[misc]  # a default
    assert len(await world.names()) == 48


@pytest.mark.postgresql
async def test_an_error_waits_for_the_query_of_another_task(world: World) -> None:
    async def query() -> object:
        return await (await db_session(world.db)).scalar(text("SELECT 7 FROM pg_advisory_xact_lock(1)"))

    async def handler() -> Reply:
        await insert(world.db, "undone")
        querying.append(asyncio.create_task(query()))
        await eventually(lambda: bool(world.database.backends("wait_event = 'advisory'")), "no query")
        returning.set()
        return Reply(status=503)

    querying: list[asyncio.Task[object]] = []
    returning = asyncio.Event()
    client = await world.start(("/", handler))
    with world.database.held_commits():
        request = asyncio.create_task(client.get("/"))
        await returning.wait()
        for _ in range(200):
            # In these turns of the event loop, the response would stop the query, if anything did.
            await asyncio.sleep(0)
            assert not querying[0].done()
    assert await querying[0] == 7
    assert (await request).status_code == 503
    assert await world.names() == []
