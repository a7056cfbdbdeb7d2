"""`follow_master` and `follow_replica`, with a `FakeSource`, whose answers a test sets."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only
from tests.support.database import Database, eventually, insert
from tests.support.hosts import HOST, FakeSource, Hosts, frozen, host_of

from ctxdb_core import DBConnect, db_session, new_db_ctx, new_non_ctx_session, retry_on_conflict
from ctxdb_core.testing import shared_transaction
from ctxdb_pgstatus import (
    CommitUnconfirmedError,
    ConnectionLostError,
    HostMonitor,
    HostUnreachableError,
    NoMasterError,
    NoReplicaError,
    OptionError,
    SidecarError,
    follow_master,
    follow_replica,
)
from ctxdb_pgstatus._following.engine import FollowedEngine

both_drivers = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def hosts(database: Database) -> Hosts:
    return Hosts(database)


@pytest.fixture
async def master(hosts: Hosts, source: FakeSource) -> AsyncIterator[DBConnect]:
    async with DBConnect(hosts, before_create_session_handler=follow_master(source)) as db:
        yield db


@pytest.fixture
async def replica(hosts: Hosts, source: FakeSource) -> AsyncIterator[DBConnect]:
    async with DBConnect(hosts, before_create_session_handler=follow_replica(source)) as db:
        yield db


async def _all_waiting(hosts: Hosts, host: str, count: int) -> None:
    await eventually(
        lambda: len(hosts.database.backends(f"application_name = '{host}' AND query ~ 'pg_sleep'")) == count,
        f"not {count} queries on {host}",
    )


# --- the master -------------------------------------------------------------------------------------------------------


async def test_sessions_go_to_the_master(master: DBConnect, source: FakeSource, hosts: Hosts) -> None:
    assert await host_of(master) == "n1"
    source.master, source.replicas = "n2", ("n1", "n3")
    assert await host_of(master) == "n2"
    async with new_db_ctx():
        assert await (await db_session(master)).scalar(HOST) == "n2"
    await eventually(lambda: not hosts.pids("n1"), "connections are left on the old master")


async def test_an_engine_before_the_first_session_is_that_of_the_master(master: DBConnect) -> None:
    assert master.host is None
    async with (await master.engine()).connect() as connection:
        assert await connection.scalar(HOST) == "n1"


async def test_without_a_master_there_is_no_engine_before_the_first_session(
    master: DBConnect, source: FakeSource
) -> None:
    source.master = None
    with pytest.raises(NoMasterError, match="no master"):
        await master.engine()


async def test_without_a_master_sessions_fail_at_once(master: DBConnect, source: FakeSource) -> None:
    source.master = None
    with pytest.raises(NoMasterError, match="503"):
        await host_of(master)
    source.master = "n1"
    assert await host_of(master) == "n1"


@pytest.mark.parametrize("kind", ["master", "replica"])
async def test_code_that_tries_again_without_a_pause_lets_others_find_a_host(
    kind: str, master: DBConnect, replica: DBConnect, source: FakeSource
) -> None:
    def find() -> None:
        source.master, source.replicas = "n1", ("n1",)

    source.master, source.replicas = None, ()
    asyncio.get_running_loop().call_soon(find)
    async with asyncio.timeout(5):
        for _ in range(1000):
            with suppress(NoMasterError, NoReplicaError):
                assert await host_of(master if kind == "master" else replica) == "n1"
                return
    raise AssertionError("the event loop had no turn")


async def test_requests_that_wait_in_the_pool_fail_when_the_master_has_gone(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(2):
            session = await stack.enter_async_context(new_non_ctx_session(master))
            await session.scalar(HOST)
        waiting = [asyncio.create_task(host_of(master)) for _ in range(20)]
        await asyncio.sleep(0)
        source.master, source.replicas = None, ("n1", "n2", "n3")
        # The pool's time-out is a minute. The two connections in use are to a living host, and are left alone.
        async with asyncio.timeout(10):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(result) for result in results} == {NoMasterError}
        assert await session.scalar(HOST) == "n1"
        source.master = "n1"
    assert await host_of(master) == "n1"


async def test_requests_that_wait_in_the_pool_move_to_the_new_master(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(2):
            session = await stack.enter_async_context(new_non_ctx_session(master))
            await session.scalar(HOST)
        waiting = [asyncio.create_task(host_of(master)) for _ in range(20)]
        await asyncio.sleep(0)
        source.master, source.replicas = "n2", ("n1", "n3")
        async with asyncio.timeout(10):
            assert set(await asyncio.gather(*waiting)) == {"n2"}
        assert await session.scalar(HOST) == "n1"
    await eventually(lambda: not hosts.pids("n1"), "connections are left on the old master")


@both_drivers
async def test_requests_on_a_frozen_host_fail_when_the_host_counts_as_dead(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    async def sleep() -> None:
        async with new_non_ctx_session(master) as session:
            await session.execute(text("SELECT pg_sleep(1000)"))

    stuck = [asyncio.create_task(sleep()) for _ in range(2)]
    await _all_waiting(hosts, "n1", 2)
    waiting = [asyncio.create_task(host_of(master)) for _ in range(5)]
    with frozen(hosts, "n1"):
        source.master, source.replicas = None, ("n2", "n3")
        async with asyncio.timeout(10):
            results = await asyncio.gather(*stuck, return_exceptions=True)
            waited = await asyncio.gather(*waiting, return_exceptions=True)
        for result in results:
            assert isinstance(result, ConnectionLostError)
            assert result.retryable
            assert "the host was left while the connection was in use" in str(result)
        assert {type(result) for result in waited} == {NoMasterError}
        source.master, source.replicas = "n2", ("n3",)
        async with asyncio.timeout(10):
            assert await host_of(master) == "n2"
    # After the thaw, the server goes on with its queries, as it has not noticed that their clients have gone.
    hosts.database.terminate_backends("query ~ 'pg_sleep'")
    await eventually(lambda: not hosts.pids("n1"), "connections are left on the frozen host")


async def test_a_session_leaves_a_frozen_host_with_idle_connections_at_once(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    await asyncio.gather(*(host_of(master) for _ in range(2)))
    with frozen(hosts, "n1"):
        source.master, source.replicas = "n2", ("n3",)
        before = asyncio.get_running_loop().time()
        assert await host_of(master) == "n2"
        # A close that waited for the host would be given two seconds.
        assert asyncio.get_running_loop().time() - before < 1
    await eventually(lambda: not hosts.pids("n1"), "connections are left on the frozen host")


async def test_sessions_return_at_once_to_a_host_that_is_the_master_again(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    async with new_non_ctx_session(master) as session:
        await session.scalar(HOST)
        source.master, source.replicas = None, ("n2", "n3")
        with pytest.raises(NoMasterError):
            await host_of(master)
        # The session's connection was cut off.
        with pytest.raises(ConnectionLostError):
            await session.scalar(HOST)
    source.master = "n1"
    for _ in range(3):
        assert await host_of(master) == "n1"


async def test_a_session_between_transactions_moves_with_the_master(
    master: DBConnect, source: FakeSource, database: Database
) -> None:
    async with new_non_ctx_session(master) as session:
        assert await session.scalar(HOST) == "n1"
        await session.commit()
        source.master, source.replicas = "n2", ("n1", "n3")
        assert await host_of(master) == "n2"
        assert await session.scalar(HOST) == "n2"
        await session.execute(text("INSERT INTO item VALUES ('a')"))
        await session.commit()
        assert source.confirmed[-1] == "n2"
    assert await database.names() == ["a"]


@both_drivers
async def test_a_session_whose_host_is_left_before_its_first_connection_has_what_the_server_tells_of_itself(
    hosts: Hosts, source: FakeSource
) -> None:
    def create_engine(host: str) -> AsyncEngine:
        return hosts(host).execution_options(isolation_level="AUTOCOMMIT")

    async with (
        DBConnect(create_engine, before_create_session_handler=follow_master(source)) as db,
        new_non_ctx_session(db) as session,
    ):
        source.master = "n2"
        assert await host_of(db) == "n2"
        assert await session.scalar(HOST) == "n2"
        connection = (await session.connection()).sync_connection
        assert connection is not None
        assert connection.default_isolation_level == "READ COMMITTED"
        assert connection.dialect.server_version_info is not None
        # The level is reset now.
        await session.commit()
        assert await host_of(db) == "n2"


@pytest.mark.parametrize("first", ["left", "cancelled"])
async def test_a_cancelled_request_stays_cancelled_although_its_host_is_left(
    master: DBConnect, source: FakeSource, first: str
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(2):
            session = await stack.enter_async_context(new_non_ctx_session(master))
            await session.scalar(HOST)
        engine = FollowedEngine.of((await master.engine()).sync_engine)
        assert engine is not None
        waiting = asyncio.create_task(host_of(master))
        await eventually(lambda: bool(engine._waits), "no request waits for a connection")
        if first == "cancelled":
            waiting.cancel()
        engine.leave(abort=False)
        if first == "left":
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not engine._waits


async def test_a_request_that_gets_its_connection_when_its_host_is_left_gives_it_back(
    master: DBConnect, source: FakeSource, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host_of(master)
    engine = FollowedEngine.of((await master.engine()).sync_engine)
    assert engine is not None
    take_from_pool = engine._take_from_pool

    def take_too_late() -> PoolProxiedConnection:
        connection = take_from_pool()
        source.master, source.replicas = "n2", ("n1", "n3")
        asyncio.get_running_loop().call_soon(partial(engine.leave, abort=False))
        # `asyncio.wait_for` swallows a cancellation like this on Python 3.11, if its result has come already.
        with suppress(asyncio.CancelledError):
            await_only(asyncio.sleep(60))
        return connection

    monkeypatch.setattr(engine, "_take_from_pool", take_too_late)
    task = asyncio.create_task(host_of(master))
    assert await task == "n2"
    assert task.cancelling() == 0


async def test_a_host_that_accepts_no_connection_is_unreachable_after_the_connect_timeout(
    database: Database, source: FakeSource
) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    handler = follow_master(source, connect_timeout=0.05)
    url = database.url.replace(f":{database.server.port}/", f":{port}/")  # type: ignore[union-attr]  # on PostgreSQL
    async with server, DBConnect.from_url(url) as other:
        engine = await other.engine()
        async with DBConnect(lambda host: engine, before_create_session_handler=handler) as db:
            with pytest.raises(HostUnreachableError, match=r"within 0.05 seconds") as raised:
                await host_of(db)
    assert isinstance(raised.value.__cause__, TimeoutError)
    assert (raised.value.host, raised.value.retryable) == ("n1", True)
    assert source.failures == ["n1"]


@both_drivers
@pytest.mark.parametrize(
    ("user", "name"), [("nobody", None), ("postgres", "no_such_database")], ids=["no such user", "no such database"]
)
async def test_the_error_of_a_refused_account_is_not_retryable(
    database: Database, source: FakeSource, user: str, name: str | None
) -> None:
    url = make_url(database.url).set(username=user, database=name or database.name)
    handler = follow_master(source)
    async with DBConnect(lambda host: create_async_engine(url), before_create_session_handler=handler) as db:
        with pytest.raises(HostUnreachableError) as raised:
            await host_of(db)
    # psycopg does not tell the SQLSTATE of a refused connection.
    assert raised.value.retryable is ("psycopg" in database.url)


async def test_a_refused_connection_is_an_unreachable_host_and_is_reported_to_the_source(
    database: Database, source: FakeSource
) -> None:
    url = database.url.replace("127.0.0.1", "127.0.0.9")
    async with DBConnect.from_url(url) as other:
        engine = await other.engine()
        async with DBConnect(lambda host: engine, before_create_session_handler=follow_master(source)) as db:
            with pytest.raises(HostUnreachableError, match="'n1' has not accepted a connection") as raised:
                await host_of(db)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.retryable
    assert source.failures == ["n1"]


@both_drivers
async def test_a_connection_that_breaks_before_its_version_is_known_is_an_unreachable_host(
    database: Database, source: FakeSource
) -> None:
    hosts = Hosts(database)

    def create_engine(host: str) -> AsyncEngine:
        engine = hosts(host)
        event.listen(
            engine.sync_engine,
            "connect",
            lambda *args: database.terminate_backends("application_name = 'n1'"),
            insert=True,
        )
        return engine

    async with DBConnect(create_engine, before_create_session_handler=follow_master(source)) as db:
        with pytest.raises(HostUnreachableError, match="'n1' has not accepted a connection") as raised:
            await host_of(db)
    assert raised.value.__cause__ is not None
    assert raised.value.retryable
    assert source.failures == ["n1"]


@both_drivers
async def test_connections_that_break_right_after_they_were_opened_are_a_retryable_error(
    database: Database, source: FakeSource
) -> None:
    hosts = Hosts(database)
    async with DBConnect(hosts, before_create_session_handler=follow_master(source)) as db:
        await host_of(db)

        def break_off(*args: object) -> None:
            database.terminate_backends("application_name = 'n1'")

        break_off()
        event.listen((await db.engine()).sync_engine, "connect", break_off)
        with pytest.raises((HostUnreachableError, ConnectionLostError)) as raised:
            await host_of(db)
    assert raised.value.__cause__ is not None
    assert raised.value.retryable
    assert "n1" in source.failures


@both_drivers
async def test_a_connection_that_breaks_is_a_retryable_error_and_is_reported_to_the_source(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    async with new_non_ctx_session(master) as session:
        await session.scalar(HOST)
        hosts.database.terminate_backends("application_name = 'n1'")
        with pytest.raises(ConnectionLostError, match="Nothing of the transaction is stored") as raised:
            await session.scalar(HOST)
    assert source.failures == ["n1"]
    assert isinstance(raised.value.__cause__, (await master.engine()).dialect.loaded_dbapi.Error)
    assert raised.value.retryable


@both_drivers
async def test_a_connection_that_breaks_in_a_streamed_result_is_reported_to_the_source(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    async with new_non_ctx_session(master) as session:
        result = await session.stream(text("SELECT generate_series(1, 100000)"))
        await result.fetchmany(10)
        hosts.database.terminate_backends("application_name = 'n1'")
        with pytest.raises(ConnectionLostError, match="Nothing of the transaction is stored") as raised:
            async for _ in result:
                pass
    assert source.failures == ["n1"]
    assert raised.value.__cause__ is not None


@both_drivers
async def test_a_connection_that_breaks_while_a_write_is_committed_leaves_the_outcome_unknown(
    master: DBConnect, hosts: Hosts, database: Database
) -> None:
    with database.held_commits():
        writing = asyncio.create_task(_write(master))
        await database.commit_is_held()
        hosts.database.terminate_backends("application_name = 'n1'")
        with pytest.raises(CommitUnconfirmedError, match="broke while a commit was under way") as raised:
            await writing
    assert not raised.value.retryable
    assert isinstance(raised.value.__cause__, (await master.engine()).dialect.loaded_dbapi.Error)


async def _write(db: DBConnect) -> None:
    async with new_db_ctx():
        await insert(db, "a")


@both_drivers
async def test_a_write_in_autocommit_whose_connection_breaks_has_an_unknown_outcome(
    master: DBConnect, hosts: Hosts
) -> None:
    async with new_non_ctx_session(master) as session:
        connection = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        writing = asyncio.create_task(connection.execute(text("SELECT pg_sleep(1000)")))
        await _all_waiting(hosts, "n1", 1)
        hosts.database.terminate_backends("application_name = 'n1'")
        with pytest.raises(CommitUnconfirmedError):
            await writing


@both_drivers
async def test_the_error_of_a_reader_whose_connection_breaks_is_retryable(
    replica: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    async with new_non_ctx_session(replica) as session:
        host = await session.scalar(HOST)
        hosts.database.terminate_backends(f"application_name = '{host}'")
        with pytest.raises(ConnectionLostError) as raised:
            await session.scalar(HOST)
    assert (raised.value.host, raised.value.retryable) == (host, True)
    assert source.failures == [host]


@both_drivers
async def test_a_connection_that_breaks_after_its_commit_was_confirmed_leaves_no_error_in_the_log(
    master: DBConnect, replica: DBConnect, source: FakeSource, hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    source.may_confirm = asyncio.Event()
    writing = asyncio.create_task(_write(master))
    await source.confirming.wait()
    hosts.database.terminate_backends("application_name = 'n1'")
    source.may_confirm.set()
    await writing
    assert await hosts.database.names() == ["a"]
    assert caplog.text == ""


@both_drivers
async def test_a_commit_of_a_write_past_sqlalchemy_whose_connection_breaks_has_an_unknown_outcome(
    master: DBConnect, hosts: Hosts, database: Database
) -> None:
    async def write() -> None:
        async with new_db_ctx():
            session = await db_session(master)
            await session.scalar(select(1))
            driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
            await driver.execute("INSERT INTO item (name) VALUES ('a')")

    with database.held_commits():
        writing = asyncio.create_task(write())
        await database.commit_is_held()
        hosts.database.terminate_backends("application_name = 'n1'")
        with pytest.raises(CommitUnconfirmedError, match="broke while a commit was under way"):
            await writing


# --- repetitions ------------------------------------------------------------------------------------------------------


@both_drivers
async def test_a_reader_that_loses_its_connection_before_its_commit_reads_again(
    replica: DBConnect, hosts: Hosts
) -> None:
    attempts: list[str] = []

    @retry_on_conflict(wait=0)
    async def read() -> str:
        host = str(await (await db_session(replica)).scalar(HOST))
        attempts.append(host)
        if len(attempts) == 1:
            hosts.database.terminate_backends(f"application_name = '{host}'")
        return host

    assert await read() == attempts[-1]
    assert len(attempts) == 2


async def test_work_that_has_found_no_master_is_done_again(
    master: DBConnect, source: FakeSource, database: Database
) -> None:
    masters = [None, "n1"]

    @retry_on_conflict(wait=0)
    async def write() -> None:
        source.master = masters.pop(0)
        await insert(master, "a")

    await write()
    assert await database.names() == ["a"]


async def test_work_whose_commit_could_not_be_confirmed_is_not_done_again(
    master: DBConnect, source: FakeSource, database: Database
) -> None:
    source.error = SidecarError("The sidecar is away.")

    @retry_on_conflict(wait=0)
    async def write() -> None:
        await insert(master, "a")

    with pytest.raises(CommitUnconfirmedError) as raised:
        await write()
    assert isinstance(raised.value.__cause__, SidecarError)
    assert await database.names() == ["a"]


async def test_an_error_of_a_statement_is_not_reported_to_the_source(master: DBConnect, source: FakeSource) -> None:
    async with new_non_ctx_session(master) as session:
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))
    assert source.failures == []


@both_drivers
async def test_a_write_in_a_users_read_only_transaction_does_not_drop_the_pool(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    await host_of(master)
    pids = hosts.pids("n1")
    async with new_non_ctx_session(master) as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(DBAPIError, match="read-only") as raised:
            await session.execute(text("INSERT INTO item VALUES ('a')"))
        assert not raised.value.connection_invalidated
    assert source.failures == []
    assert hosts.pids("n1") == pids


async def test_engines_of_several_event_loops_follow_the_master(
    master: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    used, moved = threading.Event(), threading.Event()
    served: list[str] = []

    async def use() -> None:
        served.append(await host_of(master))
        async with new_non_ctx_session(master) as session:
            served.append(await session.scalar(HOST))
            used.set()
            await asyncio.to_thread(moved.wait)
            # The connection was cut off when the other event loop found the new master.
            with pytest.raises(ConnectionLostError):
                await eventually_fails(session)
        served.append(await host_of(master))

    async def eventually_fails(session: object) -> None:
        while True:
            await session.scalar(HOST)  # type: ignore[attr-defined]

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, use()))
    await asyncio.to_thread(used.wait)
    source.master, source.replicas = "n2", ("n3",)
    assert await host_of(master) == "n2"
    moved.set()
    await other
    assert served == ["n1", "n1", "n2"]
    assert hosts.created == {"n1": 1, "n2": 2}


async def test_an_engine_that_exists_before_the_first_session_is_followed(hosts: Hosts, source: FakeSource) -> None:
    async with DBConnect(hosts, host="n1", before_create_session_handler=follow_master(source)) as db:
        engine = await db.engine()
        await host_of(db)
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item VALUES ('a')"))
    assert source.confirmed == ["n1"]


async def test_a_shared_transaction_follows_no_host_and_confirms_no_commit(
    master: DBConnect, replica: DBConnect, source: FakeSource, database: Database
) -> None:
    await host_of(master)
    await host_of(replica)
    source.confirms = False
    async with shared_transaction(master, replica):
        async with new_db_ctx():
            await insert(master, "a")
        source.master, source.replicas = "n2", ("n1", "n3")
        async with new_db_ctx():
            await insert(master, "b")
        for _ in range(3):
            async with new_db_ctx():
                session = await db_session(replica)
                assert (await session.scalars(text("SELECT name FROM item ORDER BY name"))).all() == ["a", "b"]
    assert source.confirmed == []
    assert await database.names() == []
    assert await host_of(master) == "n2"


@pytest.mark.parametrize(
    "options",
    [{"confirm_timeout": 0}, {"connect_timeout": -1}, {"connect_timeout": float("inf")}, {"connect_timeout": "5"}],
    ids=str,
)
def test_follow_master_refuses_seconds_that_are_not_positive(options: dict[str, Any], source: FakeSource) -> None:
    with pytest.raises(OptionError, match=f"`{next(iter(options))}` is "):
        follow_master(source, **options)


@pytest.mark.parametrize("follow", [follow_master, follow_replica])
@pytest.mark.parametrize("wrong", [3, "n1", None, HostMonitor], ids=["number", "name", "None", "class"])
def test_a_source_that_knows_no_hosts_is_refused_at_once(follow: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"`source` is .*HostMonitor"):
        follow(wrong)


class PassingOn:
    """Passes on what is asked of it, as objects do that are made at their first use."""

    def __init__(self, source: object) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@pytest.mark.parametrize("follow", [follow_master, follow_replica])
def test_a_source_may_pass_the_calls_on_to_another_one(follow: Callable[[Any], object], source: FakeSource) -> None:
    follow(PassingOn(source))


# --- replicas ---------------------------------------------------------------------------------------------------------


async def test_replicas_take_turns_with_few_connections(replica: DBConnect, hosts: Hosts) -> None:
    served: Counter[str] = Counter()

    async def read() -> None:
        for _ in range(50):
            served[await host_of(replica)] += 1

    await asyncio.gather(*(read() for _ in range(20)))
    assert served == {"n2": 500, "n3": 500}
    # The pools have two connections each.
    assert hosts.database.connections == 4
    assert hosts.created == {"n2": 1, "n3": 1}


async def test_readers_go_to_the_master_without_a_replica_and_back_to_a_replica(
    replica: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    assert {await host_of(replica) for _ in range(4)} == {"n2", "n3"}
    source.replicas = ()
    assert {await host_of(replica) for _ in range(4)} == {"n1"}
    await eventually(lambda: not hosts.pids("n2") and not hosts.pids("n3"), "connections are left on dead replicas")
    source.replicas = ("n3",)
    assert {await host_of(replica) for _ in range(4)} == {"n3"}
    await eventually(lambda: not hosts.pids("n1"), "connections are left on the master")


async def test_without_any_host_readers_fail_at_once(replica: DBConnect, source: FakeSource) -> None:
    source.master, source.replicas = None, ()
    with pytest.raises(NoReplicaError, match="503"):
        await host_of(replica)


async def test_readers_leave_a_frozen_replica_and_return_to_it(
    replica: DBConnect, source: FakeSource, hosts: Hosts
) -> None:
    assert {await host_of(replica) for _ in range(4)} == {"n2", "n3"}
    async with AsyncExitStack() as stack:
        for _ in range(4):
            session = await stack.enter_async_context(new_non_ctx_session(replica))
            await session.scalar(HOST)
        # All connections to both replicas are in use: half of these requests wait for n2, and half for n3.
        waiting = [asyncio.create_task(host_of(replica)) for _ in range(10)]
        await asyncio.sleep(0)
        with frozen(hosts, "n2"):
            source.replicas = ("n3",)
            await stack.aclose()
            async with asyncio.timeout(10):
                assert set(await asyncio.gather(*waiting)) == {"n3"}
            assert {await host_of(replica) for _ in range(4)} == {"n3"}
    await eventually(lambda: not hosts.pids("n2"), "connections are left on the frozen replica")
    source.replicas = ("n2", "n3")
    assert {await host_of(replica) for _ in range(4)} == {"n2", "n3"}


@pytest.mark.parametrize(
    ("sync", "options"),
    [
        ("often", {}),
        (None, {"wait": -1.0}),
        (None, {"wait": "1"}),
        (None, {"connect_timeout": 0}),
        (None, {"max_lag_ms": "1"}),
        (None, {"near": 3}),
    ],
)
def test_follow_replica_refuses_invalid_options(sync: str | None, options: dict[str, Any], source: FakeSource) -> None:
    with pytest.raises(OptionError):
        follow_replica(source, sync, **options)  # type: ignore[arg-type]  # the mistake
