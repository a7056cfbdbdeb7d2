"""A websocket: its unit of work, the upgrade, and the close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import websockets
from aiohttp import web
from aiohttp.typedefs import Handler
from sqlalchemy.exc import IntegrityError
from tests.aiohttp.conftest import Serve, either_way
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus

from ctxdb_aiohttp import setup
from ctxdb_core import DBConnect, commit_2xx, db_session


def application(handler: Handler, **options: object) -> web.Application:
    app = web.Application()
    app.router.add_get("/", handler)
    setup(app, **options)  # type: ignore[arg-type]  # whichever the test is about
    return app


@asynccontextmanager
async def connect(base_url: str) -> AsyncIterator[ClientConnection]:
    async with websockets.connect(base_url.replace("http", "ws", 1), proxy=None) as client:
        yield client


async def test_work_before_the_upgrade_is_committed_with_the_upgrade(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        session = await insert(db, "before")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        assert await db_session(db) is session
        await insert(db, "after")
        return socket

    async with connect(await serve(application(handler))) as client:
        assert await database.names() == ["before"]
        assert database.checked_out == 0
        await client.send("go on")
        with pytest.raises(ConnectionClosedOK):
            await client.recv()
        assert await database.names() == ["after", "before"]


async def test_no_policy_is_asked_for_an_upgrade(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "before")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        return socket

    async with connect(await serve(application(handler, commit_policy=commit_2xx))):
        assert await database.names() == ["before"]


async def test_a_failing_commit_refuses_the_upgrade(db: DBConnect, database: Database, serve: Serve) -> None:
    @web.middleware
    async def answer_409(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except IntegrityError:
            return web.Response(status=409, text="handled")

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "before")
        await insert_row_that_fails_at_commit(db)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        raise AssertionError

    app = application(handler)
    app.middlewares.append(answer_409)
    with pytest.raises(InvalidStatus) as refused:
        async with connect(await serve(app)):
            pass
    assert (refused.value.response.status_code, refused.value.response.body) == (409, b"handled")
    assert await database.names() == []


async def test_a_handshake_that_is_refused_is_rolled_back(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "before")
        raise web.HTTPForbidden

    with pytest.raises(InvalidStatus):
        async with connect(await serve(application(handler))):
            pass
    assert await database.names() == []


@pytest.mark.parametrize(("code", "expected"), [(1000, ["one"]), (1001, ["one"]), (1011, []), (4000, [])])
async def test_unit_of_work_ends_before_the_close_frame_as_its_code_demands(
    db: DBConnect, database: Database, serve: Serve, code: int, expected: list[str]
) -> None:
    """The handler is kept from returning until the client has seen the close frame, and what there is then."""
    seen = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert(db, "one")
        await socket.close(code=code)
        await seen.wait()
        return socket

    async with connect(await serve(application(handler))) as client:
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code
        assert await database.names() == expected
        assert database.checked_out == 0
        seen.set()


async def test_a_task_of_the_handler_can_close_the_websocket(db: DBConnect, database: Database, serve: Serve) -> None:
    seen = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert(db, "one")
        await asyncio.create_task(socket.close())
        await seen.wait()
        return socket

    async with connect(await serve(application(handler))) as client:
        with pytest.raises(ConnectionClosedOK):
            await client.recv()
        assert await database.names() == ["one"]
        seen.set()


async def test_work_goes_on_after_the_close_frame(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert(db, "before")
        await socket.close()
        await insert(db, "after")
        return socket

    async with connect(await serve(application(handler))) as client:
        with pytest.raises(ConnectionClosedOK):
            await client.recv()
    await eventually(lambda: database.checkouts == 2 and not database.checked_out, "the connection is not over")
    assert await database.names() == ["after", "before"]


async def _return(socket: web.WebSocketResponse) -> None:
    """Leave the close to aiohttp."""


async def _close(socket: web.WebSocketResponse) -> None:
    await socket.close()


@pytest.mark.parametrize("end", [_return, _close])
async def test_a_commit_that_fails_closes_with_an_error(
    db: DBConnect, database: Database, serve: Serve, end: Callable[..., object]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert(db, "one")
        await insert_row_that_fails_at_commit(db)
        await end(socket)  # type: ignore[misc]  # one of the above
        return socket

    async with connect(await serve(application(handler))) as client:
        with pytest.raises(ConnectionClosedError) as closed:
            await client.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    assert await database.names() == []


async def test_close_from_outside_of_the_request_does_not_commit_the_handlers_work(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    """As an application does with all of its websockets when it is shut down."""
    sockets: list[web.WebSocketResponse] = []
    working, proceed = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        sockets.append(socket)
        await socket.prepare(request)
        await insert(db, "half")
        working.set()
        await proceed.wait()
        raise LookupError

    async with connect(await serve(application(handler))) as client:
        await working.wait()
        await sockets[0].close(code=1001)
        with pytest.raises(ConnectionClosedOK):
            await client.recv()
        assert database.checked_out == 1
        proceed.set()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


@either_way
async def test_a_client_that_closes_does_not_end_the_handlers_work(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    working = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert(db, "half")
        working.set()
        async for _ in socket:
            pass
        assert socket.closed
        raise LookupError

    async with connect(await serve(application(handler))):
        await working.wait()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


@either_way
async def test_a_client_that_leaves_leaves_nothing_behind(db: DBConnect, database: Database, serve: Serve) -> None:
    working = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert(db, "one")
        working.set()
        while True:
            await socket.receive_str()

    async with connect(await serve(application(handler))) as client:
        await working.wait()
        client.transport.abort()
        with pytest.raises(ConnectionClosed):
            await client.recv()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


async def test_a_websocket_of_an_application_that_is_shut_down_leaves_nothing_behind(
    db: DBConnect, database: Database
) -> None:
    working = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert(db, "half")
        working.set()
        await socket.receive()
        raise AssertionError

    runner = web.AppRunner(application(handler), shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with connect(f"http://127.0.0.1:{runner.addresses[0][1]}"):
        await working.wait()
        await runner.cleanup()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []
