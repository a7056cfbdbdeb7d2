"""Websocket handlers and listeners: a unit of work spans the connection."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from litestar import Litestar, WebSocket, websocket, websocket_listener, websocket_stream
from litestar.exceptions import PermissionDeniedException, WebSocketException
from litestar.handlers import WebsocketListener
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.litestar_app import Injected, answering, litestar_app
from tests.support.server import serve
from websockets.asyncio.client import ClientConnection, connect

from ctxdb_core import DBConnect, db_session, new_db_ctx
from ctxdb_litestar import CtxDBPlugin

Socket = WebSocket[Any, Any, Any]


@asynccontextmanager
async def connected(app: Litestar) -> AsyncGenerator[ClientConnection, None]:
    async with serve(app) as base_url, connect(base_url.replace("http", "ws") + "/", proxy=None) as client:
        yield client


async def closed_with(client: ClientConnection) -> int | None:
    await client.wait_closed()
    return client.close_code


async def test_a_handler_and_its_injected_session_are_one_unit_of_work(db: DBConnect, database: Database) -> None:
    @websocket("/")
    async def handle(socket: Socket, session: Injected[AsyncSession]) -> None:
        await socket.accept()
        for _ in range(2):
            name = await socket.receive_text()
            await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})
            await socket.send_text(str(session is await db_session(db)))
        await socket.close()

    async with connected(litestar_app(handle, plugins=[CtxDBPlugin(session=db)])) as client:
        for name in ("one", "two"):
            assert await database.names() == []
            await client.send(name)
            assert await client.recv() == "True"
        assert await closed_with(client) == 1000
        assert await database.names() == ["one", "two"]


async def test_a_stream_that_writes_before_its_first_message_is_accepted(db: DBConnect, database: Database) -> None:
    # Litestar accepts it in the task that listens for the client, while another one makes the messages.
    @websocket_stream("/")
    async def stream() -> AsyncGenerator[str, None]:
        for name in ("one", "two"):
            await insert(db, name)
            yield name

    async with connected(litestar_app(stream, plugins=[CtxDBPlugin(db)])) as client:
        assert [await client.recv() for _ in range(2)] == ["one", "two"]
        assert await closed_with(client) == 1000
    assert await database.names() == ["one", "two"]


async def test_a_listener_is_committed_when_its_client_leaves(db: DBConnect, database: Database) -> None:
    @websocket_listener("/")
    async def listen(data: str, session: Injected[AsyncSession]) -> str:
        await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": data})
        return str(session is await db_session(db))

    async with connected(litestar_app(listen, plugins=[CtxDBPlugin(session=db)])) as client:
        for name in ("one", "two"):
            await client.send(name)
            assert await client.recv() == "True"
        assert await database.names() == []
    await eventually(lambda: not database.checked_out, "the connection is not over")
    assert await database.names() == ["one", "two"]


async def test_the_hooks_of_a_listener_class_are_inside(db: DBConnect, database: Database) -> None:
    class Listener(WebsocketListener):
        path = "/"

        async def on_accept(self, session: Injected[AsyncSession]) -> None:
            assert session is await insert(db, "accepted")

        async def on_disconnect(self, session: Injected[AsyncSession]) -> None:
            assert session is await insert(db, "disconnected")

        async def on_receive(self, data: str, session: Injected[AsyncSession]) -> str:
            assert session is await insert(db, data)
            return "written"

    async with connected(litestar_app(Listener, plugins=[CtxDBPlugin(session=db)])) as client:
        await client.send("received")
        assert await client.recv() == "written"
    await eventually(lambda: not database.checked_out, "the connection is not over")
    assert await database.names() == ["accepted", "disconnected", "received"]


async def test_each_message_of_a_listener_can_have_a_unit_of_work_of_its_own(db: DBConnect, database: Database) -> None:
    @websocket_listener("/")
    async def listen(data: str) -> str:
        try:
            async with new_db_ctx():
                await insert(db, data)
        except IntegrityError:
            return "refused"
        return "stored"

    async with connected(litestar_app(listen, db=db)) as client:
        answers = []
        for name in ("one", "one", "two"):
            await client.send(name)
            answers.append(await client.recv())
            assert database.checked_out == 0
        assert answers == ["stored", "refused", "stored"]
        assert await database.names() == ["one", "two"]


async def test_a_listener_that_raises_is_rolled_back(db: DBConnect, database: Database) -> None:
    @websocket_listener("/")
    async def listen(data: str) -> None:
        await insert(db, data)
        raise LookupError

    async with connected(litestar_app(listen, db=db)) as client:
        await client.send("one")
        assert await closed_with(client) == 4500
    await eventually(lambda: not database.checked_out, "the connection is not over")
    assert await database.names() == []


async def test_a_websocket_exception_is_rolled_back(db: DBConnect, database: Database) -> None:
    @websocket("/")
    async def handle(socket: Socket) -> None:
        await socket.accept()
        await insert(db, "one")
        raise WebSocketException(detail="no", code=4321)

    async with connected(litestar_app(handle, db=db)) as client:
        assert await closed_with(client) == 4321
    assert await database.names() == []


async def test_a_guard_that_refuses_a_websocket_is_rolled_back(db: DBConnect, database: Database) -> None:
    async def guard(connection: Any, handler: Any) -> None:
        await insert(db, "guard")
        raise PermissionDeniedException

    @websocket("/", guards=[guard])
    async def handle(socket: Socket) -> None:
        pytest.fail("the handler was called")

    with pytest.raises(Exception, match="HTTP 403"):
        async with connected(litestar_app(handle, db=db)):
            pass
    assert await database.names() == []


async def test_a_failing_commit_closes_with_1011_and_surfaces(db: DBConnect, database: Database) -> None:
    surfaced: list[BaseException] = []

    @websocket("/")
    async def handle(socket: Socket) -> None:
        await socket.accept()
        await insert_row_that_fails_at_commit(db)
        await socket.close()

    app: Any = litestar_app(handle, db=db, exception_handlers={IntegrityError: answering(409)})

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as exc:
            surfaced.append(exc)
            raise

    async with connected(recording) as client:  # type: ignore[arg-type]  # any application will do
        assert await closed_with(client) == 1011
    assert [type(exc) for exc in surfaced] == [IntegrityError]


@pytest.mark.parametrize(("aborts", "names"), [(False, ["one"]), (True, [])])
async def test_the_close_code_decides_for_a_handler_that_does_not_expect_its_client_to_leave(
    db: DBConnect, database: Database, aborts: bool, names: list[str]
) -> None:
    """Litestar closes with the code that the client has left with: 1000, or 1006 for no goodbye at all."""

    @websocket("/")
    async def handle(socket: Socket) -> None:
        await socket.accept()
        await insert(db, "one")
        await socket.send_text("ready")
        await socket.receive_text()

    async with connected(litestar_app(handle, db=db)) as client:
        await client.recv()
        if aborts:
            client.transport.abort()
        else:
            await client.close()
        await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == names
