"""`ReadYourWrites` on a real cluster, whose standbys pause or delay their replay."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias
from uuid import uuid4

import httpx
import pytest
from aiohttp import web
from fastapi import FastAPI
from litestar import Litestar, get, post
from litestar import Request as LitestarRequest
from litestar.exceptions import ImproperlyConfiguredException
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket
from tests.support.clients import MakeClient, clients_of_aiohttp, clients_of_asgi
from tests.support.followers import NUMBERS, SERVER, Engines, following, server_of
from tests.support.hosts import FakeSource
from tests.support.monitors import monitor_of
from tests.support.sidecar import serve_monitor

import ctxdb_aiohttp
from ctxdb_core import (
    DBConnect,
    atomic_db_session,
    commit_db_session,
    db_session,
    gather_in_new_ctx,
    new_db_ctx,
    run_in_new_ctx,
)
from ctxdb_litestar import CtxDBPlugin, EnclosingPlugin
from ctxdb_pgstatus import (
    HostMonitor,
    MiddlewareOrderError,
    OptionError,
    PgStatusClient,
    ReadYourWrites,
    StaleReaderError,
    follow_master,
    follow_replica,
)
from ctxdb_pgstatus._following.positions import UNKNOWN_POSITION, Positions, current_positions, want_positions
from ctxdb_pgstatus._token import TokenSigner
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode
from ctxdb_starlette import DBSessionMiddleware

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def engines(cluster: PostgresCluster) -> Engines:
    return Engines(cluster, "writers")


@pytest.fixture
async def master(engines: Engines, monitor: HostMonitor) -> AsyncIterator[DBConnect]:
    async with following(engines, follow_master(monitor)) as db:
        yield db


@pytest.fixture
def readers(cluster: PostgresCluster) -> Engines:
    return Engines(cluster, "readers")


@pytest.fixture
async def replica(readers: Engines, monitor: HostMonitor) -> AsyncIterator[DBConnect]:
    async with following(readers, follow_replica(monitor, wait=0.05)) as db:
        yield db


@pytest.fixture
def ryw(monitor: HostMonitor) -> ReadYourWrites:
    return ReadYourWrites(monitor, secret=SECRET, wait=0.05)


@asynccontextmanager
async def paused(cluster: PostgresCluster) -> AsyncIterator[None]:
    """Pause the replay of all standbys."""
    for node in cluster.standbys:
        await node.pause_replay()
    try:
        yield
    finally:
        for node in cluster.standbys:
            await node.resume_replay()


class Shop:
    """What the handlers of the applications do, whatever the framework."""

    def __init__(self, master: DBConnect, replica: DBConnect) -> None:
        self.master = master
        self.replica = replica

    async def write(self, number: int) -> None:
        await (await db_session(self.master)).execute(insert(NUMBERS).values(number=number))

    async def read(self) -> dict[str, Any]:
        session = await db_session(self.replica)
        found = (await session.scalars(select(NUMBERS.c.number).order_by(NUMBERS.c.number))).all()
        return {"numbers": list(found), "server": await session.scalar(SERVER)}


App: TypeAlias = Callable[[Shop, ReadYourWrites], AbstractAsyncContextManager[MakeClient]]


def starlette(shop: Shop, ryw: ReadYourWrites) -> AbstractAsyncContextManager[MakeClient]:
    async def write(request: Request) -> Response:
        await shop.write(int(request.query_params["number"]))
        return PlainTextResponse("written", status_code=201)

    async def read(request: Request) -> Response:
        return JSONResponse(await shop.read())

    app = Starlette(routes=[Route("/", write, methods=["POST"]), Route("/", read)])
    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(ryw)
    return clients_of_asgi(app)


def fastapi(shop: Shop, ryw: ReadYourWrites) -> AbstractAsyncContextManager[MakeClient]:
    app = FastAPI()

    @app.post("/", status_code=201)
    async def write(number: int) -> str:
        await shop.write(number)
        return "written"

    @app.get("/")
    async def read() -> dict[str, Any]:
        return await shop.read()

    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(ryw)
    return clients_of_asgi(app)


def litestar(shop: Shop, ryw: ReadYourWrites) -> AbstractAsyncContextManager[MakeClient]:
    @post("/")
    async def write(request: LitestarRequest[Any, Any, Any]) -> str:
        await shop.write(int(request.query_params["number"]))
        return "written"

    @get("/")
    async def read() -> dict[str, Any]:
        return await shop.read()

    plugins = [CtxDBPlugin(), EnclosingPlugin(ryw)]
    return clients_of_asgi(Litestar([write, read], plugins=plugins, logging_config=None))


def _aiohttp(shop: Shop, ryw: ReadYourWrites, *, first: bool, streamed: bool) -> web.Application:
    async def write(request: web.Request) -> web.StreamResponse:
        await shop.write(int(request.query["number"]))
        if not streamed:
            return web.Response(text="written", status=201)
        response = web.StreamResponse(status=201)
        await response.prepare(request)
        await response.write(b"written")
        return response

    async def read(request: web.Request) -> web.Response:
        return web.json_response(await shop.read())

    app = web.Application()
    app.router.add_post("/", write)
    app.router.add_get("/", read)
    if first:
        ryw.setup(app)
    ctxdb_aiohttp.setup(app)
    if not first:
        ryw.setup(app)
    return app


def aiohttp(shop: Shop, ryw: ReadYourWrites) -> AbstractAsyncContextManager[MakeClient]:
    return clients_of_aiohttp(_aiohttp(shop, ryw, first=False, streamed=False))


def aiohttp_in_another_order(shop: Shop, ryw: ReadYourWrites) -> AbstractAsyncContextManager[MakeClient]:
    return clients_of_aiohttp(_aiohttp(shop, ryw, first=True, streamed=False))


def aiohttp_streaming(shop: Shop, ryw: ReadYourWrites) -> AbstractAsyncContextManager[MakeClient]:
    return clients_of_aiohttp(_aiohttp(shop, ryw, first=False, streamed=True))


each_framework = pytest.mark.parametrize(
    "framework",
    [starlette, fastapi, litestar, aiohttp, aiohttp_in_another_order, aiohttp_streaming],
    ids=lambda each: each.__name__,
)


@each_framework
async def test_a_client_reads_its_own_writes_while_others_read_from_lagging_replicas(
    framework: App, cluster: PostgresCluster, master: DBConnect, replica: DBConnect, ryw: ReadYourWrites
) -> None:
    standbys = {node.host for node in cluster.standbys}
    async with framework(Shop(master, replica), ryw) as make_client, make_client() as writer, make_client() as other:
        assert (await writer.get("/")).json()["server"] in standbys
        assert not writer.cookies
        async with paused(cluster):
            for number in range(3):
                response = await writer.post("/", params={"number": number})
                assert response.status_code == 201
                assert response.text.strip('"') == "written"
                assert (await writer.get("/")).json() == {
                    "numbers": list(range(number + 1)),
                    "server": cluster.primary.host,
                }
                answer = (await other.get("/")).json()
                assert answer["numbers"] == []
                assert answer["server"] in standbys
            # One replica goes on to replay.
            await cluster.standbys[0].resume_replay()
            await cluster.standbys[0].wait_for_replay(await cluster.primary.position())
            for _ in range(3):
                assert (await writer.get("/")).json() == {"numbers": [0, 1, 2], "server": cluster.standbys[0].host}


@each_framework
async def test_the_cookie_is_httponly_and_samesite_lax(
    framework: App, cluster: PostgresCluster, master: DBConnect, replica: DBConnect, ryw: ReadYourWrites
) -> None:
    async with framework(Shop(master, replica), ryw) as make_client, make_client() as client:
        response = await client.post("/", params={"number": 1})
        (cookie,) = response.headers.get_list("set-cookie")
        name, *attributes = cookie.split("; ")
        assert name.startswith("ctxdb_position=")
        assert attributes == ["Path=/", "Max-Age=300", "HttpOnly", "SameSite=Lax"]
        assert "set-cookie" not in (await client.get("/")).headers


@each_framework
async def test_a_client_without_cookies_brings_its_position_in_a_header_field(
    framework: App, cluster: PostgresCluster, master: DBConnect, replica: DBConnect, monitor: HostMonitor
) -> None:
    ryw = ReadYourWrites(monitor, secret=SECRET, header="X-Position", wait=0)
    async with framework(Shop(master, replica), ryw) as make_client, make_client() as client, paused(cluster):
        response = await client.post("/", params={"number": 1})
        assert "set-cookie" not in response.headers
        headers = {"X-Position": response.headers["x-position"]}
        assert (await client.get("/", headers=headers)).json()["numbers"] == [1]
        assert (await client.get("/")).json()["numbers"] == []


class _Several(ReadYourWrites):
    """Several `ReadYourWrites` around one application; the last one is the outermost."""

    def __init__(self, *each: ReadYourWrites) -> None:
        self._each = each

    def __call__(self, app: Any) -> Any:
        for ryw in self._each:
            app = ryw(app)
        return app

    def setup(self, app: web.Application) -> None:
        for ryw in self._each:
            ryw.setup(app)


@each_framework
async def test_several_read_your_writes_around_one_application_work_side_by_side(
    framework: App, cluster: PostgresCluster, master: DBConnect, replica: DBConnect, monitor: HostMonitor
) -> None:
    by_cookie = ReadYourWrites(monitor, secret=SECRET, wait=0)
    by_header = ReadYourWrites(monitor, secret=SECRET, header="X-Position", wait=0)
    elsewhere = ReadYourWrites(FakeSource(), secret=SECRET, cookie="elsewhere", wait=10)
    ryw = _Several(elsewhere, by_cookie, by_header, elsewhere)
    async with framework(Shop(master, replica), ryw) as make_client, make_client() as client, paused(cluster):
        response = await client.post("/", params={"number": 1})
        assert dict(client.cookies).keys() == {"ctxdb_position"}
        assert (await client.get("/")).json()["numbers"] == [1]
        client.cookies.clear()
        assert (await client.get("/")).json()["numbers"] == []
        headers = {"X-Position": response.headers["x-position"]}
        assert (await client.get("/", headers=headers)).json()["numbers"] == [1]


@each_framework
async def test_a_cookie_in_any_encoding_is_no_error(framework: App, master: DBConnect, replica: DBConnect) -> None:
    ryw = ReadYourWrites(FakeSource(), secret=SECRET)
    async with framework(Shop(master, replica), ryw) as make_client, make_client() as client:
        for value in (b"ctxdb_position=caf\xe9", "ctxdb_position=café".encode()):
            assert (await client.get("/", headers={b"cookie": value})).status_code == 200


async def test_the_noted_position_is_behind_the_commit_record(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, monitor: HostMonitor
) -> None:
    positions = Positions.of_task()
    for number in range(20):
        async with new_db_ctx():
            await (await db_session(master)).execute(insert(NUMBERS).values(number=number))
            before = await cluster.primary.position()
        position = positions.required(monitor)
        assert position is not None
        assert before < position <= await cluster.primary.position()
        for node in cluster.standbys:
            await node.wait_for_replay(position)
            assert await node.fetch_value("SELECT count(*) FROM number WHERE number = $1", number) == 1


async def test_no_read_is_stale_while_replicas_lag(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, ryw: ReadYourWrites
) -> None:
    served: Counter[str] = Counter()

    async def work(make_client: MakeClient, first: int) -> None:
        async with make_client() as client:
            for number in range(first, first + 20):
                assert (await client.post("/", params={"number": number})).status_code == 201
                answer = (await client.get("/")).json()
                assert number in answer["numbers"]
                served[answer["server"]] += 1

    await cluster.standbys[0].set_apply_delay(0.02)
    await cluster.standbys[1].set_apply_delay(0.2)
    async with starlette(Shop(master, replica), ryw) as make_client:
        await asyncio.gather(*(work(make_client, 100 * client) for client in range(5)))
    assert served.total() == 100


async def _statements(node: PostgresNode, name: str, work: Callable[[], Awaitable[object]]) -> list[str]:
    """Do `work`; return the first word of each statement that connections with a name send to a server meanwhile."""
    mark = f"from here on {uuid4()}"
    await node.execute(f"SELECT '{mark}'")
    await work()
    lines = (await node.log()).rpartition(mark)[2].splitlines()
    sent = [line.split(": ", 2)[2] for line in lines if line.startswith(f"<{name}> LOG:")]
    return [statement.split()[0].rstrip(";") for statement in sent]


async def test_a_reader_that_never_wrote_costs_no_round_trip(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, ryw: ReadYourWrites
) -> None:
    async with starlette(Shop(master, replica), ryw) as make_client, make_client() as client:
        for number in range(4):
            await client.post("/", params={"number": number})
            client.cookies.clear()
            await client.get("/")
        for node in cluster.nodes:
            await node.set("log_line_prefix", "<%a> ")
            await node.set("log_statement", "all")

        async def read() -> None:
            for _ in range(2):
                assert "set-cookie" not in (await client.get("/")).headers

        for node in cluster.standbys:
            assert await _statements(node, "readers", read) == ["BEGIN", "SELECT", "SELECT", "COMMIT"]
        assert await _statements(cluster.primary, "readers", read) == []

        async def write() -> None:
            await client.post("/", params={"number": 5})

        # The SELECT reads the position. The commit is confirmed by the monitor, over a connection of its own.
        assert await _statements(cluster.primary, "writers", write) == ["BEGIN", "INSERT", "COMMIT", "SELECT"]


async def test_other_clients_are_answered_while_one_waits_for_a_replica(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, monitor: HostMonitor
) -> None:
    ryw = ReadYourWrites(monitor, secret=SECRET, wait=30)
    async with (
        starlette(Shop(master, replica), ryw) as make_client,
        make_client() as writer,
        make_client() as other,
    ):
        async with paused(cluster):
            await writer.post("/", params={"number": 1})
            waiting = asyncio.create_task(writer.get("/"))
            for _ in range(20):
                assert (await other.get("/")).json()["numbers"] == []
            assert not waiting.done()
        answer = (await waiting).json()
        assert answer["numbers"] == [1]
        assert answer["server"] in {node.host for node in cluster.standbys}


async def test_a_browser_that_writes_by_two_requests_at_once_reads_both_writes(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, ryw: ReadYourWrites
) -> None:
    shop = Shop(master, replica)
    first_is_committed, second_is_answered = asyncio.Event(), asyncio.Event()

    async def write(request: Request) -> Response:
        number = int(request.query_params["number"])
        await shop.write(number)
        await commit_db_session(master)
        if number == 1:
            first_is_committed.set()
            await second_is_answered.wait()
        return PlainTextResponse("written", status_code=201)

    async def read(request: Request) -> Response:
        return JSONResponse(await shop.read())

    app = Starlette(routes=[Route("/", write, methods=["POST"]), Route("/", read)])
    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(ryw)
    async with clients_of_asgi(app) as make_client, make_client() as browser:
        first = asyncio.create_task(browser.post("/", params={"number": 1}))
        await first_is_committed.wait()
        await cluster.wait_for_replay()
        async with paused(cluster):
            await browser.post("/", params={"number": 2})
            second_is_answered.set()
            # The response of the first write comes last, and so does its cookie.
            await first
            assert (await browser.get("/")).json() == {"numbers": [1, 2], "server": cluster.primary.host}


@pytest.mark.parametrize("kind", ["monitor", "sidecar"])
async def test_a_process_that_has_not_seen_a_promotion_yet_reads_the_write_of_another_process(
    cluster: PostgresCluster, number_table: None, engines: Engines, readers: Engines, kind: str
) -> None:
    old, new, ahead = cluster.nodes
    async with monitor_of(cluster) as aware, monitor_of(cluster) as unaware, AsyncExitStack() as stack:

        async def client_of(monitor: HostMonitor) -> httpx.AsyncClient:
            source: HostMonitor | PgStatusClient = monitor
            if kind == "sidecar":
                url = await stack.enter_async_context(serve_monitor(monitor))
                source = await stack.enter_async_context(PgStatusClient(url, max_age=3600))
            master = await stack.enter_async_context(following(engines, follow_master(source)))
            replica = await stack.enter_async_context(following(readers, follow_replica(source)))
            app = starlette(Shop(master, replica), ReadYourWrites(source, secret=SECRET))
            return await stack.enter_async_context((await stack.enter_async_context(app))())

        writer, reader = await client_of(aware), await client_of(unaware)
        # The standby that is promoted lacks WAL that the other one has. So the other one has replayed the position
        # of a write that it does not have.
        await new.follow(new, wait=False)
        await ahead.wait_for_replay(await old.write_wal(2_000_000))
        await unaware.poll()
        await new.promote()
        await aware.poll()
        assert (aware.master(), unaware.master()) == (new.host, old.host)
        await writer.post("/", params={"number": 1})
        token = writer.cookies["ctxdb_position"]
        assert int(token.split(".")[0], 16) < await ahead.position()

        response = await reader.get("/", headers={"cookie": f"ctxdb_position={token}"})

        assert response.json() == {"numbers": [1], "server": new.host}


async def test_forged_and_expired_tokens_are_ignored(
    cluster: PostgresCluster,
    master: DBConnect,
    replica: DBConnect,
    ryw: ReadYourWrites,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with starlette(Shop(master, replica), ryw) as make_client, make_client() as writer, paused(cluster):
        await writer.post("/", params={"number": 1})
        token = writer.cookies["ctxdb_position"]
        position, expires, timeline, signature = token.split(".")
        later = f"{int(expires, 16) + 1000:x}"
        foreign = TokenSigner(b"x" * 32, "ctxdb_position", 300).sign(int(position, 16))
        of_another_cookie = TokenSigner(SECRET, "other", 300).sign(int(position, 16))
        tokens = [
            *(f"{position}0.{expires}.{timeline}.{signature}", f"{position}.{later}.{timeline}.{signature}"),
            *(f"{position}.{expires}.{timeline}1.{signature}", f"{position}.{expires}.{signature}"),
            *(foreign, of_another_cookie, f"{position}.{expires}.{timeline}.", f"{position}.{expires}", f" {token}x"),
            *("", ".", "..", "é", "x" * 5000),
        ]
        for forged in tokens:
            async with make_client() as client:
                response = await client.get("/", headers={b"cookie": f"ctxdb_position={forged}".encode("latin-1")})
                assert response.json()["numbers"] == [], forged
        # A valid token is found among other cookies.
        async with make_client() as client:
            cookies = f'a=b; xctxdb_position=1; ctxdb_position="{token}"; c=d'
            assert (await client.get("/", headers={"cookie": cookies})).json()["numbers"] == [1]
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 301)
        assert (await writer.get("/")).json()["numbers"] == []


async def test_the_response_of_a_failed_request_carries_the_position_of_an_early_commit(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, ryw: ReadYourWrites
) -> None:
    shop = Shop(master, replica)

    async def write(request: Request) -> Response:
        await shop.write(1)
        await commit_db_session(master)
        return PlainTextResponse("no", status_code=409)

    async def in_a_unit_of_its_own(request: Request) -> Response:
        await run_in_new_ctx(shop.write, 2)
        return PlainTextResponse("yes")

    app = Starlette(
        routes=[Route("/conflict", write, methods=["POST"]), Route("/own", in_a_unit_of_its_own, methods=["POST"])]
    )
    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(ryw)
    async with clients_of_asgi(app) as make_client, make_client() as client:
        assert "set-cookie" in (await client.post("/conflict")).headers
        assert "set-cookie" in (await client.post("/own")).headers


async def test_a_streamed_body_reads_the_write_of_its_request(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, ryw: ReadYourWrites
) -> None:
    shop = Shop(master, replica)

    async def stream(request: Request) -> Response:
        await shop.write(1)

        async def body() -> AsyncIterator[str]:
            # The reader of this unit of work, after the write was committed.
            yield str((await shop.read())["numbers"])

        async def afterwards() -> None:
            await shop.write(2)

        return StreamingResponse(body(), background=BackgroundTask(afterwards))

    app = Starlette(routes=[Route("/", stream, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(ryw)
    async with clients_of_asgi(app) as make_client, make_client() as client, paused(cluster):
        response = await client.post("/")
        assert response.text == "[1]"
        assert "set-cookie" in response.headers
    assert [row[0] for row in await cluster.primary.execute("SELECT number FROM number ORDER BY 1")] == [1, 2]


def test_a_websocket_has_the_position_that_its_client_brings() -> None:
    source = FakeSource()
    seen: list[int | None] = []
    ryw = ReadYourWrites(source, secret=SECRET)

    async def echo(websocket: WebSocket) -> None:
        seen.append(Positions.of_task().required(source))
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", echo)])
    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(ryw)
    token = TokenSigner(SECRET, "ctxdb_position", 300).sign(4711)
    with TestClient(app, cookies={"ctxdb_position": token}) as client, client.websocket_connect("/") as websocket:
        websocket.send_text("hello")
        assert websocket.receive_text() == "hello"
    assert seen == [4711]


# --- in process -------------------------------------------------------------------------------------------------------


async def test_a_unit_of_work_reads_its_own_commit_by_an_older_reader(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect
) -> None:
    shop = Shop(master, replica)
    async with paused(cluster), new_db_ctx():
        assert (await shop.read())["numbers"] == []
        await commit_db_session(replica)
        await shop.write(1)
        await commit_db_session(master)
        assert await shop.read() == {"numbers": [1], "server": cluster.primary.host}
        await commit_db_session(replica)
        for node in cluster.standbys:
            await node.resume_replay()
            await node.wait_for_replay(await cluster.primary.position())
        assert (await shop.read())["server"] in {node.host for node in cluster.standbys}


async def test_a_reader_in_a_transaction_moves_to_the_host_that_has_the_write(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, readers: Engines
) -> None:
    shop = Shop(master, replica)
    standbys = {node.host for node in cluster.standbys}
    async with paused(cluster), new_db_ctx(statement_timeout=12.5):
        session = await db_session(replica)
        for number in range(3):
            assert (await session.scalars(select(NUMBERS.c.number))).all() == list(range(number))
            assert (await session.scalar(SERVER) in standbys) == (number == 0)
            assert await session.scalar(text("SHOW statement_timeout")) == "12500ms"
            await shop.write(number)
            await commit_db_session(master)
    # All connections that were taken have been given back.
    assert await asyncio.gather(*(asyncio.create_task(server_of(replica)) for _ in range(4)))
    assert readers.connections.total() <= 5


async def test_a_repeatable_read_transaction_keeps_its_snapshot(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect
) -> None:
    shop = Shop(master, replica)
    async with paused(cluster), new_db_ctx():
        async with atomic_db_session(replica, isolation_level="REPEATABLE READ") as session:
            await session.scalars(select(NUMBERS))
            await shop.write(1)
            await commit_db_session(master)
            assert (await session.scalars(select(NUMBERS))).all() == []
        assert (await shop.read())["numbers"] == [1]


@pytest.mark.parametrize("bound_by", ["savepoint", "options", "setting", "stream"])
async def test_a_reader_that_cannot_move_raises_an_error(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect, bound_by: str
) -> None:
    shop = Shop(master, replica)
    async with paused(cluster), new_db_ctx():
        async with AsyncExitStack() as stack:
            options = {"read_only": True} if bound_by == "options" else {}
            session = await stack.enter_async_context(atomic_db_session(replica, **options))  # type: ignore[arg-type]
            await session.scalars(select(NUMBERS))
            if bound_by == "savepoint":
                await stack.enter_async_context(session.begin_nested())
                await session.scalars(select(NUMBERS))
            elif bound_by == "setting":
                await (await session.connection()).exec_driver_sql("SET work_mem = '1MB'")
            elif bound_by == "stream":
                await session.stream(select(NUMBERS))
            await shop.write(1)
            await commit_db_session(master)
            with pytest.raises(StaleReaderError, match="commit_db_session"):
                await session.scalars(select(NUMBERS))
        assert (await shop.read())["numbers"] == [1]


async def test_a_unit_of_work_reads_the_writes_of_earlier_ones_and_of_child_tasks(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect
) -> None:
    shop = Shop(master, replica)
    async with paused(cluster):
        await run_in_new_ctx(shop.write, 1)
        assert (await run_in_new_ctx(shop.read))["numbers"] == [1]
        # A task that this one starts reads the write. What that task writes, this one reads as well.
        assert (await asyncio.create_task(run_in_new_ctx(shop.read)))["numbers"] == [1]
        await asyncio.create_task(run_in_new_ctx(shop.write, 2))
        assert (await run_in_new_ctx(shop.read))["numbers"] == [1, 2]


async def test_the_caller_reads_the_writes_of_gathered_units_of_work(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect
) -> None:
    shop = Shop(master, replica)

    async def write_and_read() -> list[int]:
        # This task has used no database before.
        await gather_in_new_ctx(*(partial(shop.write, number) for number in range(3)))
        numbers: list[int] = (await shop.read())["numbers"]
        return numbers

    async with paused(cluster):
        assert await asyncio.create_task(run_in_new_ctx(write_and_read)) == [0, 1, 2]


async def test_a_task_does_not_wait_for_the_writes_of_a_sibling_task(
    cluster: PostgresCluster, master: DBConnect, replica: DBConnect
) -> None:
    shop = Shop(master, replica)
    # The context in which both tasks are started has used the database, as that of a server may have.
    await run_in_new_ctx(shop.read)
    async with paused(cluster):
        await asyncio.create_task(run_in_new_ctx(shop.write, 1))
        answer = await asyncio.create_task(run_in_new_ctx(shop.read))
        assert answer["server"] in {node.host for node in cluster.standbys}


async def test_readers_go_back_to_replicas_without_new_connections(
    cluster: PostgresCluster, readers: Engines, master: DBConnect, replica: DBConnect
) -> None:
    async def write_and_read(number: int) -> None:
        async with new_db_ctx():
            await (await db_session(master)).execute(insert(NUMBERS).values(number=number))
        assert await server_of(replica) == cluster.primary.host

    async with paused(cluster):
        for number in range(20):
            await asyncio.create_task(write_and_read(number))
            assert await asyncio.create_task(server_of(replica)) != cluster.primary.host
    assert readers.connections.total() <= 5


async def test_an_unknown_position_is_required_until_a_commit_on_another_master() -> None:
    source = FakeSource()
    positions = Positions()
    positions.note(source, "n1", UNKNOWN_POSITION)
    positions.note(source, "n1", 5)
    assert positions.required(source) == UNKNOWN_POSITION
    # Positions of another master replace those of the former one.
    positions.note(source, "n2", 7)
    assert positions.required(source) == 7
    positions.note(source, "n2", 6)
    assert positions.required(source) == 7


async def test_a_write_of_unknown_position_is_on_the_latest_timeline_that_is_known() -> None:
    source, other = FakeSource(), FakeSource()
    want_positions(source)
    Positions().note(source, "n2", 100, 2)
    positions = Positions()
    positions.note(source, "n2", UNKNOWN_POSITION)
    positions.note(other, "n2", UNKNOWN_POSITION)
    assert (positions.timeline(source), positions.timeline(other)) == (2, 0)


async def test_position_of_a_write_replaces_the_position_that_a_client_has_brought() -> None:
    source = FakeSource()
    positions = Positions()
    positions.bring(source, 1000)
    assert positions.required(source) == 1000
    assert positions.written_by(source) is None
    positions.note(source, "n1", 10)
    assert positions.required(source) == positions.written_by(source) == 10
    assert positions.required(FakeSource()) is None


async def test_the_hosts_are_asked_once_for_each_later_timeline_that_clients_bring() -> None:
    source = FakeSource()

    async def read(timeline: int) -> None:
        positions = Positions()
        positions.bring(source, 5, timeline)
        token = current_positions.set(positions)
        await (await db.create_session()).close()
        current_positions.reset(token)

    async with DBConnect(
        lambda host: create_async_engine("postgresql+asyncpg://"), before_create_session_handler=follow_replica(source)
    ) as db:
        for timeline in (0, 2, 2, 1, 3):
            await read(timeline)
        assert source.confirmed == ["n1", "n1"]
        source.master, source.error = None, OSError("the source is away")
        await read(4)
        await read(4)
        assert source.confirmed[2:] == [next(iter(await source.find_replicas()))] * 2


async def test_writes_are_forgotten_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource()
    positions = Positions()
    positions.limit(source, max_age=60, wait=0)
    positions.note(source, "n1", 10)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert positions.required(source) is None
    assert positions.is_seen_on(source, "n2")


# --- mistakes ---------------------------------------------------------------------------------------------------------


async def test_read_your_writes_inside_of_the_unit_of_work_is_an_error() -> None:
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    app.add_middleware(ReadYourWrites(FakeSource(), secret=SECRET))
    app.add_middleware(DBSessionMiddleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        with pytest.raises(MiddlewareOrderError, match="after the one for DBSessionMiddleware"):
            await client.get("/")


def test_an_enclosing_plugin_before_ctxdbplugin_is_refused() -> None:
    ryw = ReadYourWrites(FakeSource(), secret=SECRET)
    with pytest.raises(ImproperlyConfiguredException, match="list it after that"):
        Litestar(plugins=[EnclosingPlugin(ryw), CtxDBPlugin()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"secret": "short"}, "16"),
        ({"secret": 3}, "`secret` is of type int"),
        ({"max_age": 0}, "max_age"),
        ({"wait": -1}, "wait"),
        ({"wait": None}, "wait"),
        ({"cookie": "a b"}, "cookie"),
        ({"header": "a:b"}, "header"),
        ({"cookie": None}, "cookie"),
        ({"source": "n1"}, "`source`"),
    ],
    ids=str,
)
def test_invalid_options_of_read_your_writes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ReadYourWrites(**{"source": FakeSource(), "secret": SECRET, **options})
