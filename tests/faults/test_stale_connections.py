"""Connections that were closed while they were idle: no request fails for them, and no round trip is spent on it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from tests.support.database import Database, eventually, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point

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


async def _pid(db: DBConnect) -> int:
    async with new_db_ctx():
        pid: int = await (await db_session(db)).scalar(PID)
        return pid


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
    await eventually(lambda: not _is_running(dead), "the server does not close it")
    assert await _pid(db) != dead


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.RESET, Fault.HALF_CLOSE])
async def test_connections_that_the_network_has_closed_are_replaced(
    far: DBConnect, network: FaultyNetwork, fault: Fault
) -> None:
    dead = await _fill_pool(far)
    network.break_all(fault)
    assert not await _fill_pool(far) & dead


async def test_an_idle_connection_costs_no_round_trip(far: DBConnect, network: FaultyNetwork) -> None:
    statements: list[str] = []
    engine = await far.engine()
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda conn, cursor, statement, *args: statements.append(statement)
    )
    assert await _pid(far) == await _pid(far)
    assert statements == [str(PID)] * 2
    assert network.connections == 1


async def test_a_connection_lost_with_its_begin_is_replaced_on_asyncpg(
    far: DBConnect, network: FaultyNetwork, database: Database, database_kind: str
) -> None:
    if database_kind != "asyncpg":
        pytest.skip("psycopg sends BEGIN where nothing can be put in its place")
    await _pid(far)
    network.fail(Point.BEGIN, Fault.DROP)
    async with new_db_ctx():
        await insert(far, "a")
    assert network.failed.is_set()
    assert await database.names() == ["a"]


async def test_a_connection_is_replaced_once(far: DBConnect, network: FaultyNetwork, database_kind: str) -> None:
    if database_kind != "asyncpg":
        pytest.skip("psycopg sends BEGIN where nothing can be put in its place")
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
