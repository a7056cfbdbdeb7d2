"""Connections that were closed while they were idle: no request fails for them, and none costs a round trip more."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy import insert as insert_into
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import greenlet_spawn
from tests.support.database import Database, Item, eventually, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point
from tests.support.ways import in_a_savepoint, in_a_transaction_context, in_a_unit

from ctxdb_core import DBConnect, TransactionContext, db_session, new_db_ctx, new_non_ctx_session

PID = text("SELECT pg_backend_pid()")


async def _fill_pool(db: DBConnect) -> set[int]:
    """Open the five connections of the pool."""

    async def use() -> int:
        async with new_db_ctx():
            session = await db_session(db)
            pid: int = await session.scalar(PID)
            await everybody.wait()
            return pid

    everybody = asyncio.Barrier(5)
    return set(await asyncio.gather(*(use() for _ in range(5))))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


async def _end_backend(database: Database, pid: int) -> None:
    """Have the server close all connections, and wait until one of its processes has ended."""
    database.terminate_backends()
    await eventually(lambda: not _is_running(pid), "the server process does not end")


async def _pid(db: DBConnect) -> int:
    async with new_db_ctx():
        pid: int = await (await db_session(db)).scalar(PID)
        return pid


async def let_notice_arrive() -> None:
    """Let the event loop read what has been written to a connection on the same machine."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_connections_that_the_server_has_closed_are_replaced(db: DBConnect, database: Database) -> None:
    dead = await _fill_pool(db)
    assert len(dead) == 5
    database.terminate_backends()
    assert not await _fill_pool(db) & dead


async def test_only_the_connection_that_was_closed_is_replaced(db: DBConnect, database: Database) -> None:
    pids = await _fill_pool(db)
    dead = min(pids)
    database.terminate_backends(f"pid = {dead}")
    later = await _fill_pool(db)
    assert len(later & pids) == 4
    assert dead not in later


async def test_a_connection_that_the_server_ends_for_idling_is_replaced(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        dead = await session.scalar(PID)
        await session.execute(text("SET idle_session_timeout = 20"))
    await eventually(lambda: not _is_running(dead), "the server process does not end")
    assert await _pid(db) != dead


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.RESET, Fault.HALF_CLOSE])
async def test_connections_that_the_network_has_closed_are_replaced(
    far: DBConnect, network: FaultyNetwork, fault: Fault
) -> None:
    dead = await _fill_pool(far)
    network.break_all(fault)
    assert not await _fill_pool(far) & dead


@pytest.mark.parametrize("database_kind", ["asyncpg"], indirect=True)
async def test_a_connection_whose_end_the_server_has_announced_is_replaced_before_the_end_arrives(
    far: DBConnect, network: FaultyNetwork
) -> None:
    dead = await _pid(far)
    network.break_all(Fault.NOTICE)
    await let_notice_arrive()
    assert await _pid(far) != dead
    assert await _pid(far) == await _pid(far)


async def test_an_idle_connection_costs_no_round_trip(far: DBConnect, network: FaultyNetwork) -> None:
    statements: list[str] = []
    engine = await far.engine()
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda conn, cursor, statement, *args: statements.append(statement)
    )
    assert await _pid(far) == await _pid(far)
    assert statements == [str(PID)] * 2
    assert network.connections == 1


async def _write_rows(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(insert_into(Item), [{"name": "a"}, {"name": "b"}])


async def _write_before_a_deadline(db: DBConnect) -> None:
    async with new_db_ctx(deadline=asyncio.get_running_loop().time() + 60):
        await insert(db, "a")


async def _write_by_a_lazy_session_maker(db: DBConnect) -> None:
    async with db.lazy_session_maker() as session, session.begin():
        await session.execute(text("INSERT INTO item VALUES ('a')"))


async def _write_without_a_unit(db: DBConnect) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(text("INSERT INTO item VALUES ('a')"))
        await session.commit()


@pytest.mark.parametrize(
    "write",
    [
        in_a_unit,
        _write_rows,
        in_a_savepoint,
        _write_before_a_deadline,
        in_a_transaction_context,
        _write_by_a_lazy_session_maker,
        _write_without_a_unit,
    ],
)
async def test_a_connection_lost_with_its_begin_is_replaced(
    far: DBConnect,
    network: FaultyNetwork,
    database: Database,
    write: Callable[[DBConnect], Awaitable[None]],
) -> None:
    await _pid(far)
    network.fail(Point.BEGIN, Fault.DROP)
    await write(far)
    assert network.failed.is_set()
    assert await database.names() == (["a", "b"] if write is _write_rows else ["a"])
    # The new connection has gone back to the pool, and can be used.
    assert await _pid(far) == await _pid(far)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.HALF_CLOSE])
