"""`DBConnect`: hosts, event loops, engines and their connections."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from functools import partial
from typing import Any, cast

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from tests.support.database import Database, eventually, insert

from ctxdb_core import (
    ContextNotInitiatedError,
    CtxDBError,
    DBConnect,
    HostNotSetError,
    TransactionContext,
    atomic_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    on_begin,
    transactional,
)
from ctxdb_core.adapters import close_all
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware
from ctxdb_core.asgi.types import Message, Receive, Scope, Send
from ctxdb_core.testing import shared_transaction
from ctxdb_pgstatus.testing import EmbeddedPostgres

NAMES = ("__module__", "__qualname__", "__name__")
SELECT_PID = text("SELECT pg_backend_pid()")


class Hosts:
    """One database under several host names, told apart by the application name that each connects with."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.created: list[str] = []
        self.fail_for: set[str] = set()

    def __call__(self, host: str) -> AsyncEngine:
        if host in self.fail_for:
            raise LookupError(f"no engine for {host}")
        self.created.append(host)
        url = self.database.url if host != "down" else self.database.url.replace("127.0.0.1", "127.0.0.2")
        engine = create_async_engine(
            url, pool_size=5, max_overflow=0, connect_args={"server_settings": {"application_name": host}}
        )
        return self.database.watch(engine)

    def connections(self, host: str) -> int:
        return len(self.database.backends(f"application_name = '{host}'"))


@pytest.fixture
def hosts(database: Database) -> Hosts:
    return Hosts(database)


@pytest.fixture
async def switching(hosts: Hosts) -> AsyncIterator[DBConnect]:
    async with DBConnect(hosts, host="old") as db:
        yield db


async def _host(db: DBConnect) -> str:
    async with new_non_ctx_session(db) as session:
        host: str = await session.scalar(text("SELECT current_setting('application_name')"))
        return host


async def test_an_engine_is_made_at_the_first_use(hosts: Hosts) -> None:
    async with DBConnect(hosts, host="a") as db:
        assert hosts.created == []
        await db.create_session()
        await db.create_session()
        assert hosts.created == ["a"]
        assert hosts.connections("a") == 0


@pytest.mark.parametrize("host", ["", None])
async def test_a_session_of_a_database_without_a_host_is_refused(hosts: Hosts, host: str | None) -> None:
    with pytest.raises(HostNotSetError, match="host"):
        await DBConnect(hosts, host=host).create_session()


async def test_the_handler_sets_the_host_for_an_engine_before_the_first_session(hosts: Hosts) -> None:
    asked: list[str | None] = []

    async def follow(db: DBConnect) -> None:
        asked.append(db.host)
        await db.change_host("a")
        await db.engine()

    async with DBConnect(hosts, before_create_session_handler=follow) as db:
        async with (await db.engine()).connect() as connection:
            assert await connection.scalar(text("SELECT current_setting('application_name')")) == "a"
        await db.engine()
    assert asked == [None]


async def test_the_error_for_a_handler_that_sets_no_host_names_the_handler(hosts: Hosts) -> None:
    async def forget(db: DBConnect) -> None:
        pass

    db = DBConnect(hosts, before_create_session_handler=forget)
    for use in (db.engine, db.create_session, db.session_maker):
        with pytest.raises(HostNotSetError, match="before_create_session_handler"):
            await use()
    with pytest.raises(HostNotSetError, match=r"await db\.engine\(\)"):
        db.lazy_session_maker()


async def test_an_empty_host_is_refused_and_loses_nothing(switching: DBConnect) -> None:
    for method in (switching.connect, switching.change_host):
        with pytest.raises(ValueError, match="host is empty"):
            await method("")
    assert switching.host == "old"
    assert await _host(switching) == "old"


async def test_connect_sets_the_host(hosts: Hosts) -> None:
    async with DBConnect(hosts) as db:
        assert repr(db.host) == "None"
        await db.connect("a")
        assert db.host == "a"
        assert await _host(db) == "a"


