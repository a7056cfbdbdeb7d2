"""`DBConnect.overridden`: an application's own object leads to another database for a block."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from tests.support.database import TABLES, Database, insert
from tests.support.items import names

from ctxdb_core import DBConnect, new_db_ctx, new_non_ctx_session, run_in_new_ctx
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError
from ctxdb_core.testing import TableCleaner, shared_transaction
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown


@pytest.fixture
def make_url_of_file(tmp_path: Path) -> Callable[[str], str]:
    """Makes a database of its own with the tests' tables, and returns its URL."""

    def make(name: str) -> str:
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            for table in TABLES:
                connection.execute(table)
        return f"sqlite+aiosqlite:///{tmp_path / name}"

    return make


@pytest.fixture
def url(make_url_of_file: Callable[[str], str]) -> str:
    return make_url_of_file("other.db")


async def test_sessions_of_the_block_are_on_the_other_database(db: DBConnect, database: Database, url: str) -> None:
    await run_in_new_ctx(insert, db, "own")
    with db.overridden(url) as same:
        assert same is db
        await run_in_new_ctx(insert, db, "other")
        assert await names(db) == ["other"]
    assert await names(db) == await database.names() == ["own"]
    async with DBConnect.from_url(url) as other:
        assert await names(other) == ["other"]


async def test_an_asynchronous_block_closes_its_connections(db: DBConnect, url: str) -> None:
    async with db.overridden(url):
        engine = await db.engine()
        await run_in_new_ctx(insert, db, "other")
        assert "Connections in pool: 1" in engine.pool.status()
    assert "Connections in pool: 0" in engine.pool.status()


async def test_an_error_in_the_block_leaves_the_object_as_it_was(db: DBConnect, database: Database, url: str) -> None:
    with pytest.raises(LookupError):
        async with db.overridden(url):
            raise LookupError
    await run_in_new_ctx(insert, db, "own")
    assert await database.names() == ["own"]


async def test_a_creator_makes_an_engine_for_the_host_on_each_event_loop(db: DBConnect, url: str) -> None:
    hosts = []

    def create(host: str) -> AsyncEngine:
        hosts.append(host)
        return create_async_engine(url)

    async with db.overridden(create):
        await run_in_new_ctx(insert, db, "one")
        await asyncio.to_thread(asyncio.run, run_in_new_ctx(insert, db, "two"))
        assert await names(db) == ["one", "two"]
    assert hosts == ["127.0.0.1"] * 2


def test_blocks_without_an_event_loop_serve_clients_with_loops_of_their_own(url: str) -> None:
    db = DBConnect.from_url("postgresql+asyncpg://nobody@db.invalid/shop")

    async def endpoint(request: Request) -> PlainTextResponse:
        await insert(db, request.path_params["name"])
        return PlainTextResponse(db.host or "")

    app = Starlette(routes=[Route("/{name}", endpoint)], lifespan=close_on_shutdown(db))
    app.add_middleware(DBSessionMiddleware)
    for name in ("one", "two"):
        with db.overridden(url), TestClient(app) as client:
            assert client.get(f"/{name}").text.endswith("other.db")
    assert db.host == "db.invalid"
    with closing(sqlite3.connect(make_url(url).database or "")) as connection:
        assert connection.execute("SELECT name FROM item").fetchall() == [("one",), ("two",)]


async def test_blocks_are_nested(db: DBConnect, database: Database, make_url_of_file: Callable[[str], str]) -> None:
    async with db.overridden(make_url_of_file("outer.db")):
        async with db.overridden(make_url_of_file("inner.db")):
            await run_in_new_ctx(insert, db, "inner")
            assert await names(db) == ["inner"]
        await run_in_new_ctx(insert, db, "outer")
        assert await names(db) == ["outer"]
    assert await names(db) == await database.names() == []


async def test_blocks_end_in_any_order(
    db: DBConnect, database: Database, make_url_of_file: Callable[[str], str]
) -> None:
    first, second = db.overridden(make_url_of_file("first.db")), db.overridden(make_url_of_file("second.db"))
    first.__enter__()
    await run_in_new_ctx(insert, db, "first")
    second.__enter__()
    await run_in_new_ctx(insert, db, "second")
    await first.__aexit__(None, None, None)
    assert await names(db) == ["second"]
    await second.__aexit__(None, None, None)
    await run_in_new_ctx(insert, db, "own")
    assert await names(db) == await database.names() == ["own"]


async def test_a_block_that_is_entered_twice_is_refused(db: DBConnect, url: str) -> None:
    block = db.overridden(url)
    with block, pytest.raises(ArgumentValueError, match="entered already"):
        block.__enter__()


async def test_the_host_does_not_change_in_the_block(url: str) -> None:
    db = DBConnect(lambda host: create_async_engine(f"postgresql+asyncpg://nobody@{host}/shop"))
    async with db.overridden(url):
        await run_in_new_ctx(insert, db, "before")
        await db.connect("db.invalid")
        assert await names(db) == ["before"]
    assert db.host is None


