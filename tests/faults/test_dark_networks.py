"""A database that does not answer, or refuses connections: no call takes longer than its limit."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.database import Database, eventually, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point

from ctxdb_core import (
    ArgumentTypeError,
    ArgumentValueError,
    CommitOutcomeUnknownError,
    DBConnect,
    DeadlineExceededError,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
)
from ctxdb_core._sqlalchemy.cancelled_queries import _stop_query_of_psycopg
from ctxdb_core._sqlalchemy.private import psycopg_connection_that_stops

SECRET = "postgresql://me:s3cret@127.0.0.1/db"

REFUSALS = (DBAPIError, OSError, asyncpg.PostgresConnectionError)
"""What is raised where a connection is refused. asyncpg 0.32 raises an error of its own for it."""


@pytest.fixture
def short_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls not wait for long until a server that does not answer has stopped their query."""
    module = "ctxdb_core._sqlalchemy.cancelled_queries"
    monkeypatch.setattr(f"{module}.STOP_QUERY_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(f"{module}.LATE_STOP_TIMEOUT_SECONDS", 0.2)


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_task_waits_for_a_connection_of_the_pool_until_its_deadline(db: DBConnect) -> None:
    everybody, enough = asyncio.Barrier(6), asyncio.Event()

    async def hold() -> None:
        async with new_db_ctx():
            await (await db_session(db)).scalar(text("SELECT 1"))
            await everybody.wait()
            await enough.wait()

    holding = [asyncio.create_task(hold()) for _ in range(5)]
    await everybody.wait()
    with pytest.raises(DeadlineExceededError, match="no connection to give"):
        async with new_db_ctx(deadline=now() + 0.1):
            await (await db_session(db)).scalar(text("SELECT 1"))
    enough.set()
    await asyncio.gather(*holding)


@pytest.mark.usefixtures("short_stops")
@pytest.mark.parametrize("limit", ["deadline", "statement_timeout"])
@pytest.mark.parametrize("point", [Point.STARTUP, Point.BEGIN, Point.STATEMENT, Point.ANSWER])
async def test_a_network_that_goes_dark_ends_the_call_in_time(
    far: DBConnect, network: FaultyNetwork, database: Database, point: Point, limit: str
) -> None:
    limits: dict[str, Any] = {limit: 0.2 if limit == "statement_timeout" else now() + 0.2}
    network.fail(point, Fault.BLACK_HOLE)
    with pytest.raises((DeadlineExceededError, DBAPIError)):
        async with new_db_ctx(**limits):
            await insert(far, "a")
    assert network.failed.is_set()
    assert await database.names() == []


@pytest.mark.usefixtures("short_stops")
async def test_a_streamed_result_is_given_up_in_time_if_the_network_goes_dark(
    far: DBConnect, network: FaultyNetwork
) -> None:
    with pytest.raises(DeadlineExceededError):
        async with new_db_ctx(statement_timeout=0.2):
            numbers = await (await db_session(far)).stream_scalars(text("SELECT generate_series(1, 100000)"))
            assert await anext(numbers) == 1
            network.break_all(Fault.BLACK_HOLE)
            await numbers.all()


@pytest.mark.usefixtures("short_stops")
@pytest.mark.parametrize("point", [Point.COMMIT, Point.COMMITTED])
async def test_a_commit_is_unknown_if_the_network_goes_dark_with_it(
    far: DBConnect, network: FaultyNetwork, database: Database, point: Point
) -> None:
    network.fail(point, Fault.BLACK_HOLE)
    with pytest.raises(CommitOutcomeUnknownError):
        async with new_db_ctx(deadline=now() + 0.5):
            await insert(far, "a")
    await eventually(lambda: not database.backends("state <> 'idle'"), "the transaction goes on at the server")
    assert await database.names() == (["a"] if point is Point.COMMITTED else [])


async def test_a_query_that_its_cancel_request_overtakes_is_stopped(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    sleep = text("SELECT pg_sleep(:seconds)")
    async with new_non_ctx_session(far) as session:
        await session.execute(sleep, {"seconds": 0.0})
        network.lets_execute.clear()
        running = asyncio.create_task(session.execute(sleep, {"seconds": 600.0}))
        await network.holds_back.wait()
        running.cancel()
        await eventually(lambda: network.answered_cancel_requests == 1, "no cancel request")
        network.lets_execute.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    await eventually(lambda: not database.backends("state = 'active'"), "the query runs on")


async def test_a_statement_that_is_cancelled_while_its_transaction_begins_is_not_sent(
    far: DBConnect, network: FaultyNetwork
) -> None:
    async with new_non_ctx_session(far) as session:
        await session.connection()
        await session.rollback()
        sent: list[str] = []
        network.on_statement = sent.append
        network.lets_execute.clear()
        running = asyncio.create_task(session.execute(text("SELECT pg_sleep(600)")))
        await network.holds_back.wait()
        running.cancel()
        await eventually(lambda: network.answered_cancel_requests == 1, "no cancel request")
        network.lets_execute.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert [statement for statement in sent if "pg_sleep" in statement] == []


@pytest.mark.usefixtures("short_stops")
async def test_the_event_loop_goes_on_while_a_query_is_cancelled_over_a_dark_network(
    far: DBConnect, network: FaultyNetwork, database_kind: str
) -> None:
    async with new_non_ctx_session(far) as session:
        await session.connection()
        waiting = asyncio.create_task(session.execute(text("SELECT pg_sleep(60)")))
        await asyncio.sleep(0)
        network.go_dark()
        waiting.cancel()
        turns = 0
        while not waiting.done():
            # The event loop is not blocked as long as it comes back to this loop.
            await asyncio.sleep(0.01)
            turns += 1
        assert turns > 1
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # ctxdb tries for some time to have the server stop the query, in which asyncpg asks twice.
        assert network.cancel_requests == {"asyncpg": 2, "psycopg": 1}[database_kind]
        await session.invalidate()


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_the_socket_of_a_query_is_not_read_any_more_when_its_stop_is_interrupted(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    loop = asyncio.get_running_loop()
    read_on: list[bool] = []

    async def stop(connection: Any) -> None:
        try:
            await _stop_query_of_psycopg(connection)
        finally:
            # Psycopg closes the socket now.
            read_on.append(loop.remove_reader(connection.pgconn.socket))

    async with new_non_ctx_session(far) as session:
        own: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        own.__class__ = psycopg_connection_that_stops(type(own), stop)
        running = asyncio.create_task(own.execute("SELECT pg_sleep(600)"))
        await eventually(lambda: own.info.transaction_status.name == "ACTIVE", "no query")
        network.go_dark()
        running.cancel()
        await eventually(lambda: network.cancel_requests == 1, "no cancel request")
        while not running.done():
            # As a cancel scope of anyio does.
            running.cancel()
            await asyncio.sleep(0)
        assert read_on == [False]
        await session.invalidate()
    database.terminate_backends("state = 'active'")


async def test_tasks_that_wait_for_a_pool_fail_when_the_database_refuses_connections(
    database: Database, network: FaultyNetwork
) -> None:
    network.lets_in = False
    url = make_url(database.url).set(port=network.port)
    async with DBConnect.from_url(url, pool_size=1, max_overflow=0, pool_timeout=600) as db:

        async def use() -> None:
            async with new_db_ctx():
                await (await db_session(db)).scalar(text("SELECT 1"))

        results = await asyncio.gather(*(use() for _ in range(5)), return_exceptions=True)
        assert all(isinstance(result, REFUSALS) for result in results), results
        network.lets_in = True
        await asyncio.gather(*(use() for _ in range(5)))


async def test_tasks_on_a_second_event_loop_fail_when_the_database_of_an_engine_refuses_connections(
    database: Database, network: FaultyNetwork
) -> None:
    url = make_url(database.url).set(port=network.port)
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=600)
    db = DBConnect.from_engine(engine)

    async def use() -> None:
        async with new_db_ctx():
            await (await db_session(db)).scalar(text("SELECT 1"))

    async def use_at_once() -> list[BaseException | None]:
        async with asyncio.timeout(20):
            return await asyncio.gather(*(use() for _ in range(5)), return_exceptions=True)

    # The first event loop has the engine itself, and the second one a copy with the same dialect.
    await use()
    network.lets_in = False
    results = await asyncio.to_thread(asyncio.run, use_at_once())
    assert all(isinstance(result, REFUSALS) for result in results), results
    network.lets_in = True
    await engine.dispose()


async def test_from_url_limits_the_time_to_connect_to_ten_seconds(database: Database, database_kind: str) -> None:
    given: list[dict[str, Any]] = []
    name = "connect_timeout" if database_kind == "psycopg" else "timeout"
    choices: tuple[dict[str, Any], ...] = ({}, {"connect_args": {name: 7}})
    for chosen in choices:
        async with DBConnect.from_url(database.url, **chosen) as db:
            engine = await db.engine()

            @event.listens_for(engine.sync_engine, "do_connect")
            def note(dialect: object, record: object, arguments: object, options: dict[str, Any]) -> None:
                given.append(dict(options))

            async with new_non_ctx_session(db) as session:
                await session.connection()
    assert [options[name] for options in given] == [10, 7]


async def test_no_message_shows_the_password_of_a_host(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    db = DBConnect(lambda host: None, host=SECRET)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ArgumentTypeError) as raised:
        await db.engine()
    assert "s3cret" not in str(raised.value)
    with pytest.raises(ArgumentTypeError) as raised:
        await db.change_host("other", keep=SECRET)
    assert "s3cret" not in str(raised.value)
    async with DBConnect.from_url("sqlite+aiosqlite://") as memory:
        with pytest.raises(ArgumentValueError) as refused:
            await memory.change_host(SECRET)
    assert "s3cret" not in str(refused.value)
