"""`CtxDBPlugin` in an application: how it gets there, and what it does when the application starts and ends."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from litestar import Litestar, Request, Router, get, post
from litestar.config.app import AppConfig
from litestar.config.compression import CompressionConfig
from litestar.events import listener
from litestar.exceptions import LitestarException
from litestar.testing import AsyncTestClient, TestClient
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.database import Database, eventually, insert
from tests.support.litestar_app import Ask, Injected, litestar_app
from tests.support.server import http_client, serve

from ctxdb_core import ContextClosedError, ContextNotInitiatedError, DBConnect, commit_2xx, db_session, new_db_ctx
from ctxdb_core.asgi import ASGIStreamBoundary
from ctxdb_litestar import CtxDBPlugin, EnclosingPlugin

# --- in the application -----------------------------------------------------------------------------------------------


async def test_the_application_is_still_one_of_its_class(db: DBConnect, database: Database, ask: Ask) -> None:
    calls: list[str] = []

    class Application(Litestar):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            calls.append(scope["type"])
            await super().__call__(scope, receive, send)

    @post("/")
    async def write() -> None:
        await insert(db, "one")

    app = Application([write], plugins=[CtxDBPlugin(db)], logging_config=None)
    assert isinstance(app, Application)
    assert type(app).__qualname__ == Application.__qualname__
    assert type(app).__base__ is Application
    assert (await (await ask(app)).post("/")).status_code == 201
    assert "http" in calls
    assert await database.names() == ["one"]


async def test_routes_that_are_registered_later_are_inside(db: DBConnect, database: Database, ask: Ask) -> None:
    @post("/")
    async def write() -> None:
        await insert(db, "one")

    app = litestar_app(db=db, openapi_config=None)
    app.register(Router("/later", route_handlers=[write]))
    assert (await (await ask(app)).post("/later")).status_code == 201
    assert await database.names() == ["one"]


async def test_an_enclosing_middleware_is_around_everything_and_sees_a_response_after_its_commit(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    seen: list[tuple[str, list[str]]] = []

    def note(app: Any) -> Any:
        async def noting(scope: Any, receive: Any, send: Any) -> None:
            async def note_start(message: Any) -> None:
                if message["type"] == "http.response.start":
                    seen.append((scope["path"], await database.names()))
                await send(message)

            await app(scope, receive, note_start)

        return noting

    @post("/")
    async def write() -> None:
        await insert(db, "one")

    client = await ask(Litestar([write], plugins=[CtxDBPlugin(db), EnclosingPlugin(note)], logging_config=None))
    assert (await client.post("/")).status_code == 201
    assert (await client.get("/nowhere")).status_code == 404
    assert seen == [("/", ["one"]), ("/nowhere", ["one"])]


@pytest.mark.parametrize("others", [[], [EnclosingPlugin(lambda app: app)]])
def test_servers_recognise_the_application_by_a_coroutine_function_of_three_parameters(others: list[Any]) -> None:
    app = litestar_app(plugins=[CtxDBPlugin(), *others])
    assert inspect.iscoroutinefunction(app.__call__)
    assert list(inspect.signature(app.__call__).parameters) == ["scope", "receive", "send"]
    assert list(inspect.signature(app).parameters) == ["scope", "receive", "send"]


async def test_an_init_hook_can_add_the_plugins_work_as_well(db: DBConnect, database: Database, ask: Ask) -> None:
    def add(app_config: AppConfig) -> AppConfig:
        app_config.plugins.append(CtxDBPlugin(db))
        return app_config

    @post("/")
    async def write() -> None:
        await insert(db, "one")

    assert (await (await ask(litestar_app(write, plugins=[], on_app_init=[add]))).post("/")).status_code == 201
    assert await database.names() == ["one"]


@pytest.mark.parametrize("same", [True, False])
async def test_a_plugin_that_is_added_twice_works_once(db: DBConnect, database: Database, ask: Ask, same: bool) -> None:
    committed: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        committed.append(session)

    @post("/")
    async def write() -> None:
        await insert(db, "one")

    first = CtxDBPlugin(session=db, before_commit=before_commit)
    second = first if same else CtxDBPlugin(db, before_commit=before_commit)
    assert (await (await ask(litestar_app(write, plugins=[first, second]))).post("/")).status_code == 201
    assert len(committed) == 1
    assert await database.names() == ["one"]


async def test_plugin_serves_two_applications(db: DBConnect, database: Database, ask: Ask) -> None:
    plugin = CtxDBPlugin(session=db)
    for name in ("one", "two"):
        app = litestar_app(_writing(name), plugins=[plugin])
        assert (await (await ask(app)).post("/")).status_code == 201
    assert await database.names() == ["one", "two"]


def _writing(name: str) -> Any:
    @post("/")
    async def write(session: Injected[AsyncSession]) -> None:
        await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})

    return write


async def test_the_plugin_has_the_options_of_the_adapter(db: DBConnect, database: Database, ask: Ask) -> None:
    async def before_commit(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO item VALUES ('hook')"))

    @get("/", status_code=303)
    async def redirect() -> None:
        await insert(db, "redirect")

    @get("/done")
    async def write() -> str:
        await insert(db, "write")
        return "done"

    plugin = CtxDBPlugin(db, before_commit=before_commit, commit_policy=commit_2xx)
    client = await ask(litestar_app(redirect, write, plugins=[plugin]))
    assert (await client.get("/")).status_code == 303
    assert await database.names() == []
    assert (await client.get("/done")).status_code == 200
    assert await database.names() == ["hook", "write"]


async def test_sub_routers_are_inside(db: DBConnect, database: Database, ask: Ask) -> None:
    @post("/write")
    async def write() -> None:
        await insert(db, "one")

    router = Router("/outer", route_handlers=[Router("/inner", route_handlers=[write])])
    assert (await (await ask(litestar_app(router, db=db))).post("/outer/inner/write")).status_code == 201
    assert await database.names() == ["one"]


# --- the beginning and the end ----------------------------------------------------------------------------------------


async def test_every_database_is_closed_after_all_that_may_use_it(db: DBConnect, database: Database) -> None:
    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None, None]:
        yield
        async with new_db_ctx():
            await insert(db, "lifespan")

    async def on_shutdown() -> None:
        async with new_db_ctx():
            await insert(second, "on_shutdown")

    async with database.connect() as second:
        app = litestar_app(plugins=[CtxDBPlugin(db, session=second)], lifespan=[lifespan], on_shutdown=[on_shutdown])
        async with serve(app):
            pass
        await eventually(lambda: not database.backends("true"), "connections outlived the application")
    assert await database.names() == ["lifespan", "on_shutdown"]


async def test_the_databases_are_closed_although_a_hook_of_the_application_fails(
    db: DBConnect, database: Database
) -> None:
    async def fail() -> None:
        raise LookupError

    app = litestar_app(db=db, on_shutdown=[fail])
    with pytest.raises(LookupError):
        async with app.lifespan(), new_db_ctx():
            await insert(db, "one")
    await eventually(lambda: not database.backends("true"), "connections outlived the application")


async def test_the_lifespan_does_not_join_the_unit_of_work_that_its_server_was_started_in(
    db: DBConnect, database: Database
) -> None:
    started = False

    async def on_startup() -> None:
        nonlocal started
        with pytest.raises(ContextClosedError):
            await db_session(db)
        started = True

    async with new_db_ctx(), serve(litestar_app(db=db, on_startup=[on_startup])):
        assert started


async def test_an_event_listener_has_no_unit_of_work_but_can_have_one(db: DBConnect, database: Database) -> None:
    errors: list[Exception] = []

    @listener("written")
    async def note(name: str) -> None:
        try:
            await db_session(db)
        except ContextNotInitiatedError as exc:
            errors.append(exc)
        async with new_db_ctx():
            await insert(db, f"{name} noted")

    @post("/")
    async def write() -> str:
        await insert(db, "one")
        app.emit("written", "one")
        return "done"

    app = litestar_app(write, db=db, listeners=[note])
    async with serve(app) as base_url, http_client(base_url) as client:
        assert (await client.post("/")).status_code == 201
    assert len(errors) == 1
    assert await database.names() == ["one", "one noted"]


# --- Litestar's test clients, which run the application on a loop of their own ----------------------------------------


@post("/{name:str}")
async def write_name(session: Injected[AsyncSession], request: Request[Any, Any, Any]) -> None:
    await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": request.path_params["name"]})


@get("/")
async def read_names(session: Injected[AsyncSession]) -> list[str]:
    return list(await session.scalars(text("SELECT name FROM item ORDER BY name")))


@pytest.fixture
async def database_url(database: Database) -> str:
    return database.url


def test_the_sync_test_client(database_url: str) -> None:
    app = litestar_app(write_name, read_names, plugins=[CtxDBPlugin(session=DBConnect.from_url(database_url))])
    for name in ("one", "two"):
        with TestClient(app) as client:
            assert client.post(f"/{name}").status_code == 201
    # Without the context manager, each request runs on a loop of its own.
    client = TestClient(app)
    assert client.post("/three").status_code == 201
    assert client.get("/").json() == ["one", "three", "two"]


async def test_the_async_test_client(db: DBConnect, database: Database) -> None:
    app = litestar_app(write_name, read_names, plugins=[CtxDBPlugin(session=db)])
    async with AsyncTestClient(app) as client:
        async with new_db_ctx():
            # The test's own, on the test's own loop.
            await insert(db, "test")
        assert (await client.post("/one")).status_code == 201
        assert (await client.get("/")).json() == ["one", "test"]
        pools = [engine.pool for engine in database.engines]
    # The connections of the test's loop are closed as well; on that loop, and so a little later.
    await eventually(lambda: not database.backends("true"), "connections outlived the application")
    await eventually(lambda: all(engine.pool not in pools for engine in database.engines), "the engines are in use")


async def test_an_error_after_the_response_comes_out_of_the_test_client(db: DBConnect, database: Database) -> None:
    async def fail(request: Any) -> None:
        await insert(db, "hook")
        raise LookupError

    @post("/", after_response=fail)
    async def write() -> None:
        await insert(db, "one")

    async with AsyncTestClient(litestar_app(write, db=db)) as client:
        with pytest.raises(LitestarException) as caught:
            await client.post("/")
    # Each of Litestar's layers wraps it once more.
    root: BaseException = caught.value
    while root.__cause__ is not None:
        root = root.__cause__
    assert isinstance(root, LookupError)
    assert await database.names() == ["one"]


@pytest.mark.parametrize("compression", [None, CompressionConfig("gzip")])
def test_a_route_handles_exceptions_as_often_as_without_the_plugin(
    db: DBConnect, compression: CompressionConfig | None
) -> None:
    def stack(plugins: list[Any]) -> list[Any]:
        @get("/")
        async def read() -> str:
            return "done"

        app = litestar_app(read, plugins=plugins, openapi_config=None, compression_config=compression)
        stack: list[Any] = [app.asgi_router.handle_routing(path="/", method="GET")[0]]
        while hasattr(stack[-1], "app"):
            stack.append(stack[-1].app)
        return [type(each) for each in stack if not isinstance(each, ASGIStreamBoundary)]

    assert stack([CtxDBPlugin(db)]) == stack([])
