"""Promise 4: a client may leave at any time."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from sqlalchemy import text
from tests.support.application import Reply, current_request
from tests.support.database import eventually, insert
from tests.support.interruption import Interruption
from tests.support.server import RawClient
from tests.support.world import World

from ctxdb_core import ContextClosedError, StatementInterruptedError, db_session

# The servers' own way: a handler is not told that its client has left.


@pytest.mark.sockets
@pytest.mark.postgresql
async def test_a_client_that_leaves_before_the_response_changes_nothing(world: World) -> None:
    entered, proceed = asyncio.Event(), asyncio.Event()

    async def handler() -> Reply:
        await insert(world.db, "one")
        entered.set()
        await proceed.wait()
        return Reply()

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        await client.send("/")
        await entered.wait()
        client.abort()
    proceed.set()
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == ["one"]


@pytest.mark.sockets
@pytest.mark.postgresql
async def test_a_client_that_leaves_during_its_upload_is_rolled_back(world: World) -> None:
    entered = asyncio.Event()
    errors: list[BaseException] = []

    async def handler() -> Reply:
        await insert(world.db, "one")
        entered.set()
        try:
            await current_request.get().read()
        except BaseException as exc:
            errors.append(exc)
            raise
        return Reply()

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        await client.send("/", "POST", body=b"half", length=8)
        await entered.wait()
        client.abort()
    await eventually(lambda: bool(errors), "the handler waits for ever")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == []


@pytest.mark.sockets
@pytest.mark.postgresql
async def test_a_client_that_leaves_during_the_commit_changes_nothing(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        return Reply()

    await world.start(("/", handler))
    with world.database.held_commits():
        async with RawClient.connect(world.base_url) as client:
            await client.send("/")
            await world.database.commit_is_held()
            client.abort()
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == ["one"]


@pytest.mark.sockets
async def test_a_client_that_leaves_in_the_middle_of_a_large_response_changes_nothing(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        return Reply("x" * 8_000_000)

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        await client.send("/")
        assert await client.read_head() == 200
        client.abort()
    assert await world.names() == ["one"]


@pytest.mark.sockets
@pytest.mark.background
async def test_background_work_goes_on_without_its_client(world: World) -> None:
    entered, proceed = asyncio.Event(), asyncio.Event()

    async def background() -> None:
        entered.set()
        await proceed.wait()
        await insert(world.db, "background")

    async def handler() -> Reply:
        await insert(world.db, "response")
        return Reply("body", background=background)

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        await client.send("/")
        assert await client.read_head() == 200
        await entered.wait()
        client.abort()
    proceed.set()
    await eventually(lambda: world.database.checkouts == 2 and not world.database.checked_out, "no background work")
    assert await world.names() == ["background", "response"]


# Where a handler is cancelled as soon as its client has left.


async def leave(request: asyncio.Task[httpx.Response]) -> None:
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


@pytest.mark.cancelled_with_client
async def test_a_handler_cancelled_with_its_client_is_rolled_back(world: World) -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def handler() -> Reply:
        await insert(world.db, "one")
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        return Reply()

    client = await world.start(("/", handler))
    request = asyncio.create_task(client.get("/"))
    await entered.wait()
    await leave(request)
    await eventually(ended.is_set, "the handler was not cancelled")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == []


@pytest.mark.cancelled_with_client
@pytest.mark.postgresql
async def test_the_query_of_a_handler_cancelled_with_its_client_stops_on_the_server(world: World) -> None:
    async def handler() -> Reply:
        session = await insert(world.db, "one")
        await session.execute(text("SELECT pg_sleep(300)"))
        return Reply()

    client = await world.start(("/", handler))
    request = asyncio.create_task(client.get("/"))
    await eventually(lambda: bool(world.database.backends("wait_event = 'PgSleep'")), "no query")
    await leave(request)
    await eventually(lambda: not world.database.backends("wait_event = 'PgSleep'"), "the query runs on")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == []


@pytest.mark.cancelled_with_client
@pytest.mark.postgresql
@pytest.mark.parametrize("status", [200, 503])
async def test_a_response_whose_client_leaves_while_it_waits_for_a_query_of_another_task_is_rolled_back(
    world: World, status: int
) -> None:
    async def sleep() -> None:
        await (await db_session(world.db)).execute(text("SELECT pg_sleep(300)"))

    async def handler() -> Reply:
        await insert(world.db, "one")
        sleeping.append(asyncio.create_task(sleep()))
        await eventually(lambda: bool(world.database.backends("wait_event = 'PgSleep'")), "no query")
        returning.set()
        return Reply(status=status)

    sleeping: list[asyncio.Task[None]] = []
    returning = asyncio.Event()
    client = await world.start(("/", handler))
    request = asyncio.create_task(client.get("/"))
    await returning.wait()
    for _ in range(20):
        # In these turns of the event loop, the response comes to wait for the query.
        await asyncio.sleep(0)
    await leave(request)
    with pytest.raises((StatementInterruptedError, ContextClosedError)):
        await sleeping[0]
    await eventually(lambda: not world.database.backends("wait_event = 'PgSleep'"), "the query runs on")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == []


@pytest.mark.cancelled_with_client
@pytest.mark.postgresql
async def test_a_commit_is_seen_through_although_its_client_leaves(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        return Reply()

    client = await world.start(("/", handler))
    with world.database.held_commits():
        request = asyncio.create_task(client.get("/"))
        await world.database.commit_is_held()
        leaving = asyncio.create_task(leave(request))
        for _ in range(20):
            # These turns of the event loop would stop the handler, if anything did.
            await asyncio.sleep(0)
            assert world.database.backends("query ~ '^COMMIT' AND wait_event = 'advisory'")
    await leaving
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == ["one"]


@pytest.mark.cancelled_with_client
@pytest.mark.postgresql
async def test_requests_cancelled_at_any_step_are_whole_or_absent(world: World) -> None:
    """Each client leaves when its handler waits for one time more than the one before, until one gets its response."""
    interruption = Interruption(0)

    async def write(name: str) -> None:
        session = await db_session(world.db)
        for half in ("a", "b"):
            await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": f"{name}{half}"})

    async def handler() -> Reply:
        await interruption.run(write(current_request.get().query))
        return Reply()

    client = await world.start(("/", handler))
    while not interruption.has_been_missed:
        interruption = Interruption(interruption.step + 1)
        request = asyncio.create_task(client.get(f"/?{interruption.step:03}"))
        interruption.cancel_when(request.cancel)
        await asyncio.wait([request])
        await eventually(lambda: not world.database.checked_out, "a connection is not back")
    names = await world.names()
    assert names == [f"{name[:3]}{half}" for name in names[::2] for half in ("a", "b")]
    assert names[-1] == f"{interruption.step:03}b"