async def test_a_connection_that_is_reset_or_half_closed_with_its_begin_is_replaced(
    far: DBConnect, network: FaultyNetwork, database: Database, fault: Fault
) -> None:
    await _pid(far)
    network.fail(Point.BEGIN, fault)
    await in_a_unit(far)
    assert network.failed.is_set()
    assert await database.names() == ["a"]


async def test_a_closed_connection_is_replaced_before_rows_are_sent_right_behind_its_begin(
    db: DBConnect, database: Database
) -> None:
    dead = await _pid(db)
    await _end_backend(database, dead)
    await _write_rows(db)
    assert await database.names() == ["a", "b"]


async def test_a_connection_that_is_lost_before_its_first_result_is_streamed_is_replaced(
    far: DBConnect, network: FaultyNetwork
) -> None:
    await _pid(far)
    network.fail(Point.BEGIN, Fault.DROP)
    async with new_db_ctx():
        numbers = await (await db_session(far)).stream_scalars(text("SELECT generate_series(1, 3)"))
        assert (await numbers.all()) == [1, 2, 3]
    assert network.failed.is_set()


async def test_a_connection_that_is_lost_while_it_is_held_without_a_transaction_is_replaced(
    db: DBConnect, database: Database
) -> None:
    async with (await db.engine()).connect() as connection:
        database.terminate_backends()
        await connection.execute(text("INSERT INTO item VALUES ('a')"))
        await connection.commit()
    assert await database.names() == ["a"]


async def test_a_connection_in_autocommit_that_is_lost_while_it_is_held_is_replaced(database: Database) -> None:
    async with database.connect(isolation_level="AUTOCOMMIT") as db, (await db.engine()).connect() as connection:
        # The driver's connection is taken out of SQLAlchemy's adapter. A connection whose `driver_connection` was read
        # is not replaced, as that code may have set something on it.
        driver_connection: Any = (await connection.get_raw_connection()).dbapi_connection._connection  # type: ignore[union-attr]
        (dead,) = database.backend_pids("true")
        await _end_backend(database, dead)
        if hasattr(driver_connection, "is_closed"):
            await eventually(driver_connection.is_closed, "the driver does not notice that it is closed")
        assert await connection.scalar(PID) != dead


@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}])
async def test_a_connection_that_code_has_set_something_on_is_not_replaced(
    database: Database, options: dict[str, Any]
) -> None:
    async with database.connect(**options) as db:
        async with (await db.engine()).connect() as connection:
            dead = await connection.scalar(PID)
            await connection.execute(text("SET search_path = nowhere"))
            await connection.commit()
            await _end_backend(database, dead)
            with pytest.raises(DBAPIError):
                await connection.execute(text("SHOW search_path"))
        assert await _pid(db) != dead


@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}])
@pytest.mark.parametrize("how", ["pooled connection", "adapter", "coroutine of the adapter"])
async def test_a_connection_whose_driver_connection_code_has_been_given_is_not_replaced(
    database: Database, options: dict[str, Any], how: str
) -> None:
    async with database.connect(**options) as db:
        await _pid(db)
        async with (await db.engine()).connect() as connection:
            pooled: Any = await connection.get_raw_connection()
            (dead,) = database.backend_pids("true")
            sql = "SET search_path = nowhere"
            if how == "pooled connection":
                await pooled.driver_connection.execute(sql)
            elif how == "adapter":
                await pooled.dbapi_connection.driver_connection.execute(sql)
            else:
                await greenlet_spawn(pooled.dbapi_connection.run_async, lambda driver: driver.execute(sql))
            await _end_backend(database, dead)
            with pytest.raises(DBAPIError):
                await connection.execute(text("SHOW search_path"))
        assert await _pid(db) != dead