async def test_the_handler_that_looks_for_a_host_is_not_called_in_the_block(url: str) -> None:
    async def find_host(db: DBConnect) -> None:
        pytest.fail("the handler was called")

    db = DBConnect(lambda host: create_async_engine("sqlite+aiosqlite://"), before_create_session_handler=find_host)
    async with db.overridden(url):
        await run_in_new_ctx(insert, db, "one")
        assert await names(db) == ["one"]


async def test_sessions_are_made_as_before(url: str) -> None:
    class Session(AsyncSession):
        pass

    def make_sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, class_=Session)

    db = DBConnect(lambda host: create_async_engine("sqlite+aiosqlite://"), make_sessions, host="localhost")
    async with db.overridden(url), new_non_ctx_session(db) as session:
        assert isinstance(session, Session)


async def test_a_read_only_database_stays_read_only_in_the_block(database: Database, url: str) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as replica, replica.overridden(url):
        assert await names(replica) == []
        async with new_non_ctx_session(replica) as session:
            with pytest.raises(DBAPIError):
                await session.execute(text("INSERT INTO item VALUES ('one')"))


async def test_engines_of_the_block_are_told_to_listeners_of_the_block(db: DBConnect, url: str) -> None:
    outside, inside = [], []
    db.on_engine(lambda host, engine: outside.append(host))
    async with db.overridden(url):
        db.on_engine(lambda host, engine: inside.append(host))
        await db.engine()
    await db.engine()
    assert outside == ["127.0.0.1"]
    assert inside == [make_url(url).database, "127.0.0.1"]


async def test_engines_of_the_block_are_told_to_listeners_that_ask_for_overridden_engines(
    db: DBConnect, url: str
) -> None:
    told: list[str] = []
    db.on_engine(lambda host, engine: told.append(host), overridden=True)
    async with db.overridden(url):
        await db.engine()
    await db.engine()
    assert told == [make_url(url).database, "127.0.0.1"]


async def test_options_are_given_to_the_engine(db: DBConnect, url: str) -> None:
    async with db.overridden(url, execution_options={"marked": True}):
        assert (await db.engine()).sync_engine.get_execution_options()["marked"]


async def test_a_session_that_is_older_than_the_block_stays_on_its_database(
    db: DBConnect, database: Database, url: str
) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        with db.overridden(url):
            await insert(db, "two")
    assert await database.names() == ["one", "two"]


async def test_the_testing_tools_work_in_the_block(db: DBConnect, url: str) -> None:
    async with db.overridden(url):
        async with shared_transaction(db):
            await run_in_new_ctx(insert, db, "one")
            assert await names(db) == ["one"]
        assert await names(db) == []
        async with TableCleaner(db) as cleaner:
            await run_in_new_ctx(insert, db, "one")
            assert await cleaner.clean() == ["item"]


async def test_a_block_that_begins_in_a_shared_transaction_may_end_after_it(
    db: DBConnect, database: Database, url: str
) -> None:
    async with shared_transaction(db):
        block = db.overridden(url)
        block.__enter__()
    await run_in_new_ctx(insert, db, "other")
    await block.__aexit__(None, None, None)
    assert await names(db) == await database.names() == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: create_async_engine("sqlite+aiosqlite://"), "serves one event loop"),
        (lambda: create_engine("sqlite://"), "serves one event loop"),
        (lambda: DBConnect.from_url("sqlite+aiosqlite://"), "the URL that it was made from"),
        (lambda: None, "None is given"),
        (lambda: 5, "int is given"),
    ],
)
def test_value_that_is_neither_url_nor_creator_is_refused(
    db_at_rest: DBConnect, wrong: Callable[[], object], message: str
) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        db_at_rest.overridden(wrong())  # type: ignore[arg-type]  # on purpose


@pytest.fixture
def db_at_rest() -> DBConnect:
    return DBConnect.from_url("postgresql+asyncpg://nobody@db.invalid/shop")


def test_an_async_creator_is_refused(db_at_rest: DBConnect) -> None:
    async def create(host: str) -> AsyncEngine:
        return create_async_engine("sqlite+aiosqlite://")

    with pytest.raises(ArgumentTypeError, match="without `await`"):
        db_at_rest.overridden(create)  # type: ignore[arg-type]  # on purpose


def test_options_beside_a_creator_are_refused(db_at_rest: DBConnect) -> None:
    with pytest.raises(ArgumentTypeError, match="echo"):
        db_at_rest.overridden(lambda host: create_async_engine("sqlite+aiosqlite://"), echo=True)


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("postgresql+psycopg2://localhost/shop_test", "postgresql\\+asyncpg"),
        ("sqlite:///test.db", "sqlite\\+aiosqlite"),
    ],
)
def test_a_driver_that_is_not_for_asyncio_is_refused(db_at_rest: DBConnect, url: str, instead: str) -> None:
    with pytest.raises(ArgumentValueError, match=instead):
        db_at_rest.overridden(url)


@pytest.mark.parametrize("url", ["postgresql+asyncpg://h/d", "postgresql+psycopg://h/d", "sqlite+aiosqlite://"])
def test_drivers_for_asyncio_are_accepted(db_at_rest: DBConnect, url: str) -> None:
    db_at_rest.overridden(url)


def test_invalid_url_is_refused(db_at_rest: DBConnect) -> None:
    with pytest.raises(ArgumentError):
        db_at_rest.overridden("shop_test")
