"""`reads_from`: requests by safe methods read from replicas, by an option of every adapter."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import aiohttp as aiohttp_client
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from fastapi import FastAPI
from litestar import Litestar, head, route
from litestar import Request as LitestarRequest
from litestar.di import NamedDependency
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket
from tests.support.clients import MakeClient, clients_of_aiohttp, clients_of_asgi
from tests.support.followers import SERVER, Engines, following

import ctxdb_aiohttp
from ctxdb_core import DBConnect, TransactionContext, db_session, gather_in_new_ctx, rollback_db_session, run_in_new_ctx
from ctxdb_core.adapters import begin, finalize
from ctxdb_core.testing import shared_transaction
from ctxdb_litestar import CtxDBPlugin, EnclosingPlugin
from ctxdb_pgstatus import HostMonitor, ReadYourWrites, follow_master, follow_replica
from ctxdb_pgstatus.testing import PostgresCluster
from ctxdb_starlette import DBSessionMiddleware

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
async def master(cluster: PostgresCluster, monitor: HostMonitor) -> AsyncIterator[DBConnect]:
    async with following(Engines(cluster), follow_master(monitor)) as db:
        yield db


@pytest.fixture
async def replica(cluster: PostgresCluster, monitor: HostMonitor) -> AsyncIterator[DBConnect]:
    async with following(Engines(cluster), follow_replica(monitor)) as db:
        yield db


class Shop:
    """What the handlers of the applications do, whatever the framework: they use one database for all methods."""

    def __init__(self, master: DBConnect, replica: DBConnect, monitor: HostMonitor) -> None:
        self.master = master
        self.reads_from = {master: replica}
        self.read_your_writes = ReadYourWrites(monitor, secret=SECRET, wait=0.05)

    async def handle(self, method: str) -> dict[str, Any]:
        session = await db_session(self.master)
        if method == "POST":
            await session.execute(text("INSERT INTO number SELECT coalesce(max(number), 0) + 1 FROM number"))
        count = await session.scalar(text("SELECT count(*) FROM number"))
        return {"server": await session.scalar(SERVER), "count": count}


Framework: TypeAlias = Callable[[Shop], AbstractAsyncContextManager[MakeClient]]


def starlette(shop: Shop) -> AbstractAsyncContextManager[MakeClient]:
    async def handle(request: Request) -> JSONResponse:
        answer = await shop.handle(request.method)
        return JSONResponse(answer, headers={"x-server": answer["server"]})

    app = Starlette(routes=[Route("/", handle, methods=["GET", "HEAD", "OPTIONS", "TRACE", "POST"])])
    app.add_middleware(DBSessionMiddleware, reads_from=shop.reads_from)
    app.add_middleware(shop.read_your_writes)
    return clients_of_asgi(app)


def fastapi(shop: Shop) -> AbstractAsyncContextManager[MakeClient]:
    app = FastAPI()

    @app.api_route("/", methods=["GET", "HEAD", "OPTIONS", "TRACE", "POST"])
    async def handle(request: Request) -> JSONResponse:
        answer = await shop.handle(request.method)
        return JSONResponse(answer, headers={"x-server": answer["server"]})

    app.add_middleware(DBSessionMiddleware, reads_from=shop.reads_from)
    app.add_middleware(shop.read_your_writes)
    return clients_of_asgi(app)


def litestar(shop: Shop) -> AbstractAsyncContextManager[MakeClient]:
    @route("/", http_method=["GET", "OPTIONS", "POST"], status_code=200)
    async def handle(request: LitestarRequest[Any, Any, Any], session: NamedDependency[AsyncSession]) -> dict[str, Any]:
        assert session is await db_session(shop.master)
        return await shop.handle(request.method)

    @head("/")
    async def handle_head(request: LitestarRequest[Any, Any, Any]) -> None:
        request.scope["server"] = (await shop.handle("HEAD"))["server"]

    async def name_server(message: Any, scope: Any) -> None:
        if message["type"] == "http.response.start" and "server" in scope and isinstance(scope["server"], str):
            message["headers"] = [*message["headers"], (b"x-server", scope["server"].encode())]

    plugins = [
        CtxDBPlugin(reads_from=shop.reads_from, session=shop.master),
        EnclosingPlugin(shop.read_your_writes),
    ]
    app = Litestar([handle, handle_head], plugins=plugins, before_send=[name_server], logging_config=None)
    return clients_of_asgi(app)


def aiohttp(shop: Shop) -> AbstractAsyncContextManager[MakeClient]:
    async def handle(request: web.Request) -> web.Response:
        answer = await shop.handle(request.method)
        return web.json_response(answer, headers={"x-server": answer["server"]})

    app = web.Application()
    app.router.add_route("*", "/", handle)
    ctxdb_aiohttp.setup(app, reads_from=shop.reads_from)
    shop.read_your_writes.setup(app)
    return clients_of_aiohttp(app)


each_framework = pytest.mark.parametrize(
    "framework", [starlette, fastapi, litestar, aiohttp], ids=lambda each: each.__name__
)


@pytest.fixture
def shop(master: DBConnect, replica: DBConnect, monitor: HostMonitor) -> Shop:
    return Shop(master, replica, monitor)


@each_framework
async def test_requests_by_safe_methods_read_from_replicas_and_a_post_goes_to_the_master(
    framework: Framework, shop: Shop, cluster: PostgresCluster
) -> None:
    standbys = {node.host for node in cluster.standbys}
    async with framework(shop) as make_client, make_client() as client:
        answers = [(await client.get("/")).json() for _ in range(4)]
        assert {answer["server"] for answer in answers} == standbys
        assert (await client.options("/")).json()["server"] in standbys
        assert (await client.head("/")).headers["x-server"] in standbys
        # Litestar has no handlers for TRACE.
        if framework is not litestar:
            assert (await client.request("TRACE", "/")).json()["server"] in standbys
    async with framework(shop) as make_client, make_client() as client:
        assert (await client.post("/")).json() == {"server": cluster.primary.host, "count": 1}


@each_framework
async def test_a_client_reads_its_own_write_by_a_safe_method(
    framework: Framework, shop: Shop, cluster: PostgresCluster
) -> None:
    standbys = {node.host for node in cluster.standbys}
    async with framework(shop) as make_client, make_client() as writer, make_client() as other:
        for node in cluster.standbys:
            await node.pause_replay()
        for count in range(1, 4):
            assert (await writer.post("/")).json()["count"] == count
            assert (await writer.get("/")).json() == {"server": cluster.primary.host, "count": count}
            answer = (await other.get("/")).json()
            assert answer["count"] == 0
            assert answer["server"] in standbys
        await cluster.standbys[1].resume_replay()
        await cluster.standbys[1].wait_for_replay(await cluster.primary.position())
        assert (await writer.get("/")).json() == {"server": cluster.standbys[1].host, "count": 3}


def app_of(shop: Shop, handler: Callable[[Request], Any]) -> Starlette:
    async def respond(request: Request) -> JSONResponse:
        return JSONResponse(await handler(request))

    app = Starlette(routes=[Route("/", respond, methods=["GET", "POST"])])
    app.add_middleware(DBSessionMiddleware, reads_from=shop.reads_from)
    app.add_middleware(shop.read_your_writes)
    return app


async def get(app: Any) -> Any:
    async with clients_of_asgi(app) as make_client, make_client() as client:
        response = await client.get("/")
        assert response.status_code == 200, response.text
        return response.json()


async def test_a_unit_of_work_of_its_own_in_a_safe_request_writes_to_the_master(
    shop: Shop, cluster: PostgresCluster
) -> None:
    async def count_visit() -> Any:
        session = await db_session(shop.master)
        await session.execute(text("INSERT INTO number VALUES (1)"))
        return await session.scalar(SERVER)

    async def handle(request: Request) -> list[str]:
        reader = (await shop.handle("GET"))["server"]
        (gathered,) = await gather_in_new_ctx(lambda: shop.handle("GET"))
        return [reader, await run_in_new_ctx(count_visit), gathered["server"]]

    reader, *writers = await get(app_of(shop, handle))
    assert reader in {node.host for node in cluster.standbys}
    assert writers == [cluster.primary.host, cluster.primary.host]
    assert await cluster.primary.fetch_value("SELECT count(*) FROM number") == 1


async def test_a_write_in_a_safe_request_is_refused_by_the_replica_whose_connections_stay(
    shop: Shop, cluster: PostgresCluster
) -> None:
    async def handle(request: Request) -> list[str]:
        session = await db_session(shop.master)
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        try:
            await session.execute(text("INSERT INTO number VALUES (1)"))
        except DBAPIError as exc:
            await rollback_db_session(shop.master)
            return [getattr(exc.orig, "sqlstate", ""), str(pid)]
        return []

    app = app_of(shop, handle)
    answers = [await get(app) for _ in range(6)]
    assert {sqlstate for sqlstate, _ in answers} == {"25006"}
    assert len({pid for _, pid in answers}) == len(cluster.standbys)
    assert await cluster.primary.fetch_value("SELECT count(*) FROM number") == 0


async def test_the_transaction_context_of_a_safe_request_reads_from_a_replica(
    shop: Shop, cluster: PostgresCluster
) -> None:
    context = TransactionContext(shop.master)

    async def handle(request: Request) -> Any:
        await db_session(shop.master)
        return (await context.execute(SERVER)).scalar_one()

    assert await get(app_of(shop, handle)) in {node.host for node in cluster.standbys}


async def test_a_mounted_application_reads_from_replicas_by_an_option_of_its_own(
    shop: Shop, cluster: PostgresCluster
) -> None:
    async def handle(request: Request) -> Any:
        return await shop.handle(request.method)

    app = Starlette(routes=[Mount("/", app_of(shop, handle))])
    assert (await get(app))["server"] in {node.host for node in cluster.standbys}


async def test_websockets_go_to_the_master(shop: Shop, cluster: PostgresCluster) -> None:
    async def handle(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(await shop.handle("POST"))
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", handle)])
    app.add_middleware(DBSessionMiddleware, reads_from=shop.reads_from)

    def receive() -> Any:
        with TestClient(app) as client, client.websocket_connect("/") as websocket:
            return websocket.receive_json()

    # The test client blocks. It runs in a thread, as the monitor answers on this event loop.
    assert (await asyncio.to_thread(receive))["server"] == cluster.primary.host


async def test_websockets_of_aiohttp_go_to_the_master(shop: Shop, cluster: PostgresCluster) -> None:
    async def handle(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        await websocket.send_json(await shop.handle("POST"))
        await websocket.close()
        return websocket

    app = web.Application()
    app.router.add_get("/", handle)
    ctxdb_aiohttp.setup(app, reads_from=shop.reads_from)
    async with (
        TestServer(app) as server,
        aiohttp_client.ClientSession() as client,
        client.ws_connect(server.make_url("/")) as websocket,
    ):
        assert (await websocket.receive_json())["server"] == cluster.primary.host


async def test_a_safe_request_reads_from_the_shared_transaction_of_a_test(shop: Shop, cluster: PostgresCluster) -> None:
    async def handle(request: Request) -> Any:
        return await shop.handle(request.method)

    app = app_of(shop, handle)
    async with shared_transaction(shop.master) as session:
        await session.execute(text("INSERT INTO number VALUES (7)"))
        assert await get(app) == {"server": cluster.primary.host, "count": 1}
    assert await cluster.primary.fetch_value("SELECT count(*) FROM number") == 0


async def test_a_safe_request_is_in_the_status_of_the_replica(
    shop: Shop, master: DBConnect, replica: DBConnect
) -> None:
    async def handle(request: Request) -> list[int]:
        await shop.handle("GET")
        return [len(db.status().units) for db in (master, replica)]

    assert await get(app_of(shop, handle)) == [0, 1]


async def test_reads_from_is_an_option_of_begin(shop: Shop, master: DBConnect, cluster: PostgresCluster) -> None:
    unit = begin(reads_from=shop.reads_from)
    assert unit is not None
    assert (await shop.handle("GET"))["server"] in {node.host for node in cluster.standbys}
    await finalize(unit, commit=True)


@pytest.mark.parametrize("wrong", [["a list"], {"master": "replica"}], ids=["list", "names"])
def test_reads_from_that_is_no_mapping_of_databases_is_refused_at_once(wrong: Any) -> None:
    for use in (
        lambda: DBSessionMiddleware(Starlette(), reads_from=wrong),
        lambda: CtxDBPlugin(reads_from=wrong),
        lambda: ctxdb_aiohttp.setup(web.Application(), reads_from=wrong),
    ):
        with pytest.raises(TypeError, match=re.escape("reads_from={master: replica}")):
            use()