async def test_new_sessions_go_to_the_new_host_at_once(switching: DBConnect) -> None:
    assert await _host(switching) == "old"
    await switching.change_host("new")
    assert switching.host == "new"
    assert await _host(switching) == "new"


async def test_changing_to_the_same_host_changes_nothing(switching: DBConnect, hosts: Hosts) -> None:
    engine = await switching.engine()
    await switching.change_host("old")
    assert await switching.engine() is engine
    assert hosts.created == ["old"]


async def test_a_session_on_the_old_host_goes_on_and_its_connection_is_closed_with_it(
    switching: DBConnect, hosts: Hosts
) -> None:
    session = await switching.create_session()
    pid = await session.scalar(SELECT_PID)
    await switching.change_host("new")
    assert await session.scalar(SELECT_PID) == pid
    await session.commit()
    assert await session.scalar(text("SELECT current_setting('application_name')")) == "old"
    await session.close()
    await eventually(lambda: hosts.connections("old") == 0, "the old host still has connections")


async def test_idle_connections_to_the_old_host_are_closed_by_the_change(switching: DBConnect, hosts: Hosts) -> None:
    await asyncio.gather(*(_host(switching) for _ in range(3)))
    assert hosts.connections("old") > 0
    await switching.change_host("new")
    await eventually(lambda: hosts.connections("old") == 0, "the old host still has connections")


async def test_an_engine_that_cannot_be_made_leaves_everything_as_it_was(switching: DBConnect, hosts: Hosts) -> None:
    engine = await switching.engine()
    hosts.fail_for.add("new")
    with pytest.raises(LookupError):
        await switching.change_host("new")
    assert switching.host == "old"
    assert await switching.engine() is engine
    assert await _host(switching) == "old"


async def test_hosts_change_under_many_sessions_without_an_error(switching: DBConnect, hosts: Hosts) -> None:
    served: set[str] = set()

    async def work() -> None:
        while "host9" not in served:
            served.add(await _host(switching))

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(work())
        for number in range(10):
            target = f"host{number}"
            await asyncio.gather(*(switching.change_host(target) for _ in range(5)))
            await eventually(lambda target=target: target in served, f"no session on {target}", seconds=30)  # type: ignore[misc]  # a default
    for number in range(9):
        await eventually(lambda number=number: not hosts.connections(f"host{number}"), f"host{number} is still used")  # type: ignore[misc]  # as above
    assert hosts.created.count("host5") == 1


