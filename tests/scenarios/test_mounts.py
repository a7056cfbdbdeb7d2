"""Applications inside of applications, each with the adapter in it: a request has one unit of work all the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Application, Handler, Reply, Socket, Stream
from tests.support.database import eventually, insert, insert_row_that_fails_at_commit
from tests.support.world import World
from websockets.exceptions import ConnectionClosedOK

from ctxdb_core import commit_2xx, db_session


def mounted(world: World, handler: Handler, levels: int = 1) -> Application:
    """Put an application with `handler` so many levels below the application of `world`, and return the new one."""
    outer = world.application
    for _ in range(levels):
        inner = Application()
        outer.mounts["/inner"] = inner
        outer = inner
    outer.routes["/write"] = handler
    return outer


@pytest.mark.parametrize("levels", [1, 2])
async def test_a_mounted_application_shares_the_unit_of_work(world: World, levels: int) -> None:
    committed: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        committed.append(session)

    async def handler() -> Reply:
        used.append(await insert(world.db, "inner"))
        assert await db_session(world.db) is used[0]
        return Reply("done")

    used: list[AsyncSession] = []
    mounted(world, handler, levels)
    world.application.before_commit = before_commit
    client = await world.start()
    response = await client.post("/inner" * levels + "/write")
    assert (response.status_code, response.text) == (200, "done")
    assert await world.names() == ["inner"]
    assert committed == used


async def test_the_outer_application_has_its_own_routes(world: World) -> None:
    async def inner() -> Reply:
        await insert(world.db, "inner")
        return Reply()

    async def outer() -> Reply:
        await insert(world.db, "outer")
        return Reply()

    mounted(world, inner)
    client = await world.start(("/write", outer))
    assert (await client.post("/write")).status_code == 200
    assert await world.names() == ["outer"]
    assert (await client.post("/inner/write")).status_code == 200
    assert await world.names() == ["inner", "outer"]


async def test_the_outer_adapters_policy_decides(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "inner")
        return Reply(status=303)

    mounted(world, handler)
    world.application.commit_policy = commit_2xx
    client = await world.start()
    assert (await client.post("/inner/write")).status_code == 303
    assert await world.names() == []


@pytest.mark.parametrize("status", [400, 503])
async def test_an_error_of_a_mounted_application_rolls_back(world: World, status: int) -> None:
    async def handler() -> Reply:
        await insert(world.db, "inner")
        return Reply(status=status)

    mounted(world, handler)
    client = await world.start()
    assert (await client.post("/inner/write")).status_code == status
    assert await world.names() == []


async def test_an_exception_of_a_mounted_application_rolls_back(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "inner")
        raise LookupError

    mounted(world, handler)
    client = await world.start()
    assert (await client.post("/inner/write")).status_code == 500
    assert await world.names() == []


async def test_a_failing_commit_of_a_mounted_application_is_an_error(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "inner")
        await insert_row_that_fails_at_commit(world.db)
        return Reply("success")

    mounted(world, handler)
    client = await world.start()
    response = await client.post("/inner/write")
    assert response.status_code == 500
    assert "success" not in response.text
    assert await world.names() == []


@pytest.mark.exception_handlers
async def test_a_failing_commit_reaches_the_handlers_of_the_application_around_it(world: World) -> None:
    async def handler() -> Reply:
        await insert_row_that_fails_at_commit(world.db)
        return Reply("success")

    mounted(world, handler)
    world.application.exception_statuses[IntegrityError] = 409
    client = await world.start()
    response = await client.post("/inner/write")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")


async def test_a_stream_of_a_mounted_application_works_on_with_the_same_session(world: World) -> None:
    async def handler() -> Stream:
        session = await insert(world.db, "response")

        async def chunks() -> AsyncGenerator[str, None]:
            assert world.database.checked_out == 0
            assert await db_session(world.db) is session
            await insert(world.db, "stream")
            yield "body"

        return Stream(chunks())

    mounted(world, handler)
    client = await world.start()
    response = await client.get("/inner/write")
    assert (response.status_code, response.text) == (200, "body")
    await eventually(lambda: not world.database.checked_out, "the stream's connection is not back")
    assert await world.names() == ["response", "stream"]


@pytest.mark.sockets
@pytest.mark.postgresql
async def test_a_websocket_of_a_mounted_application_is_one_unit_of_work(world: World) -> None:
    async def handler(socket: Socket) -> None:
        for name in ("one", "two"):
            await insert(world.db, name)
            await socket.send(name)

    world.application.mounts["/inner"] = Application(sockets={"/socket": handler})
    await world.start()
    async with world.open_socket("/inner/socket") as client:
        assert await client.recv() == "one"
        assert await client.recv() == "two"
        with pytest.raises(ConnectionClosedOK):
            await client.recv()
        assert await world.names() == ["one", "two"]
