"""A stream whose client has left: frameworks stop it without an error, and go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Reply, Stream
from tests.support.database import Item, eventually, insert
from tests.support.server import RawClient
from tests.support.world import World

from ctxdb_core import commit_db_session, db_session

pytestmark = pytest.mark.sockets


async def read_a_byte_and_leave(world: World) -> None:
    async with RawClient.connect(world.base_url) as client:
        await client.send("/")
        assert await client.read_head() == 200
        await client.reader.readexactly(1)
        client.abort()


@pytest.mark.parametrize("in_own_task", [False, True])
async def test_uncommitted_work_of_a_cut_off_stream_is_rolled_back(world: World, in_own_task: bool) -> None:
    """On Python 3.11, `asyncio.wait_for` makes a task of what it waits for."""
    ended = asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        try:
            await insert(world.db, "committed")
            await commit_db_session(world.db)
            half = insert(world.db, "half")
            await (asyncio.create_task(half) if in_own_task else half)
            while True:
                await asyncio.sleep(0)
                yield "x" * 65536
        finally:
            ended.set()

    async def handler() -> Stream:
        await insert(world.db, "response")
        return Stream(chunks())

    await world.start(("/", handler))
    await read_a_byte_and_leave(world)
    await eventually(ended.is_set, "the stream goes on")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == ["committed", "response"]


async def test_a_session_that_a_cut_off_stream_has_opened_is_rolled_back(world: World) -> None:
    ended = asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "x" * 65536
                if not ended.is_set():
                    await insert(world.db, "half")
                    ended.set()
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def handler() -> Stream:
        return Stream(chunks())

    await world.start(("/", handler))
    await read_a_byte_and_leave(world)
    await eventually(ended.is_set, "the stream goes on")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == []


@pytest.mark.parametrize("handler_writes", [False, True])
async def test_objects_that_a_cut_off_stream_has_only_added_are_not_stored(world: World, handler_writes: bool) -> None:
    ended = asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        try:
            yield "x"
            (await db_session(world.db)).add(Item(name="half"))
            while True:
                await asyncio.sleep(0)
                yield "x" * 65536
        finally:
            ended.set()

    async def handler() -> Stream:
        if handler_writes:
            await insert(world.db, "response")
        return Stream(chunks())

    await world.start(("/", handler))
    await read_a_byte_and_leave(world)
    await eventually(ended.is_set, "the stream goes on")
    await eventually(lambda: not world.db.status().units, "the request goes on")
    assert await world.names() == (["response"] if handler_writes else [])


@pytest.mark.background
async def test_the_background_task_behind_a_cut_off_stream_is_committed(world: World) -> None:
    done = asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        while True:
            await asyncio.sleep(0)
            yield "x" * 65536

    async def background() -> None:
        await insert(world.db, "background")
        done.set()

    async def handler() -> Stream | Reply:
        await insert(world.db, "response")
        return Stream(chunks(), background=background)

    await world.start(("/", handler))
    await read_a_byte_and_leave(world)
    await eventually(done.is_set, "no background work")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() == ["background", "response"]


@pytest.mark.background
@pytest.mark.parametrize("how", ["statement", "object", "kept_session", "nothing"])
async def test_background_task_does_not_commit_the_work_of_a_cut_off_stream(world: World, how: str) -> None:
    done = asyncio.Event()
    sessions: list[AsyncSession] = []

    async def chunks() -> AsyncGenerator[str, None]:
        sessions.append(await insert(world.db, "committed"))
        await commit_db_session(world.db)
        sessions[0].add(Item(name="half"))
        await sessions[0].flush()
        while True:
            await asyncio.sleep(0)
            yield "x" * 65536

    async def background() -> None:
        match how:
            case "statement":
                assert await insert(world.db, "background") is sessions[0]
            case "object":
                (await db_session(world.db)).add(Item(name="background"))
            case "kept_session":
                await sessions[0].execute(text("INSERT INTO item VALUES ('background')"))
        done.set()

    async def handler() -> Stream:
        await insert(world.db, "response")
        return Stream(chunks(), background=background)

    await world.start(("/", handler))
    await read_a_byte_and_leave(world)
    await eventually(done.is_set, "no background work")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    expected = ["committed", "response"] if how == "nothing" else ["background", "committed", "response"]
    assert await world.names() == expected
