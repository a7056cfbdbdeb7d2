"""Websockets: a unit of work spans the connection; `new_db_ctx()` gives each message its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from tests.support.application import Reply, Socket
from tests.support.database import eventually, insert, insert_row_that_fails_at_commit
from tests.support.world import World
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK

from ctxdb_core import new_db_ctx

pytestmark = pytest.mark.sockets


async def insert_each_message(world: World, socket: Socket) -> None:
    while (name := await socket.receive()) is not None:
        await insert(world.db, name)
        await socket.send(f"{name} written")


@pytest.mark.postgresql
async def test_a_websocket_is_one_unit_of_work_ended_before_its_close_frame(world: World) -> None:
    async def handler(socket: Socket) -> None:
        while (name := await socket.receive()) != "end":
            await insert(world.db, name or "")
            await socket.send("written")

    world.application.sockets["/"] = handler
    await world.start()
    async with world.open_socket() as client:
        for name in ("one", "two"):
            await client.send(name)
            assert await client.recv() == "written"
            assert await world.names() == []
        await client.send("end")
        with pytest.raises(ConnectionClosedOK):
            await client.recv()
        assert await world.names() == ["one", "two"]


async def test_a_client_that_closes_ends_the_unit_of_work_as_well(world: World) -> None:
    world.application.sockets["/"] = lambda socket: insert_each_message(world, socket)
    await world.start()
    async with world.open_socket() as client:
        await client.send("one")
        assert await client.recv() == "one written"
    await eventually(lambda: not world.database.checked_out, "the connection is not over")
    assert await world.names() == ["one"]


@pytest.mark.parametrize("code", [1011, 4000])
async def test_a_close_with_an_error_code_rolls_back(world: World, code: int) -> None:
    async def handler(socket: Socket) -> None:
        await insert(world.db, "one")
        await socket.close(code)

    world.application.sockets["/"] = handler
    await world.start()
    async with world.open_socket() as client:
        with pytest.raises(ConnectionClosedError) as closed:
            await client.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == code
    await eventually(lambda: not world.database.checked_out, "the connection is not over")
    assert await world.names() == []


async def test_an_exception_rolls_back_and_does_not_close_normally(world: World) -> None:
    async def handler(socket: Socket) -> None:
        await insert(world.db, "one")
        raise LookupError

    world.application.sockets["/"] = handler
    await world.start()
    async with world.open_socket() as client:
        with pytest.raises(ConnectionClosedError):
            await client.recv()
    await eventually(lambda: not world.database.checked_out, "the connection is not over")
    assert await world.names() == []


async def test_a_failing_commit_does_not_close_normally(world: World) -> None:
    async def handler(socket: Socket) -> None:
        await insert(world.db, "one")
        await insert_row_that_fails_at_commit(world.db)

    world.application.sockets["/"] = handler
    await world.start()
    async with world.open_socket() as client:
        with pytest.raises(ConnectionClosedError):
            await client.recv()
    await eventually(lambda: not world.database.checked_out, "the connection is not over")
    assert await world.names() == []


async def test_each_message_can_have_a_unit_of_work_of_its_own(world: World) -> None:
    """What was acknowledged is committed, what failed is not, and in between no connection is held."""

    async def handler(socket: Socket) -> None:
        while (name := await socket.receive()) is not None:
            try:
                async with new_db_ctx():
                    await insert(world.db, name)
                    if name == "bad":
                        raise LookupError
            except LookupError:
                await socket.send("refused")
            else:
                await socket.send("written")

    world.application.sockets["/"] = handler
    await world.start()
    async with world.open_socket() as client:
        expected: list[str] = []
        for name in ("one", "bad", "two"):
            await client.send(name)
            answer = await client.recv()
            assert world.database.checked_out == 0
            if answer == "written":
                expected.append(name)
            assert await world.names() == expected
    assert expected == ["one", "two"]


@pytest.mark.postgresql
async def test_many_open_websockets_hold_no_connection_between_messages(world: World) -> None:
    """Thirty on a pool of five, and requests are served beside them."""

    async def socket_handler(socket: Socket) -> None:
        while (name := await socket.receive()) is not None:
            async with new_db_ctx():
                await insert(world.db, name)
            await socket.send("written")

    async def handler() -> Reply:
        await insert(world.db, "request")
        return Reply()

    async def converse(number: int) -> None:
        async with world.open_socket("/socket") as client:
            for message in "ab":
                await client.send(f"{number:02}{message}")
                assert await client.recv() == "written"
                served.append(number)
                await release.wait()

    world.application.sockets["/socket"] = socket_handler
    http = await world.start(("/", handler))
    served: list[int] = []
    release = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(30):
            group.create_task(converse(number))
        await eventually(lambda: len(served) == 30, lambda: f"only {len(served)} were served")
        assert world.database.checked_out == 0
        assert (await http.post("/")).status_code == 200
        release.set()
    assert len(await world.names()) == 61


@pytest.mark.postgresql
async def test_a_client_that_leaves_during_a_message_leaves_nothing_behind(world: World) -> None:
    entered, proceed, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(socket: Socket) -> None:
        try:
            async with new_db_ctx():
                await insert(world.db, await socket.receive() or "")
                entered.set()
                await proceed.wait()
            with suppress(Exception):
                # What a server does with a message to nobody is its own affair.
                await socket.send("written")
            assert await socket.receive() is None
        finally:
            ended.set()

    world.application.sockets["/"] = handler
    await world.start()
    async with world.open_socket() as client:
        await client.send("one")
        await entered.wait()
        client.transport.abort()
        with pytest.raises(ConnectionClosed):
            await client.recv()
    proceed.set()
    await eventually(ended.is_set, "the handler waits for ever")
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    assert await world.names() in ([], ["one"])