async def test_a_new_host_that_is_down_fails_its_sessions_and_can_be_left(switching: DBConnect, hosts: Hosts) -> None:
    kept = await switching.create_session()
    await kept.scalar(SELECT_PID)
    await switching.change_host("down")
    results = await asyncio.gather(*(_host(switching) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(result, OSError) for result in results)
    await kept.scalar(SELECT_PID)
    await kept.close()
    await switching.change_host("new")
    assert await _host(switching) == "new"


async def test_close_leaves_sessions_in_use_alone_and_closes_their_connections_after_them(
    switching: DBConnect, hosts: Hosts
) -> None:
    session = await switching.create_session()
    await session.scalar(SELECT_PID)
    await asyncio.gather(*(switching.close() for _ in range(5)))
    assert hosts.connections("old") == 1
    await session.scalar(SELECT_PID)
    await session.close()
    await eventually(lambda: hosts.connections("old") == 0, "a connection outlived its session")


async def test_a_closed_dbconnect_can_be_used_again(switching: DBConnect, hosts: Hosts) -> None:
    await _host(switching)
    await switching.close()
    assert await _host(switching) == "old"
    assert hosts.created == ["old", "old"]


async def test_the_handler_is_awaited_before_each_session(hosts: Hosts) -> None:
    async def follow(db: DBConnect) -> None:
        await db.change_host("chosen")

    async with DBConnect(hosts, before_create_session_handler=follow) as db:
        assert await _host(db) == "chosen"
        async with new_db_ctx():
            session = await db_session(db)
            assert await session.scalar(text("SELECT current_setting('application_name')")) == "chosen"


async def test_each_event_loop_has_an_engine_of_its_own(db: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(db) as session:
        await session.scalar(SELECT_PID)

    async def use() -> int:
        async with new_non_ctx_session(db) as session:
            await session.scalar(SELECT_PID)
        return id(await db.engine())

    engines = [await asyncio.to_thread(asyncio.run, use()) for _ in range(3)]
    assert id(await db.engine()) not in engines
    # The loops that have ended took their connections with them.
    await eventually(
        lambda: len(database.backends("true")) == 1,
        lambda: f"an ended loop's connection is still open: {database.backends('true')}",
    )
    async with new_non_ctx_session(db) as session:
        await session.scalar(SELECT_PID)


def test_without_asyncio_a_session_is_refused_and_all_else_works() -> None:
    db = DBConnect.from_url("postgresql+asyncpg://app@127.0.0.1/app")

    def run(work: Coroutine[Any, Any, None]) -> None:
        """Run what waits for nothing, as under trio: no event loop of asyncio runs."""
        with pytest.raises(StopIteration):
            work.send(None)

    async def ask() -> None:
        async with new_db_ctx():
            await db_session(db)

    async def ask_beside() -> None:
        async with new_non_ctx_session(db):
            pass

    async def ask_in_request() -> None:
        async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
            await db_session(db)

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            pass

        await ASGIHTTPDBSessionMiddleware(endpoint)({"type": "http"}, receive, send)

    async def ask_nothing() -> None:
        async with new_db_ctx():
            pass
        await db.close()
        await close_all(db)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.shutdown.complete"})

    async def shut_down() -> None:
        async def receive() -> Message:
            return {"type": "lifespan.shutdown"}

        async def send(message: Message) -> None:
            pass

        await ASGIHTTPDBSessionMiddleware(application)({"type": "lifespan"}, receive, send)

    for work in (ask, ask_beside, ask_in_request):
        with pytest.raises(ContextNotInitiatedError, match="No event loop of asyncio"):
            run(work())
    run(ask_nothing())
    run(shut_down())


async def test_a_host_change_reaches_the_other_loops_engines(switching: DBConnect, hosts: Hosts) -> None:
    used, changed = threading.Event(), threading.Event()
    seen: list[str] = []

    async def use_twice() -> None:
        seen.append(await _host(switching))
        used.set()
        await asyncio.to_thread(changed.wait)
        seen.append(await _host(switching))
        await eventually(lambda: hosts.connections("old") == 0, "the other loop's old connection is still open")

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, use_twice()))
    await asyncio.to_thread(used.wait)
    await switching.change_host("new")
    changed.set()
    await other
    assert seen == ["old", "new"]


@pytest.mark.parametrize("begun", [False, True], ids=["not begun", "begun"])
async def test_a_loop_that_ends_closes_what_another_loop_has_retired(
    switching: DBConnect, hosts: Hosts, caplog: pytest.LogCaptureFixture, *, begun: bool
) -> None:
    async def use_and_end() -> None:
        sessions = [switching.create_session() for _ in range(3)]
        for session in [await each for each in sessions]:
            await session.scalar(SELECT_PID)
            await session.close()
        # A test client blocks its test's loop so, while the application that it shuts down closes the database.
        closing = threading.Thread(target=lambda: asyncio.run(switching.close()))
        closing.start()
        closing.join()
        for _ in range(2 if begun else 0):
            await asyncio.sleep(0)

    await asyncio.to_thread(asyncio.run, use_and_end())
    assert [record.getMessage() for record in caplog.records] == []
    await eventually(lambda: hosts.connections("old") == 0, "a connection of the loop that has ended is still open")


async def test_a_dbconnect_that_is_thrown_away_closes_its_connections(hosts: Hosts) -> None:
    db = DBConnect(hosts, host="thrown")
    await _host(db)
    assert hosts.connections("thrown") == 1
    hosts.database.engines.clear()
    del db
    gc.collect()
    await eventually(lambda: hosts.connections("thrown") == 0, "the connection is still open")


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_dbconnect_is_the_dbconnect(make: Callable[[dict[str, DBConnect]], dict[str, DBConnect]]) -> None:
    db = DBConnect.from_url("postgresql+asyncpg://app@127.0.0.1/app")
    assert make({"db": db})["db"] is copy.copy(db) is db


