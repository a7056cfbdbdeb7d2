"""Each way to write, with a connection that is lost at each point of the protocol: no result contradicts the rows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import httpx
import pytest
from sqlalchemy import ForeignKey, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from tests.support.connection import Connection
from tests.support.database import Database, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point
from tests.support.ways import WAYS_TO_WRITE, WayToWrite, assert_told_is_stored

from ctxdb_core import (
    CommitOutcomeUnknownError,
    DBConnect,
    new_db_ctx,
    new_non_ctx_session,
    on_commit,
    on_rollback,
)
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parent"
    name: Mapped[str] = mapped_column(primary_key=True)


class Child(Base):
    __tablename__ = "child"
    parent: Mapped[str] = mapped_column(ForeignKey("parent.name"), primary_key=True)


POINTS = (
    Point.BEGIN,
    Point.STATEMENT,
    Point.ANSWER,
    Point.SAVEPOINT,
    Point.RELEASE,
    Point.RELEASED,
    Point.ROLLBACK,
    Point.COMMIT,
    Point.COMMITTED,
)


@pytest.mark.parametrize("write", WAYS_TO_WRITE)
async def test_a_way_to_write_succeeds_exactly_if_its_row_is_stored(
    far: DBConnect, network: FaultyNetwork, database: Database, write: WayToWrite
) -> None:
    await assert_told_is_stored(write, POINTS, far, network, database)


async def _serve(handler: Callable[[Request], Awaitable[Response]]) -> None:
    app = Starlette(routes=[Route("/", handler)])
    app.add_middleware(ASGIHTTPDBSessionMiddleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/")


@pytest.mark.parametrize("point", [Point.COMMIT, Point.COMMITTED])
async def test_the_lost_commit_of_a_streamed_body_is_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database, point: Point
) -> None:
    async def handler(request: Request) -> Response:
        await insert(far, "response")
        return StreamingResponse(chunks())

    async def chunks() -> AsyncGenerator[str, None]:
        yield "first"
        await insert(far, "body")
        network.fail(point, Fault.DROP)
        yield "last"

    with pytest.raises(CommitOutcomeUnknownError):
        await _serve(handler)
    assert await database.names() == (["response"] if point is Point.COMMIT else ["body", "response"])


async def test_the_lost_commit_of_a_background_task_is_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    async def handler(request: Request) -> Response:
        await insert(far, "response")
        return PlainTextResponse("done", background=BackgroundTask(work))

    async def work() -> None:
        await insert(far, "background")
        network.fail(Point.COMMIT, Fault.DROP)

    with pytest.raises(CommitOutcomeUnknownError):
        await _serve(handler)
    assert await database.names() == ["response"]


async def test_the_lost_commit_of_a_websocket_closes_it_as_an_error(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await insert(far, "a")
        network.fail(Point.COMMITTED, Fault.DROP)
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", talk)])
    app.add_middleware(ASGIHTTPDBSessionMiddleware)
    connection = Connection("websocket", [{"type": "websocket.connect"}], path="/", headers=[], query_string=b"")
    with pytest.raises(CommitOutcomeUnknownError):
        await connection.run(app)
    assert [(each["type"], each.get("code")) for each in connection.sent] == [
        ("websocket.accept", None),
        ("websocket.close", 1011),
    ]
    assert await database.names() == ["a"]


@pytest.mark.parametrize("table", ["parent", "child"])
async def test_a_connection_lost_between_the_statements_of_a_flush_stores_nothing(
    far: DBConnect, network: FaultyNetwork, database: Database, table: str
) -> None:
    outcomes: list[str] = []

    def lose(statement: str) -> None:
        if statement.startswith(f"INSERT INTO {table}"):
            network.break_all(Fault.DROP)

    network.on_statement = lose
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            on_commit(far, lambda: outcomes.append("committed"))
            on_rollback(far, lambda: outcomes.append("rolled back"))
            session = await insert(far, "a")
            session.add_all([Parent(name="p"), Child(parent="p")])
    assert outcomes == ["rolled back"]
    assert await database.names() == []
    assert await database.names("parent") == []


async def test_a_lost_roll_back_of_a_reader_is_no_error(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    async with new_non_ctx_session(far) as session:
        await session.execute(text("SELECT 1"))
        network.fail(Point.ROLLBACK, Fault.DROP)
    assert network.failed.is_set()


async def test_a_lost_commit_names_the_databases_that_were_committed_before_it(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    near = make_url(database.url).set(port=database.server.port if database.server else None)
    outcomes: list[str] = []

    async def write(db: DBConnect, name: str) -> None:
        await insert(db, name)
        on_commit(db, lambda: outcomes.append(f"{name} committed"))
        on_rollback(db, lambda: outcomes.append(f"{name} rolled back"))

    async with (
        DBConnect(lambda host: database.watch(create_async_engine(near)), host="first") as first,
        DBConnect(lambda host: database.watch(create_async_engine(near)), host="third") as third,
    ):
        with pytest.raises(CommitOutcomeUnknownError) as raised:
            async with new_db_ctx():
                await write(first, "first")
                await write(far, "second")
                await write(third, "third")
                network.fail(Point.COMMITTED, Fault.DROP)
        assert "the one on <DBConnect host='first'> had succeeded" in "".join(raised.value.__notes__)
    assert sorted(outcomes) == ["first committed", "third rolled back"]
    assert await database.names() == ["first", "second"]
