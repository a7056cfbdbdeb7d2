"""A shared transaction with the clients and servers that applications are tested with, in other tasks and threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import litestar
import litestar.testing
import pytest
from aiohttp import test_utils, web
from fastapi import FastAPI
from fastapi.testclient import TestClient as FastAPIClient
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from tests.support.database import Database, Item, insert, insert_row_that_fails_at_commit
from tests.support.server import http_client, serve
from tests.support.stacks import on_integrity_error

from ctxdb_aiohttp import setup
from ctxdb_core import (
    DBConnect,
    close_db_session,
    commit_db_session,
    db_session,
    gather_in_new_ctx,
    on_commit,
    rollback_db_session,
    run_in_new_ctx,
)
from ctxdb_core.testing import shared_transaction
from ctxdb_litestar import CtxDBPlugin
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown

Act = Callable[[], Awaitable[int]]
"""What a handler does; it returns the status of its response."""

Post = Callable[[], Awaitable[int]]
"""Requests the handler, and returns the status."""


def starlette_app(db: DBConnect, act: Act, kind: type[Starlette] = Starlette) -> Starlette:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("", await act())

    app = kind(lifespan=close_on_shutdown(db), exception_handlers=on_integrity_error(409))
    app.router.routes.append(Route("/", endpoint, methods=["POST"]))
    app.add_middleware(DBSessionMiddleware)
    return app


def litestar_app(db: DBConnect, act: Act) -> litestar.Litestar:
    @litestar.post("/")
    async def handler() -> litestar.Response[str]:
        return litestar.Response("", status_code=await act())

    def on_error(request: object, exc: Exception) -> litestar.Response[str]:
        return litestar.Response("", status_code=409)

    return litestar.Litestar(
        [handler], plugins=[CtxDBPlugin(db)], exception_handlers={IntegrityError: on_error}, logging_config=None
    )


def aiohttp_app(db: DBConnect, act: Act) -> web.Application:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=await act())

    @web.middleware
    async def on_error(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except IntegrityError:
            return web.Response(status=409)
        return response

    app = web.Application(middlewares=[on_error])
    app.router.add_post("/", handler)
    setup(app, db)
    return app


@asynccontextmanager
async def httpx_in_process(db: DBConnect, act: Act) -> AsyncIterator[Post]:
    transport = httpx.ASGITransport(starlette_app(db, act), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def post() -> int:
            return (await client.post("/")).status_code

        yield post


@asynccontextmanager
async def uvicorn_over_sockets(db: DBConnect, act: Act) -> AsyncIterator[Post]:
    async with serve(starlette_app(db, act)) as url, http_client(url) as client:

        async def post() -> int:
            return (await client.post("/")).status_code

        yield post


@asynccontextmanager
async def starlette_test_client(db: DBConnect, act: Act) -> AsyncIterator[Post]:
    with TestClient(starlette_app(db, act), raise_server_exceptions=False) as client:

        async def post() -> int:
            # The client blocks this event loop, and runs the application on the event loop of another thread.
            return client.post("/").status_code

        yield post


@asynccontextmanager
async def fastapi_test_client(db: DBConnect, act: Act) -> AsyncIterator[Post]:
    # A client that does not run the lifespan has an event loop for each request.
    client = FastAPIClient(starlette_app(db, act, FastAPI), raise_server_exceptions=False)

    async def post() -> int:
        return client.post("/").status_code

    yield post
    client.close()


@asynccontextmanager
async def litestar_test_client(db: DBConnect, act: Act) -> AsyncIterator[Post]:
    with litestar.testing.TestClient(litestar_app(db, act), raise_server_exceptions=False) as client:

        async def post() -> int:
            return client.post("/").status_code

        yield post


@asynccontextmanager
async def litestar_async_test_client(db: DBConnect, act: Act) -> AsyncIterator[Post]:
    async with litestar.testing.AsyncTestClient(litestar_app(db, act), raise_server_exceptions=False) as client:

        async def post() -> int:
            return (await client.post("/")).status_code

        yield post


@asynccontextmanager
async def aiohttp_test_client(db: DBConnect, act: Act) -> AsyncIterator[Post]:
    client: Any
    async with test_utils.TestServer(aiohttp_app(db, act)) as server, test_utils.TestClient(server) as client:

        async def post() -> int:
            async with client.post("/") as response:
                status: int = response.status
                return status

        yield post


CLIENTS = [
    httpx_in_process,
    uvicorn_over_sockets,
    starlette_test_client,
    fastapi_test_client,
    litestar_test_client,
    litestar_async_test_client,
    aiohttp_test_client,
]
clients = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
Client = Callable[[DBConnect, Act], Any]


@pytest.fixture(params=["asyncpg", "sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@clients
async def test_the_next_request_and_the_test_see_what_was_committed(
    client: Client, db: DBConnect, database: Database
) -> None:
    async def act() -> int:
        session = await db_session(db)
        number = len((await session.scalars(select(Item))).all())
        await insert(db, f"request {number}")
        return 201

    async with shared_transaction(db) as session:
        session.add(Item(name="prepared"))
        await session.flush()
        async with client(db, act) as post:
            assert [await post(), await post()] == [201, 201]
            assert sorted(await session.scalars(select(Item.name))) == ["prepared", "request 1", "request 2"]
            assert await database.names() == []
    assert await database.names() == []


@clients
async def test_an_error_status_rolls_back(client: Client, db: DBConnect) -> None:
    async def act() -> int:
        await insert(db, "one")
        return 418

    async with shared_transaction(db) as session:
        async with client(db, act) as post:
            assert await post() == 418
        assert (await session.scalars(select(Item))).all() == []


@clients
async def test_a_commit_that_is_refused_takes_the_error_path(client: Client, db: DBConnect) -> None:
    async def act() -> int:
        await insert(db, "one")
        await insert_row_that_fails_at_commit(db)
        return 200

    async with shared_transaction(db) as session:
        async with client(db, act) as post:
            assert [await post(), await post()] == [409, 409]
        assert (await session.scalars(select(Item))).all() == []


@clients
async def test_all_that_a_handler_can_do_with_its_transactions_is_done(client: Client, db: DBConnect) -> None:
    called: list[str] = []

    async def act() -> int:
        await insert(db, "early")
        await commit_db_session(db)
        await insert(db, "undone")
        await rollback_db_session(db)
        await insert(db, "closed")
        await close_db_session(db)
        await run_in_new_ctx(insert, db, "own")
        await gather_in_new_ctx(*[lambda name=name: insert(db, name) for name in "abc"])
        await insert(db, "last")
        on_commit(db, lambda: called.append("called"))
        return 200

    async with shared_transaction(db) as session:
        async with client(db, act) as post:
            assert await post() == 200
        assert sorted(await session.scalars(select(Item.name))) == ["a", "b", "c", "early", "last", "own"]
    assert called == ["called"]


@clients
async def test_reads_of_the_test_do_not_block_requests(client: Client, db: DBConnect) -> None:
    async def act() -> int:
        await insert(db, "one")
        return 200

    async with client(db, act) as post, shared_transaction(db) as session:
        assert (await session.scalars(select(Item))).all() == []
        assert await post() == 200
        assert len((await session.scalars(select(Item))).all()) == 1
        await session.rollback()
        assert len((await session.scalars(select(Item))).all()) == 1


async def test_requests_at_the_same_time_take_turns(db: DBConnect) -> None:
    async def act() -> int:
        session = await db_session(db)
        number = len((await session.scalars(select(Item))).all())
        await insert(db, f"{number} {id(session)}")
        await asyncio.sleep(0)
        await insert(db, f"{number} {id(session)} again")
        return 200

    async with shared_transaction(db) as session:
        async with uvicorn_over_sockets(db, act) as post:
            assert await asyncio.gather(*(post() for _ in range(5))) == [200] * 5
        assert len((await session.scalars(select(Item))).all()) == 10


async def test_a_background_task_commits_what_it_does(db: DBConnect) -> None:
    async def background() -> None:
        await insert(db, "background")

    async def endpoint(request: Request) -> Response:
        await insert(db, "response")
        return PlainTextResponse("", background=BackgroundTask(background))

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(DBSessionMiddleware)
    async with shared_transaction(db) as session:
        with TestClient(app) as client:
            assert client.get("/").status_code == 200
        assert sorted(await session.scalars(select(Item.name))) == ["background", "response"]
