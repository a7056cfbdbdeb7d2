"""Connections that are lost: while they are idle, with COMMIT, or because the task that uses one is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from tests.support.database import Item, eventually, insert
from tests.support.faulty_network import Fault, FaultyMariaDBNetwork, Point
from tests.support.interruption import CANCELLERS, assert_units_are_whole_or_absent
from tests.support.mariadb import MariaDatabase

from ctxdb_core import (
    CommitOutcomeUnknownError,
    DBConnect,
    DeadlineExceededError,
    OpenCursorError,
    TransactionOptionsError,
    atomic_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    on_commit,
    on_rollback,
)

ID = text("SELECT CONNECTION_ID()")
FAULTS = pytest.mark.parametrize("fault", [Fault.DROP, Fault.RESET, Fault.HALF_CLOSE])


async def _fill_pool(db: DBConnect) -> set[int]:
    """Open the five connections of the pool."""

    async def use() -> int:
        async with new_db_ctx():
            number: int = await (await db_session(db)).scalar(ID)
            await everybody.wait()
            return number

    everybody = asyncio.Barrier(5)
    return set(await asyncio.gather(*(use() for _ in range(5))))


# --- idle -------------------------------------------------------------------------------------------------------------


async def test_connections_that_the_server_has_closed_are_replaced(db: DBConnect, database: MariaDatabase) -> None:
    dead = await _fill_pool(db)
    assert database.kill_connections() == 5
    assert not await _fill_pool(db) & dead


async def test_a_connection_that_the_server_ends_for_idling_is_replaced(db: DBConnect, database: MariaDatabase) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        dead = await session.scalar(ID)
        await session.execute(text("SET SESSION wait_timeout = 1"))
    await eventually(lambda: dead not in database.connection_ids(), "the server does not close the connection")
    async with new_db_ctx():
        assert await (await db_session(db)).scalar(ID) != dead


@FAULTS
async def test_connections_that_the_network_has_closed_are_replaced(
    far: DBConnect, network: FaultyMariaDBNetwork, fault: Fault
) -> None:
    dead = await _fill_pool(far)
    network.break_all(fault)
    assert not await _fill_pool(far) & dead


async def test_an_idle_connection_costs_no_round_trip(far: DBConnect, network: FaultyMariaDBNetwork) -> None:
    await _fill_pool(far)
    statements: list[str] = []
    network.on_statement = statements.append
    async with new_db_ctx():
        await (await db_session(far)).scalar(ID)
    assert [each for each in statements if each not in ("COMMIT", "ROLLBACK")] == [str(ID)]


async def test_a_connection_lost_in_a_transaction_is_an_error(db: DBConnect, database: MariaDatabase) -> None:
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            session = await insert(db, "a")
            database.kill_connections()
            await session.execute(text("INSERT INTO item VALUES ('b')"))
    assert await database.names() == []


# --- with COMMIT ------------------------------------------------------------------------------------------------------


@FAULTS
@pytest.mark.parametrize("point", [Point.COMMIT, Point.COMMITTED])
async def test_a_commit_whose_answer_is_lost_is_an_unknown_outcome(
    far: DBConnect, network: FaultyMariaDBNetwork, database: MariaDatabase, point: Point, fault: Fault
) -> None:
    outcomes: list[str] = []
    with pytest.raises(CommitOutcomeUnknownError):
        async with new_db_ctx():
            await insert(far, "a")
            on_commit(far, lambda: outcomes.append("committed"))
            on_rollback(far, lambda: outcomes.append("rolled back"))
            network.fail(point, fault)
    assert outcomes == []
    assert await database.names() == (["a"] if point is Point.COMMITTED else [])
    await _fill_pool(far)


async def test_a_connection_that_is_lost_before_commit_is_no_unknown_outcome(
    far: DBConnect, network: FaultyMariaDBNetwork, database: MariaDatabase
) -> None:
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            await insert(far, "a")
            network.fail(Point.STATEMENT, Fault.DROP)
            await insert(far, "b")
    assert await database.names() == []


# --- cancelled --------------------------------------------------------------------------------------------------------


@CANCELLERS
async def test_the_query_of_a_cancelled_task_stops_on_the_server(
    database: MariaDatabase, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]]
) -> None:
    async def work() -> None:
        async with new_db_ctx():
            # It waits for the other insert to be committed or rolled back.
            await insert(db, "a")

    def is_waiting() -> bool:
        return any("INSERT" in each for each in database.statements())

    watchers: list[asyncio.Task[None]] = []

    def when_it_runs(cancel: Callable[[], object]) -> None:
        async def watch() -> None:
            await eventually(is_waiting, "no query")
            cancel()

        watchers.append(asyncio.create_task(watch()))

    async with new_non_ctx_session(db) as other:
        await other.execute(text("INSERT INTO item VALUES ('a')"))
        await run_cancelled(work, when_it_runs)
        await asyncio.gather(*watchers)
        await eventually(lambda: not is_waiting(), "the query runs on")
    assert await database.names() == []
    await _fill_pool(db)


@CANCELLERS
@pytest.mark.parametrize("connected", [True, False])
async def test_cancelled_at_any_step_a_unit_of_work_is_whole_or_absent(
    database: MariaDatabase, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]], connected: bool
) -> None:
    await assert_units_are_whole_or_absent(database, db, run_cancelled, connected=connected)


# --- streamed results -------------------------------------------------------------------------------------------------


async def test_a_streamed_result_that_was_closed_early_blocks_no_other_statement(
    db: DBConnect, database: MariaDatabase
) -> None:
    await database.query("INSERT INTO item SELECT seq FROM seq_1_to_5000")
    for _ in range(3):
        async with new_db_ctx():
            session = await db_session(db)
            result = await session.stream(text("SELECT name FROM item"))
            await result.fetchone()
            await result.close()
            await insert(db, f"after {_}")
    assert len(await database.names()) == 5003


async def test_a_streamed_result_does_not_outlive_its_unit(db: DBConnect, database: MariaDatabase) -> None:
    await database.query("INSERT INTO item SELECT seq FROM seq_1_to_5000")
    async with new_db_ctx():
        result = await (await db_session(db)).stream(text("SELECT name FROM item"))
        await result.fetchone()
    with pytest.raises(OpenCursorError):
        await result.fetchall()
    await _fill_pool(db)


async def test_the_unit_of_a_cancelled_reader_ends(db: DBConnect, database: MariaDatabase) -> None:
    await database.query("INSERT INTO item SELECT seq FROM seq_1_to_5000")

    async def work() -> None:
        async with new_db_ctx():
            result = await (await db_session(db)).stream(text("SELECT name, SLEEP(0.001) FROM item"))
            await result.fetchone()
            reading.set()
            await result.fetchall()

    reading = asyncio.Event()
    task = asyncio.create_task(work())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not database.statements(), "the query runs on")
    await _fill_pool(db)


# --- limits -----------------------------------------------------------------------------------------------------------


async def test_a_statement_that_takes_longer_than_its_limit_is_stopped_on_the_server(
    db: DBConnect, database: MariaDatabase
) -> None:
    async with new_non_ctx_session(db) as other:
        await other.execute(text("INSERT INTO item VALUES ('a')"))
        with pytest.raises(DeadlineExceededError):
            async with new_db_ctx(statement_timeout=0.1):
                await insert(db, "a")
        await eventually(lambda: not database.statements(), "the statement runs on")
    assert await database.names() == []


# --- read-only --------------------------------------------------------------------------------------------------------


async def test_a_read_only_database_refuses_writes(database: MariaDatabase) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as replica, new_db_ctx():
        session = await db_session(replica)
        assert await session.scalar(text("SELECT count(*) FROM item")) == 0
        with pytest.raises(DBAPIError, match="1792"):
            await insert(replica, "a")


async def test_a_read_only_transaction_refuses_writes(db: DBConnect, database: MariaDatabase) -> None:
    with pytest.raises(DBAPIError, match="1792"):
        async with new_db_ctx(), atomic_db_session(db, read_only=True) as session:
            assert await session.scalar(text("SELECT count(*) FROM item")) == 0
            await insert(db, "a")
    async with new_db_ctx():
        await insert(db, "b")
    assert await database.names() == ["b"]


async def test_a_read_only_transaction_has_the_isolation_level_that_it_is_given(db: DBConnect) -> None:
    async with (
        new_db_ctx(),
        atomic_db_session(db, read_only=True, isolation_level="SERIALIZABLE") as session,
    ):
        assert await session.scalar(text("SELECT @@tx_isolation")) == "SERIALIZABLE"
        with pytest.raises(DBAPIError, match="1792"):
            await insert(db, "a")


async def test_an_open_transaction_that_may_write_is_not_taken_for_a_read_only_transaction(db: DBConnect) -> None:
    async with new_db_ctx():
        await (await db_session(db)).execute(text("SELECT 1"))
        with pytest.raises(TransactionOptionsError, match="may write"):
            async with atomic_db_session(db, read_only=True, current_transaction="append"):
                pass


# --- what was read ----------------------------------------------------------------------------------------------------


async def test_an_object_stays_readable_after_the_end_of_its_unit(db: DBConnect, database: MariaDatabase) -> None:
    await database.query("INSERT INTO item VALUES ('loaded')")
    with pytest.raises(ZeroDivisionError):
        async with new_db_ctx():
            item = await (await db_session(db)).get_one(Item, "loaded")
            raise ZeroDivisionError
    assert item.name == "loaded"


async def test_a_connect_to_a_dark_network_is_given_up_by_the_deadline(
    database: MariaDatabase, network: FaultyMariaDBNetwork
) -> None:
    network.go_dark()
    async with DBConnect.from_url(make_url(database.url).set(port=network.port)) as db:
        with pytest.raises(DeadlineExceededError):
            async with new_db_ctx(deadline=asyncio.get_running_loop().time() + 0.2):
                await insert(db, "a")
