"""Promise 3: what happens while a response travels, and behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import text
from tests.support.application import Reply, Stream, current_request
from tests.support.database import eventually, insert, insert_row_that_fails_at_commit
from tests.support.server import RawClient
from tests.support.world import World

from ctxdb_core import commit_db_session, db_session, set_rollback_only


@pytest.mark.background
async def test_a_background_task_works_on_with_the_same_session(world: World) -> None:
    connections: list[int] = []

    async def handler() -> Reply:
        session = await insert(world.db, "response")

        async def background() -> None:
            connections.append(world.database.checked_out)
            assert await db_session(world.db) is session
            await session.execute(text("INSERT INTO item VALUES ('background')"))

        return Reply(background=background)

    assert (await world.get(handler)).status_code == 200
    await eventually(lambda: world.database.checkouts == 2 and not world.database.checked_out, "no background work")
    assert await world.names() == ["background", "response"]
    assert connections == [0]


@pytest.mark.background
async def test_a_background_task_that_fails_cannot_undo_the_response(world: World) -> None:
    async def background() -> None:
        await insert(world.db, "background")
        raise LookupError

    async def handler() -> Reply:
        await insert(world.db, "response")
        return Reply(background=background)

    assert (await world.get(handler)).status_code == 200
    await eventually(lambda: world.database.checkouts == 2 and not world.database.checked_out, "no background work")
    assert await world.names() == ["response"]


@pytest.mark.background
async def test_background_work_behind_a_rolled_back_response_is_committed(world: World) -> None:
    async def background() -> None:
        await insert(world.db, "background")

    async def handler() -> Reply:
        await insert(world.db, "response")
        return Reply(status=400, background=background)

    assert (await world.get(handler)).status_code == 400
    await eventually(lambda: world.database.checkouts == 2 and not world.database.checked_out, "no background work")
    assert await world.names() == ["background"]


@pytest.mark.parametrize(("status", "writes"), [(200, False), (404, True)])
async def test_a_mark_for_rollback_does_not_hold_for_the_body_behind_the_response(
    world: World, status: int, writes: bool
) -> None:
    async def body() -> AsyncGenerator[str, None]:
        await insert(world.db, "body")
        yield "body"

    async def handler() -> Stream:
        if writes:
            await insert(world.db, "response")
        set_rollback_only()
        return Stream(body(), status=status)

    assert (await world.get(handler)).status_code == status
    await eventually(lambda: world.database.checkouts == 1 + writes and not world.database.checked_out, "no body")
    assert await world.names() == ["body"]


@pytest.mark.background
async def test_background_work_whose_commit_fails_leaves_nothing_behind(world: World) -> None:
    async def background() -> None:
        await insert(world.db, "background")
        await insert_row_that_fails_at_commit(world.db)

    async def handler() -> Reply:
        await insert(world.db, "response")
        return Reply(background=background)

    assert (await world.get(handler)).status_code == 200
    await eventually(lambda: world.database.checkouts == 2 and not world.database.checked_out, "no background work")
    assert await world.names() == ["response"]


@pytest.mark.sockets
@pytest.mark.background
@pytest.mark.postgresql
async def test_long_background_work_holds_neither_its_client_nor_a_connection(world: World) -> None:
    """Ten tasks that wait, on a pool of five."""
    release = asyncio.Event()
    waiting: list[str] = []

    async def handler() -> Reply:
        name = current_request.get().query
        await insert(world.db, f"{name} response")

        async def background() -> None:
            waiting.append(name)
            await release.wait()
            await insert(world.db, f"{name} background")

        return Reply(name, background=background)

    async with AsyncExitStack() as stack:
        await world.start(("/", handler))
        for number in range(10):
            client = await stack.enter_async_context(RawClient.connect(world.base_url))
            await client.send(f"/?{number}")
            assert await client.read_head() == 200
            assert await client.read_body() == str(number).encode()
        await eventually(lambda: len(waiting) == 10, "no background work")
        assert world.database.checked_out == 0
        release.set()
    await eventually(lambda: world.database.checkouts == 20 and not world.database.checked_out, "no background work")
    assert await world.names() == [f"{n} {kind}" for n in range(10) for kind in ("background", "response")]


async def test_a_stream_works_on_with_the_same_session(world: World) -> None:
    async def handler() -> Stream:
        session = await insert(world.db, "response")

        async def chunks() -> AsyncGenerator[str, None]:
            assert world.database.checked_out == 0
            assert await db_session(world.db) is session
            yield str(await session.scalar(text("SELECT count(*) FROM item")))
            await session.execute(text("INSERT INTO item VALUES ('stream')"))
            yield " rows"

        return Stream(chunks())

    assert (await world.get(handler)).text == "1 rows"
    await eventually(lambda: not world.database.checked_out, "the stream's connection is not back")
    assert await world.names() == ["response", "stream"]


async def test_a_stream_can_give_its_connection_back_while_it_is_sent(world: World) -> None:
    held: list[int] = []

    async def chunks() -> AsyncGenerator[str, None]:
        await insert(world.db, "stream")
        await commit_db_session(world.db)
        held.append(world.database.checked_out)
        yield "body"

    async def handler() -> Stream:
        return Stream(chunks())

    assert (await world.get(handler)).text == "body"
    assert held == [0]
    assert await world.names() == ["stream"]


@pytest.mark.sockets
async def test_a_stream_that_fails_undoes_only_its_own_work(world: World) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        yield "begun"
        await insert(world.db, "stream")
        raise LookupError

    async def handler() -> Stream:
        await insert(world.db, "response")
        return Stream(chunks())

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        await client.send("/")
        assert await client.read_head() == 200
        await client.reader.read()
    await eventually(
        lambda: world.database.checkouts == 2 and not world.database.checked_out, "the stream is not rolled back"
    )
    assert await world.names() == ["response"]


@pytest.mark.background
async def test_a_background_task_that_fails_cannot_undo_a_stream(world: World) -> None:
    committed: list[list[str]] = []

    async def chunks() -> AsyncGenerator[str, None]:
        await insert(world.db, "stream")
        yield "body"

    async def background() -> None:
        committed.append(await world.names())
        raise LookupError

    async def handler() -> Stream:
        return Stream(chunks(), background=background)

    assert (await world.get(handler)).text == "body"
    await eventually(lambda: bool(committed), "no background work")
    assert committed == [["stream"]]


@pytest.mark.sockets
async def test_a_stream_whose_commit_fails_breaks_off(world: World) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        await insert(world.db, "stream")
        await insert_row_that_fails_at_commit(world.db)
        yield "body"

    async def handler() -> Stream:
        await insert(world.db, "response")
        return Stream(chunks())

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        await client.send("/")
        assert await client.read_head() == 200
        body = await client.reader.read()
    assert b"body" in body
    assert not body.endswith(b"0\r\n\r\n")
    await eventually(lambda: not world.database.checked_out, "the stream is not rolled back")
    assert await world.names() == ["response"]


@pytest.mark.sockets
async def test_slow_clients_hold_no_connection(world: World) -> None:
    """Thirty clients that do not read, on a pool of five: a sixth request is served at once."""

    async def chunks() -> AsyncGenerator[str, None]:
        while True:
            await asyncio.sleep(0)
            yield "x" * 65536

    async def download() -> Stream:
        await (await db_session(world.db)).execute(text("SELECT 1"))
        return Stream(chunks())

    async def write() -> Reply:
        await insert(world.db, "quick")
        return Reply()

    client = await world.start(("/download", download), ("/", write))
    async with asyncio.TaskGroup() as group:
        release = asyncio.Event()

        async def read_nothing() -> None:
            async with RawClient.connect(world.base_url) as slow:
                await slow.send("/download")
                assert await slow.read_head() == 200
                started.append(slow)
                await release.wait()
                slow.abort()

        started: list[RawClient] = []
        for _ in range(30):
            group.create_task(read_nothing())
        await eventually(lambda: len(started) == 30, lambda: f"only {len(started)} downloads were begun")
        assert world.database.checked_out == 0
        assert (await client.post("/")).status_code == 200
        release.set()
    assert await world.names() == ["quick"]


@pytest.mark.sockets
@pytest.mark.parametrize("in_stream", [False, True])
async def test_a_client_that_leaves_during_a_stream_leaves_nothing_behind(world: World, in_stream: bool) -> None:
    ended = asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        try:
            if in_stream:
                await insert(world.db, "stream")
            while True:
                # A server whose client has left may drop what the application sends, without ever letting it wait.
                await asyncio.sleep(0)
                yield "x" * 65536
        finally:
            ended.set()

    async def handler() -> Stream:
        await insert(world.db, "response")
        return Stream(chunks())

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        await client.send("/")
        assert await client.read_head() == 200
        await client.reader.readexactly(1)
        client.abort()
    await eventually(ended.is_set, "the stream goes on")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert "response" in await world.names()