@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}])
async def test_a_connection_that_a_listener_has_set_something_on_is_not_replaced(
    database: Database, options: dict[str, Any]
) -> None:
    engine = database.watch_new(**options)

    def set_path(dbapi_connection: Any, record: ConnectionPoolEntry, proxy: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SET search_path = nowhere")
        cursor.close()
        dbapi_connection.commit()

    # The engine has the listener before ctxdb sees the engine.
    event.listen(engine.sync_engine, "checkout", set_path)
    async with DBConnect.from_engine(engine) as db:
        dead = await _pid(db)
        async with engine.connect() as connection:
            await _end_backend(database, dead)
            with pytest.raises(DBAPIError):
                await connection.execute(text("SHOW search_path"))
        assert await _pid(db) != dead
    await engine.dispose()


async def test_the_query_of_a_connection_that_replaces_another_can_be_stopped(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    await _pid(far)
    network.fail(Point.BEGIN, Fault.DROP)
    async with new_non_ctx_session(far) as session:
        waiting = asyncio.create_task(session.execute(text("SELECT pg_sleep(600)")))
        await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await eventually(lambda: not database.backends("state = 'active'"), "the query runs on")


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_transaction_that_code_has_begun_on_the_driver_is_not_replaced(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    async with (await far.engine()).connect() as connection:
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        await driver_connection.execute("INSERT INTO item VALUES ('a')")
        network.break_all(Fault.DROP)
        with pytest.raises(DBAPIError):
            await connection.execute(text("INSERT INTO item VALUES ('b')"))
    assert await database.names() == []


async def test_a_connection_is_replaced_only_once(far: DBConnect, network: FaultyNetwork) -> None:
    await _pid(far)
    network.fail(Point.BEGIN, Fault.DROP)
    engine = await far.engine()

    @event.listens_for(engine.sync_engine, "connect")
    def fail_again(*args: object) -> None:
        network.fail(Point.BEGIN, Fault.DROP)

    with pytest.raises(DBAPIError):
        await _pid(far)


async def test_a_connection_lost_in_a_transaction_is_an_error(db: DBConnect, database: Database) -> None:
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            session = await insert(db, "a")
            database.terminate_backends()
            await session.execute(text("INSERT INTO item VALUES ('b')"))
    assert await database.names() == []


async def test_a_connection_of_a_borrowed_engine_is_replaced(database: Database) -> None:
    engine = database.watch_new()
    context = TransactionContext(engine)
    for _ in range(2):
        async with context.transaction():
            await context.get_session().scalar(PID)
        database.terminate_backends()
    await engine.dispose()


async def _set_something_and_lose_it(database: Database, engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        pooled: Any = await connection.get_raw_connection()
        await pooled.driver_connection.execute("SET search_path = nowhere")
        database.terminate_backends()
        with pytest.raises(DBAPIError):
            await connection.execute(text("SHOW search_path"))


async def test_a_connection_that_code_was_given_is_not_replaced_on_another_loop_of_a_borrowed_engine(
    database: Database,
) -> None:
    engine = database.watch_new()
    async with DBConnect.from_engine(engine) as db:
        await _pid(db)

        async def use_on_another_loop() -> None:
            await _set_something_and_lose_it(database, await db.engine())

        await asyncio.to_thread(asyncio.run, use_on_another_loop())
    await engine.dispose()


async def test_a_connection_that_code_was_given_is_not_replaced_in_a_pool_of_two_engines(database: Database) -> None:
    engine = database.watch_new(pool_size=1, max_overflow=0)
    other = engine.execution_options(isolation_level="SERIALIZABLE")
    async with DBConnect.from_engine(engine) as db, DBConnect.from_engine(other) as other_db:
        assert await _pid(db) == await _pid(other_db)
        for each in (engine, other):
            await _set_something_and_lose_it(database, each)
    await engine.dispose()


async def test_the_connection_that_replaces_another_stays_in_the_pool(far: DBConnect, network: FaultyNetwork) -> None:
    await _pid(far)
    network.fail(Point.BEGIN, Fault.DROP)
    assert await _pid(far) == await _pid(far)


@pytest.mark.parametrize("database_kind", ["asyncpg"], indirect=True)
async def test_a_lost_connection_out_of_a_pool_of_asyncpg_is_replaced(database: Database) -> None:
    url = database.url.replace("+asyncpg", "")
    async with asyncpg.create_pool(url, min_size=0) as pool:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=pool.acquire)
        async with DBConnect.from_engine(engine) as db:
            for _ in range(2):
                dead = await _pid(db)
                await _end_backend(database, dead)
                assert await _pid(db) != dead
        await engine.dispose()


async def test_connections_of_a_borrowed_engine_that_are_older_than_its_guards_are_replaced(database: Database) -> None:
    engine = database.watch_new(isolation_level="AUTOCOMMIT")
    async with engine.connect() as one, engine.connect() as other:
        old = {await one.scalar(PID), await other.scalar(PID)}
    async with DBConnect.from_engine(engine) as db:
        # The pool opens three more connections. ctxdb is told of those, and not of the two older ones.
        assert old < await _fill_pool(db)
        database.terminate_backends(f"pid IN {tuple(old)}")
        assert not await _fill_pool(db) & old
    await engine.dispose()


@pytest.mark.parametrize("database_kind", ["asyncpg"])
@pytest.mark.parametrize("is_older", [False, True], ids=["", "older than the guards"])
async def test_code_that_asks_for_the_connection_of_the_driver_is_given_a_live_one(
    database: Database, is_older: bool
) -> None:
    engine = database.watch_new(pool_size=1)
    db = DBConnect.from_engine(engine)
    if not is_older:
        await db.engine()
    async with engine.connect() as connection:
        dead: Any = (await connection.get_raw_connection()).driver_connection
    # An engine gets its guards when it is first asked for.
    await db.engine()
    database.terminate_backends()
    await eventually(dead.is_closed, "the driver does not notice")
    # The driver tells of it in the next round of the event loop.
    await asyncio.sleep(0)
    async with engine.connect() as connection:
        alive: Any = (await connection.get_raw_connection()).driver_connection
        assert await alive.fetchval("SELECT 1") == 1
    await db.close()
    await engine.dispose()


async def test_a_connection_in_autocommit_is_replaced(database: Database) -> None:
    async with database.connect(isolation_level="AUTOCOMMIT") as db:
        for _ in range(2):
            async with new_non_ctx_session(db) as session:
                await session.scalar(PID)
            database.terminate_backends()


async def test_listeners_of_the_engine_see_the_connection_that_replaces_another(
    db: DBConnect, database: Database
) -> None:
    seen: list[Any] = []
    engine = await db.engine()
    event.listen(engine.sync_engine, "connect", lambda connection, record: seen.append(connection))
    await _pid(db)
    database.terminate_backends()
    await _pid(db)
    assert len(seen) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own way to ask several sockets at once")
async def test_an_engine_that_was_disposed_of_keeps_no_descriptor(db: DBConnect, database: Database) -> None:
    before = _epolls()
    for _ in range(2):
        await _fill_pool(db)
        assert _epolls() == before + 1
        database.terminate_backends()
        await _fill_pool(db)
        await (await db.engine()).dispose()
        assert _epolls() == before


def _epolls() -> int:
    descriptors = list(Path("/proc/self/fd").iterdir())
    return sum(each.is_symlink() and each.readlink() == Path("anon_inode:[eventpoll]") for each in descriptors)


@pytest.mark.parametrize("read_only", [False, True])
async def test_no_request_fails_as_the_server_restarts_beneath_a_busy_pool(
    database: Database, *, read_only: bool
) -> None:
    async with DBConnect.from_url(database.url, read_only=read_only) as db:

        async def read() -> None:
            async with new_db_ctx():
                assert await (await db_session(db)).scalar(text("SELECT count(*) FROM item")) == 0

        for _ in range(2):
            # There are more requests than the pool has connections.
            await asyncio.gather(*(read() for _ in range(20)))
            database.terminate_backends()
        await read()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}])
async def test_a_connection_of_sqlite_that_was_closed_is_replaced(database: Database, options: dict[str, Any]) -> None:
    async with database.connect(**options) as db:
        closed: list[Any] = []
        for _ in range(2):
            async with new_non_ctx_session(db) as session:
                raw = await (await session.connection()).get_raw_connection()
                driver_connection: Any = raw.driver_connection
                assert driver_connection not in closed
                await session.execute(text("SELECT 1"))
            closed.append(driver_connection)
            await driver_connection.close()