async def test_an_engine_creator_that_returns_no_engine_is_an_error() -> None:
    with pytest.raises(TypeError, match="create_async_engine"):
        await DBConnect(lambda host: cast("Any", host), host="a").engine()


async def test_sessions_are_made_by_the_users_session_maker(hosts: Hosts) -> None:
    def session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=True, info={"mine": True})

    async with DBConnect(hosts, session_maker, host="a") as db:
        session = await db.create_session()
        assert session.info == {"mine": True}
        assert (await db.session_maker()).kw["expire_on_commit"] is True


class OwnSession(AsyncSession):
    pass


@pytest.mark.parametrize("session_class", [AsyncSession, OwnSession])
def test_the_class_of_a_session_has_the_names_of_the_users_class(session_class: type[AsyncSession]) -> None:
    db = DBConnect.from_engine(
        create_async_engine("postgresql+asyncpg://app@127.0.0.1/app"),
        session_maker_creator=lambda engine: async_sessionmaker(engine, class_=session_class),
    )
    session = db.lazy_session_maker()
    for made, users in ((type(session), session_class), (type(session.sync_session), Session)):
        assert made is not users
        assert [getattr(made, name) for name in NAMES] == [getattr(users, name) for name in NAMES]


def test_by_default_objects_stay_readable_after_a_commit() -> None:
    async def options() -> object:
        async with DBConnect.from_url("sqlite+aiosqlite://") as db:
            return (await db.session_maker()).kw["expire_on_commit"]

    assert asyncio.run(options()) is False


@pytest.mark.parametrize(
    "host",
    [
        "postgresql+asyncpg://user:s3cret@db.example/app",
        "postgresql+asyncpg://user@db.example/app?password=s3cret",
        "host=db.example password=s3cret",
        "user:s3cret@db.example",
        "postgresql://user:s3cret@db.example:port/app",
    ],
)
def test_repr_shows_no_password(host: str) -> None:
    db = DBConnect(create_async_engine, host=host)
    assert "s3cret" not in repr(db)


async def _make_no_engine(host: str) -> None:
    await DBConnect(lambda host: object(), host=host).engine()  # type: ignore[arg-type]  # the mistake


async def _change_the_host_of_a_file(host: str) -> None:
    await DBConnect.from_url("sqlite+aiosqlite:///app.db").connect(host)


async def _keep_a_wrong_host(host: str) -> None:
    await DBConnect(lambda host: object(), host="db.example").change_host(host)  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize("use", [_make_no_engine, _change_the_host_of_a_file, _keep_a_wrong_host])
async def test_an_error_shows_no_password_of_a_dsn_that_was_given_as_a_host(
    use: Callable[[str], Awaitable[None]],
) -> None:
    with pytest.raises(CtxDBError) as raised:
        await use("postgresql+asyncpg://user:s3cret@db.example/app")
    assert "db.example" in str(raised.value)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("host", ["db.example", "db.example:5433", "10.0.0.1", "[::1]:5432", "/run/postgresql"])
def test_repr_shows_the_host(host: str) -> None:
    assert host in repr(DBConnect(create_async_engine, host=host))


def test_repr_of_a_url_shows_its_host_and_no_password() -> None:
    shown = repr(DBConnect.from_url("postgresql+asyncpg://user:s3cret@db.example:5432/app"))
    assert "db.example" in shown
    assert "s3cret" not in shown


def test_a_url_that_cannot_be_parsed_is_refused_at_once() -> None:
    with pytest.raises(ArgumentError):
        DBConnect.from_url("not a url")


async def test_from_url_takes_engine_options_and_changes_hosts(database: Database) -> None:
    async with DBConnect.from_url(database.url, pool_size=1, max_overflow=0) as db:
        assert db.host == "127.0.0.1"
        assert (await db.engine()).pool.size() == 1  # type: ignore[attr-defined]  # of the queue pool
        await db.change_host("localhost")
        async with new_non_ctx_session(db) as session:
            await session.scalar(SELECT_PID)
        assert (await db.engine()).url.host == "localhost"


