"""Sessions that are injected under names of the user's choice."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

import pytest
from litestar import Controller, Litestar, get, post
from litestar.app import DEFAULT_OPENAPI_CONFIG
from litestar.config.app import AppConfig
from litestar.di import Provide
from litestar.plugins import InitPlugin
from litestar.response import Stream
from litestar.testing import TestClient
from sqlalchemy import text
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.litestar_app import Ask, Injected, litestar_app

from ctxdb_core import DBConnect, db_session
from ctxdb_litestar import CtxDBPlugin, PluginConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


async def test_a_handler_gets_the_requests_session(db: DBConnect, database: Database, ask: Ask) -> None:
    @post("/")
    async def write(session: Injected[AsyncSession]) -> bool:
        await session.execute(text("INSERT INTO item VALUES ('one')"))
        return session is await db_session(db)

    assert (await (await ask(litestar_app(write, plugins=[CtxDBPlugin(session=db)]))).post("/")).json() is True
    assert await database.names() == ["one"]


async def test_several_databases_have_a_name_each(db: DBConnect, database: Database, ask: Ask) -> None:
    async with database.connect() as second:

        @post("/")
        async def write(orders: Injected[AsyncSession], stock: Injected[AsyncSession]) -> list[bool]:
            await orders.execute(text("INSERT INTO item VALUES ('order')"))
            await stock.execute(text("INSERT INTO item VALUES ('stock')"))
            return [orders is await db_session(db), stock is await db_session(second)]

        client = await ask(litestar_app(write, plugins=[CtxDBPlugin(orders=db, stock=second)]))
        assert (await client.post("/")).json() == [True, True]
    assert await database.names() == ["order", "stock"]


async def test_database_can_be_injected_under_two_names(db: DBConnect, ask: Ask) -> None:
    @get("/")
    async def read(one: Injected[AsyncSession], two: Injected[AsyncSession]) -> bool:
        return one is two

    assert (await (await ask(litestar_app(read, plugins=[CtxDBPlugin(one=db, two=db)]))).get("/")).json() is True


async def test_a_failing_commit_is_seen_by_no_dependency_and_answered_with_an_error(db: DBConnect, ask: Ask) -> None:
    """Litestar leaves its dependencies before the response starts."""
    ended: list[str] = []

    async def dependency() -> AsyncGenerator[str, None]:
        yield "value"
        ended.append("normally")

    @post("/")
    async def write(value: Injected[str]) -> str:
        await insert_row_that_fails_at_commit(db)
        return value

    client = await ask(litestar_app(write, db=db, dependencies={"value": Provide(dependency)}))
    assert (await client.post("/")).status_code == 500
    assert ended == ["normally"]


@pytest.mark.parametrize(("fails", "names"), [(False, ["after", "before", "handler"]), (True, [])])
async def test_a_generator_dependency_shares_the_session_to_its_end(
    db: DBConnect, database: Database, ask: Ask, fails: bool, names: list[str]
) -> None:
    async def dependency(session: Injected[AsyncSession]) -> AsyncGenerator[AsyncSession, None]:
        await insert(db, "before")
        yield session
        assert await insert(db, "after") is session

    @post("/")
    async def write(session: Injected[AsyncSession], same: Injected[AsyncSession]) -> None:
        assert same is session
        await insert(db, "handler")
        if fails:
            raise LookupError

    plugin = CtxDBPlugin(session=db)
    client = await ask(litestar_app(write, plugins=[plugin], dependencies={"same": Provide(dependency)}))
    assert (await client.post("/")).status_code == (500 if fails else 201)
    assert await database.names() == names


async def test_dependencies_that_are_made_at_once_share_the_session(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    """Litestar makes those that do not depend on each other in tasks."""

    async def make() -> AsyncSession:
        return await db_session(db)

    async def make_and_leave() -> AsyncGenerator[AsyncSession, None]:
        yield await db_session(db)

    def make_nothing() -> Generator[None, None, None]:
        yield

    @get("/")
    async def read(
        session: Injected[AsyncSession],
        first: Injected[AsyncSession],
        second: Injected[AsyncSession],
        third: Injected[None],
    ) -> list[bool]:
        await insert(db, "one")
        return [session is first, session is second]

    app = litestar_app(
        read,
        plugins=[CtxDBPlugin(session=db)],
        dependencies={"first": Provide(make), "second": Provide(make_and_leave), "third": Provide(make_nothing)},
    )
    assert (await (await ask(app)).get("/")).json() == [True, True]
    assert await database.names() == ["one"]


class Items:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self, name: str) -> None:
        await self.session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})


async def test_a_controller_and_its_dependencies_get_the_session(db: DBConnect, database: Database, ask: Ask) -> None:
    async def provide_items(session: Injected[AsyncSession]) -> Items:
        return Items(session)

    class ItemController(Controller):
        path = "/items"
        dependencies = {"items": Provide(provide_items)}  # noqa: RUF012 - Litestar declares it so

        @post("/")
        async def write(self, items: Injected[Items]) -> None:
            await items.add("one")

    client = await ask(litestar_app(ItemController, plugins=[CtxDBPlugin(session=db)]))
    assert (await client.post("/items")).status_code == 201
    assert await database.names() == ["one"]


async def test_a_stream_uses_the_session_after_the_response(db: DBConnect, database: Database, ask: Ask) -> None:
    @get("/")
    async def read(session: Injected[AsyncSession]) -> Stream:
        await session.execute(text("INSERT INTO item VALUES ('response')"))

        async def chunks() -> AsyncGenerator[str, None]:
            assert database.checked_out == 0
            await session.execute(text("INSERT INTO item VALUES ('stream')"))
            yield "body"

        return Stream(chunks())

    assert (await (await ask(litestar_app(read, plugins=[CtxDBPlugin(session=db)]))).get("/")).text == "body"
    await eventually(lambda: not database.checked_out, "the stream's connection is not back")
    assert await database.names() == ["response", "stream"]


async def test_a_handler_that_names_no_session_opens_none(db: DBConnect, database: Database, ask: Ask) -> None:
    @get("/")
    async def read() -> str:
        return "done"

    assert (await (await ask(litestar_app(read, plugins=[CtxDBPlugin(session=db)]))).get("/")).status_code == 200
    assert database.checkouts == 0


async def test_a_nearer_layer_can_provide_another_session(db: DBConnect, ask: Ask) -> None:
    async def provide() -> str:
        return "another"

    @get("/", dependencies={"session": Provide(provide)})
    async def read(session: Injected[str]) -> str:
        return session

    assert (await (await ask(litestar_app(read, plugins=[CtxDBPlugin(session=db)]))).get("/")).text == "another"


# --- how it is declared -----------------------------------------------------------------------------------------------


def test_the_plugin_leaves_the_openapi_schema_unchanged() -> None:
    def schema(plugins: list[Any], dependencies: dict[str, Any]) -> dict[str, Any]:
        @get("/", dependencies=dependencies)
        async def read(session: Injected[AsyncSession]) -> str:
            return str(session)

        @get("/other")
        async def other() -> str:
            return "other"

        names = _namespace()
        app = litestar_app(
            read, other, plugins=plugins, signature_namespace=names, openapi_config=DEFAULT_OPENAPI_CONFIG
        )
        return app.openapi_schema.to_schema()

    async def provide() -> Any: ...

    db = DBConnect.from_url("sqlite+aiosqlite://")
    with_plugin = schema([CtxDBPlugin(session=db)], {})
    assert with_plugin == schema([], {"session": Provide(provide)})
    assert "session" not in str(with_plugin)


def _namespace() -> dict[str, Any]:
    from sqlalchemy.ext.asyncio import AsyncSession

    return {"AsyncSession": AsyncSession}


def test_foreign_type_named_async_session_is_left_alone() -> None:
    class AsyncSession: ...

    async def provide() -> Any:
        return AsyncSession()

    @get("/", dependencies={"http": Provide(provide)})
    async def read(http: Injected[AsyncSession]) -> str:
        return type(http).__qualname__

    db = DBConnect.from_url("sqlite+aiosqlite://")
    for option in ({"signature_types": [AsyncSession]}, {"signature_namespace": {"AsyncSession": AsyncSession}}):
        app = litestar_app(read, plugins=[CtxDBPlugin(session=db)], **option)
        with TestClient(app) as client:
            assert client.get("/").text.endswith("<locals>.AsyncSession")


def test_a_name_that_is_taken_is_refused() -> None:
    async def provide() -> str:
        return "taken"

    db = DBConnect.from_url("sqlite+aiosqlite://")
    for taken in (Provide(provide), provide):
        with pytest.raises(PluginConfigurationError, match="'session' already: give the session another name"):
            litestar_app(plugins=[CtxDBPlugin(session=db)], dependencies={"session": taken})
    with pytest.raises(PluginConfigurationError, match="'session' already"):
        litestar_app(plugins=[CtxDBPlugin(session=db), CtxDBPlugin(session=db)])


def provide_another() -> str:
    return "another"


class Taker(InitPlugin):
    """Stands for a plugin that provides sessions of its own, by whatever means."""

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        app_config.dependencies["session"] = Provide(provide_another, sync_to_thread=False)
        return app_config


@pytest.mark.parametrize("comes_first", [True, False])
def test_a_second_plugin_that_provides_a_name_is_refused(comes_first: bool) -> None:
    ours, others = CtxDBPlugin(session=DBConnect.from_url("sqlite+aiosqlite://")), Taker()

    @get("/")
    async def read() -> None: ...

    with pytest.raises(PluginConfigurationError, match="CtxDBPlugin\\(other_name=db\\)"):
        Litestar([read], plugins=[others, ours] if comes_first else [ours, others])


@pytest.mark.parametrize("name", ["request", "state", "socket", "data", "scope", "headers", "cookies", "query", "body"])
def test_a_name_that_litestar_reserves_is_refused(name: str) -> None:
    with pytest.raises(PluginConfigurationError, match=f"{name!r}: give the session another name"):
        CtxDBPlugin(**{name: DBConnect.from_url("sqlite+aiosqlite://")})  # type: ignore[arg-type]  # a dynamic name


@pytest.mark.parametrize("value", ["postgresql://app:secret@host/app", None, Litestar])
def test_value_that_is_no_database_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="is no DBConnect") as caught:
        CtxDBPlugin(value)
    assert "secret" not in str(caught.value)
    with pytest.raises(TypeError, match=r"CtxDBPlugin\(before_comit=.*its options are `before_commit`"):
        CtxDBPlugin(before_comit=value)