async def test_the_host_of_a_url_that_names_none_cannot_change(tmp_path: object) -> None:
    async with DBConnect.from_url("sqlite+aiosqlite://") as db:
        with pytest.raises(ValueError, match="names no host"):
            await db.change_host("elsewhere")


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_a_read_only_connection_refuses_writes(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as db, new_db_ctx():
        session = await db_session(db)
        assert (await session.scalars(text("SELECT name FROM item"))).all() == []
        with pytest.raises(DBAPIError):
            await session.execute(text("INSERT INTO item VALUES ('written')"))
    assert await database.names() == []


NESTED_BLOCKS: dict[str, Callable[[DBConnect, AsyncSession], AbstractAsyncContextManager[object]]] = {
    "session": lambda db, session: session.begin_nested(),
    "atomic": lambda db, session: atomic_db_session(db, "savepoint"),
    "transactional": lambda db, session: transactional(db, "nested"),
    "context": lambda db, session: TransactionContext(db).transaction(),
}


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("block", NESTED_BLOCKS.values(), ids=NESTED_BLOCKS)
@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_blocks_are_nested_on_a_read_only_connection(
    database: Database,
    block: Callable[[DBConnect, AsyncSession], AbstractAsyncContextManager[object]],
    shared: bool,
) -> None:
    async with AsyncExitStack() as stack:
        db = await stack.enter_async_context(DBConnect.from_url(database.url, read_only=True))
        if shared:
            await stack.enter_async_context(shared_transaction(db))
        await stack.enter_async_context(new_db_ctx())
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        with pytest.raises(DBAPIError, match="nowhere"):
            async with block(db, session):
                await session.execute(text("SELECT * FROM nowhere"))
        async with block(db, session):
            assert await session.scalar(text("SELECT 2")) == 2


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("fails", [False, True])
async def test_a_nested_block_on_a_read_only_connection_may_read_bit_by_bit(database: Database, fails: bool) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as db, new_db_ctx():
        session = await db_session(db)
        with pytest.raises(DBAPIError, match="nowhere") if fails else nullcontext():
            async with session.begin_nested():
                assert len(await (await session.stream(text("SELECT 1"))).all()) == 1
                if fails:
                    await session.execute(text("SELECT * FROM nowhere"))
        assert await session.scalar(text("SELECT 2")) == 2


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_nested_block_that_fails_leaves_a_result_around_it_readable(database: Database) -> None:
    numbers = text("SELECT * FROM generate_series(1, 3)").execution_options(yield_per=1)
    async with DBConnect.from_url(database.url, read_only=True, pool_size=1, max_overflow=0) as db:
        # The block of an earlier user of the connection is behind no savepoint.
        async with new_db_ctx():
            session = await db_session(db)
            async with session.begin_nested():
                await session.execute(text("SELECT 1"))
        async with new_db_ctx():
            session = await db_session(db)
            result = await session.stream_scalars(numbers)
            assert await anext(result) == 1
            with pytest.raises(DBAPIError, match="nowhere"):
                async with session.begin_nested():
                    await session.execute(text("SELECT * FROM nowhere"))
            assert await result.all() == [2, 3]


async def test_a_savepoint_is_set_on_a_read_only_connection_that_has_transactions(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as db, new_db_ctx():
        on_begin(db, lambda session: session.execute(text("SELECT set_config('app.user', 'ann', true)")))
        session = await db_session(db)
        async with session.begin_nested():
            await session.execute(text("SELECT set_config('app.user', 'bob', true)"))
            with pytest.raises(DBAPIError):
                async with session.begin_nested():
                    await session.execute(text("SELECT 1 / 0"))
            assert await session.scalar(text("SELECT current_setting('app.user')")) == "bob"


async def test_a_read_only_query_is_one_round_trip(database: Database, postgres_server: EmbeddedPostgres) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as db:
        async with new_db_ctx():
            session = await db_session(db)
            await session.scalar(text("SELECT 1"))
            connection = await (await session.connection()).get_raw_connection()
            queries: list[str] = []
            driver = connection.driver_connection
            assert driver is not None
            driver.add_query_logger(lambda record: queries.append(record.query))
            await session.scalar(text("SELECT 2"))
        assert [query for query in queries if "SELECT 2" not in query] == []


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("reads_before", [False, True])
async def test_a_result_is_read_bit_by_bit_from_a_read_only_connection(database: Database, reads_before: bool) -> None:
    numbers = text("SELECT * FROM generate_series(1, 5)").execution_options(yield_per=2)
    started = text("SELECT pg_catalog.now()")
    async with DBConnect.from_url(database.url, read_only=True, pool_size=1, max_overflow=0) as db:
        for _ in range(2):
            async with new_db_ctx():
                session = await db_session(db)
                if reads_before:
                    await session.execute(text("SELECT 1"))
                result = await session.stream_scalars(numbers)
                assert [number async for number in result] == [1, 2, 3, 4, 5]
            with pytest.raises(DBAPIError, match="read-only transaction"):
                async with new_db_ctx():
                    session = await db_session(db)
                    await (await session.stream_scalars(numbers)).all()
                    await session.execute(text("INSERT INTO item VALUES ('written')"))
            # The next user of the connection has autocommit again.
            async with new_db_ctx():
                session = await db_session(db)
                assert await session.scalar(started) != await session.scalar(started)
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_result_is_read_from_a_read_only_connection_that_replaces_a_lost_one(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True, pool_size=1, max_overflow=0) as db:
        async with new_db_ctx():
            pid = await (await db_session(db)).scalar(text("SELECT pg_backend_pid()"))
        assert database.terminate_backends(f"pid = {pid}") == 1
        async with new_db_ctx():
            result = await (await db_session(db)).stream_scalars(text("SELECT pg_backend_pid()"))
            assert [number async for number in result] != [pid]


async def test_read_only_keeps_the_users_server_settings(database: Database) -> None:
    options: dict[str, Any] = {"connect_args": {"server_settings": {"application_name": "mine"}}}
    async with DBConnect.from_url(database.url, read_only=True, **options) as db, new_db_ctx():
        session = await db_session(db)
        assert await session.scalar(text("SELECT current_setting('application_name')")) == "mine"
        assert await session.scalar(text("SHOW transaction_read_only")) == "on"


def test_read_only_sets_the_isolation_level_alone() -> None:
    with pytest.raises(ValueError, match="isolation_level"):
        DBConnect.from_url("sqlite+aiosqlite://", read_only=True, isolation_level="SERIALIZABLE")


async def test_a_creator_may_return_one_engine_for_ever(database: Database) -> None:
    engine = database.watch_new()
    db = DBConnect(lambda host: engine, host="a")
    for _ in range(2):
        for _ in range(3):
            await _host(db)
        connections = database.connections
        await db.close()
        assert connections == database.connections
    assert database.connections == 2


async def _pids(db: DBConnect, count: int) -> set[int]:
    """Use `count` connections at once, and return their server processes."""
    sessions = [await db.create_session() for _ in range(count)]
    pids: set[int] = {await session.scalar(SELECT_PID) for session in sessions}
    for session in sessions:
        await session.close()
    return pids


async def test_a_host_that_is_kept_gets_its_connections_back_when_it_returns(
    switching: DBConnect, hosts: Hosts
) -> None:
    engine = await switching.engine()
    pids = await _pids(switching, 3)
    await switching.change_host("new", keep=["old"])
    assert await _host(switching) == "new"
    assert hosts.connections("old") == 3
    await switching.change_host("old", keep=["new"])
    assert await switching.engine() is engine
    assert await _pids(switching, 3) == pids
    assert hosts.created == ["old", "new"]
    assert hosts.connections("new") == 1


async def test_hosts_that_take_turns_need_one_engine_each(hosts: Hosts) -> None:
    replicas = frozenset({"r1", "r2", "r3"})
    turns = itertools.cycle(sorted(replicas))

    async def take_turns(db: DBConnect) -> None:
        await db.change_host(next(turns), keep=replicas)

    async with DBConnect(hosts, before_create_session_handler=take_turns) as db:
        served = [await _host(db) for _ in range(30)]
        assert served == ["r1", "r2", "r3"] * 10
        assert hosts.database.connections == 3
        tasks = [asyncio.create_task(_host(db)) for _ in range(60)]
        assert Counter(await asyncio.gather(*tasks)) == {"r1": 20, "r2": 20, "r3": 20}
    assert hosts.created == ["r1", "r2", "r3"]
    await eventually(lambda: not hosts.database.backends("true"), "closing has left connections to kept hosts")


async def test_hosts_that_are_not_kept_any_more_are_left(switching: DBConnect, hosts: Hosts) -> None:
    await _host(switching)
    await switching.change_host("new", keep=["old", "never used"])
    await _host(switching)
    assert hosts.connections("old") == 1
    # The change closes them although new sessions go to that host already.
    await switching.change_host("new")
    await eventually(lambda: hosts.connections("old") == 0, "the old host still has connections")
    assert hosts.connections("new") == 1
    await switching.change_host("old", keep=["new"])
    await switching.change_host("third", keep=["new"])
    await eventually(lambda: hosts.connections("old") == 0, "the old host still has connections")
    assert hosts.connections("new") == 1
    assert hosts.created == ["old", "new", "old", "third"]


async def test_a_session_on_a_host_that_stops_being_kept_goes_on_to_its_end(switching: DBConnect, hosts: Hosts) -> None:
    session = await switching.create_session()
    pid = await session.scalar(SELECT_PID)
    await switching.change_host("new", keep=["old"])
    await switching.change_host("new")
    assert await session.scalar(SELECT_PID) == pid
    await session.close()
    await eventually(lambda: hosts.connections("old") == 0, "the old host still has connections")


async def test_an_engine_that_cannot_be_made_leaves_the_kept_ones_as_they_were(
    switching: DBConnect, hosts: Hosts
) -> None:
    pids = await _pids(switching, 2)
    await switching.change_host("new", keep=["old"])
    hosts.fail_for.add("third")
    with pytest.raises(LookupError):
        await switching.change_host("third")
    assert await _host(switching) == "new"
    await switching.change_host("old", keep=["new"])
    assert await _pids(switching, 2) == pids


async def test_keep_must_be_a_collection_of_hosts(switching: DBConnect) -> None:
    with pytest.raises(TypeError, match=r"keep=\['r1'\]"):
        await switching.change_host("new", keep="r1")
    assert switching.host == "old"


async def test_events_name_the_host_of_each_session(hosts: Hosts) -> None:
    turns = itertools.cycle(["r1", "r2"])

    async def take_turns(db: DBConnect) -> None:
        await db.change_host(next(turns), keep=["r1", "r2"])

    async with DBConnect(hosts, before_create_session_handler=take_turns) as db:
        told: list[tuple[str, str]] = []
        db.on_event(lambda event: told.append((type(event).__name__, event.host)))
        for _ in range(2):
            async with new_db_ctx():
                session = await db_session(db)
                # This session makes `db` change its host before the first session has begun a transaction.
                async with new_non_ctx_session(db):
                    await session.scalar(SELECT_PID)
    of_first = ["SessionOpened", "TransactionBegun", "TransactionCommitted", "SessionClosed"]
    assert [name for name, host in told if host == "r1"] == of_first * 2
    assert [name for name, host in told if host == "r2"] == ["SessionOpened", "SessionClosed"] * 2


async def test_kept_engines_of_several_loops_are_reused_by_each_of_them(hosts: Hosts) -> None:
    async with DBConnect(hosts, host="r1") as db:
        keep = ["r1", "r2"]
        step = threading.Barrier(2)
        first: list[set[int]] = []

        async def use_all() -> dict[str, set[int]]:
            return {host: await _pids_on(host) for host in keep}

        async def _pids_on(host: str) -> set[int]:
            await db.change_host(host, keep)
            return await _pids(db, 2)

        async def in_another_loop() -> None:
            await asyncio.to_thread(step.wait)
            first.extend((await use_all()).values())
            await asyncio.to_thread(step.wait)
            await asyncio.to_thread(step.wait)
            assert [*(await use_all()).values()] == first
            await asyncio.to_thread(step.wait)
            # The other loop has changed the host, which closes this loop's connections as well.
            await asyncio.to_thread(step.wait)
            await eventually(lambda: hosts.connections("r1") == 0, "r1 still has connections")
            await eventually(lambda: len(asyncio.all_tasks()) == 1, "the engine has not been retired")

        other = asyncio.create_task(asyncio.to_thread(asyncio.run, in_another_loop()))
        mine = await use_all()
        for _ in range(2):
            await asyncio.to_thread(step.wait)
        assert await use_all() == mine
        assert not {pid for pids in first for pid in pids} & {pid for pids in mine.values() for pid in pids}
        for _ in range(2):
            await asyncio.to_thread(step.wait)
        assert hosts.connections("r1") == 4
        await db.change_host("r2")
        await asyncio.to_thread(step.wait)
        await other
        assert Counter(hosts.created) == {"r1": 2, "r2": 2}


async def test_hosts_take_turns_under_many_sessions_while_one_of_them_comes_and_goes(hosts: Hosts) -> None:
    turns = itertools.count()
    alive = ["r1", "r2", "r3"]

    async def take_turns(db: DBConnect) -> None:
        await db.change_host(alive[next(turns) % len(alive)], keep=frozenset(alive))

    def has_engines(times: int) -> bool:
        return hosts.created.count("r3") == times

    served: Counter[str] = Counter()
    stop = False

    async with DBConnect(hosts, before_create_session_handler=take_turns) as db:

        async def work() -> None:
            while not stop:
                served[await _host(db)] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(work())
            for times in range(1, 5):
                # A session on an earlier engine may be counted when the next one is awaited.
                await eventually(partial(has_engines, times), "no new engine for r3")
                # Only after its first connection does the lack of connections tell that an engine was retired.
                await eventually(lambda: hosts.connections("r3") > 0, "no connection to r3")
                await eventually(lambda: served["r3"] > 3, "no session on r3")
                if times < 4:
                    alive.remove("r3")
                    await eventually(lambda: hosts.connections("r3") == 0, "r3 still has connections")
                    served.clear()
                    alive.append("r3")
            stop = True
        assert Counter(hosts.created) == {"r1": 1, "r2": 1, "r3": 4}


async def test_a_dbconnect_that_is_thrown_away_closes_the_connections_to_kept_hosts(hosts: Hosts) -> None:
    db = DBConnect(hosts, host="thrown")
    await _host(db)
    await db.change_host("other", keep=["thrown"])
    await _host(db)
    assert hosts.connections("thrown") == 1
    hosts.database.engines.clear()
    del db
    gc.collect()
    await eventually(lambda: not hosts.database.backends("true"), "the connections are still open")


async def test_a_shared_transaction_holds_for_kept_hosts_too(hosts: Hosts, database: Database) -> None:
    async with DBConnect(hosts, host="r1") as db:
        await _host(db)
        await db.change_host("r2", keep=["r1"])
        async with shared_transaction(db):
            for host in ("r1", "r2", "r3"):
                await db.change_host(host, keep=["r1", "r2"])
                async with new_db_ctx():
                    await insert(db, host)
            assert await database.names() == []
        assert db.host == "r2"
        assert await _host(db) == "r2"
        await db.change_host("r1", keep=["r2"])
        assert await _host(db) == "r1"
        assert hosts.connections("r1") == 1
    assert await database.names() == []


async def test_idle_connections_to_a_frozen_server_are_not_waited_for(
    switching: DBConnect, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core._databases.loop_engine.CLOSE_SECONDS", 0.1)
    pids = await _pids(switching, 3)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        await switching.change_host("new")
        assert await _host(switching) == "new"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    await eventually(lambda: hosts.connections("old") == 0, "the old host still has connections")
