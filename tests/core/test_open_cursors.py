"""Results that are still read from the server, and driver's connections: neither outlives its transaction."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Any

import anyio
import asyncpg
import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.connection import BODY, START, Connection
from tests.support.database import Database, insert

from ctxdb_core import (
    DBConnect,
    OpenCursorError,
    TransactionAbortedError,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    rollback_db_session,
    set_rollback_only,
)
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware, Receive, Scope, Send

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)

ROWS = text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) SELECT i FROM n")


@KINDS
async def test_a_result_is_not_read_on_after_the_commit_of_its_transaction(db: DBConnect) -> None:
    async with new_db_ctx():
        rows = await (await db_session(db)).stream(ROWS)
        await rows.fetchmany(10)
        await commit_db_session(db)
        with pytest.raises(OpenCursorError, match="has ended"):
            await rows.fetchone()
        await rows.close()


@KINDS
async def test_a_result_is_not_read_on_after_the_roll_back_of_its_transaction(db: DBConnect) -> None:
    async with new_db_ctx():
        rows = await (await db_session(db)).stream(ROWS)
        await rollback_db_session(db)
        with pytest.raises(OpenCursorError, match="has ended"):
            await rows.all()


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("beside", ["before_commit", "a callback", "a second database", "a marked database"])
async def test_the_body_reads_a_result_on_in_a_transaction_that_has_only_read(
    db: DBConnect, second_db: DBConnect, writes: bool, beside: str
) -> None:
    async def before_commit(session: AsyncSession) -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if writes:
            await insert(db, "written")
        if beside == "a callback":
            on_commit(db, lambda: None)
        elif beside != "before_commit":
            await insert(second_db, "second")
        if beside == "a marked database":
            set_rollback_only(second_db)
        rows = await (await db_session(db)).stream(ROWS)
        await rows.fetchmany(10)
        await send(START)
        read.append(len(await rows.all()))
        await send(BODY)

    read: list[int] = []
    middleware = ASGIHTTPDBSessionMiddleware(app, before_commit if beside == "before_commit" else None)
    with pytest.raises(OpenCursorError) if writes else nullcontext():
        await Connection().run(middleware)
    assert read == ([] if writes else [1990])


@pytest.mark.parametrize("several", [False, True])
async def test_a_unit_that_has_written_is_committed_although_a_result_is_left_open_at_its_end(
    db: DBConnect, second_db: DBConnect, database: Database, several: bool
) -> None:
    async with new_db_ctx():
        if several:
            await insert(second_db, "second")
        rows = await (await db_session(db)).stream(ROWS)
        await rows.fetchmany(10)
        await insert(db, "one")
    assert await database.names() == ["one", *(["second"] if several else [])]
    with pytest.raises(OpenCursorError, match="has ended"):
        await rows.fetchone()


async def test_a_kept_result_reaches_into_no_other_transaction(database: Database) -> None:
    async with database.connect(pool_size=1) as db:
        async with new_non_ctx_session(db) as first:
            rows = await first.stream(ROWS)
            await rows.fetchmany(3)
            await first.commit()
        async with new_db_ctx():
            await insert(db, "innocent")
            with pytest.raises(OpenCursorError):
                await rows.fetchone()
    assert await database.names() == ["innocent"]


@KINDS
async def test_a_result_that_was_read_whole_ends_as_ever(db: DBConnect) -> None:
    async with new_db_ctx():
        rows = await (await db_session(db)).stream(ROWS)
        assert len(await rows.all()) == 2000
        await commit_db_session(db)
        assert (await rows.fetchone()) is None


@KINDS
async def test_results_and_statements_of_several_tasks_take_turns(db: DBConnect) -> None:
    async def count(session: AsyncSession) -> int:
        return len([row async for row in await session.stream(ROWS)])

    async def count_on_connection(session: AsyncSession) -> int:
        connection = await session.connection()
        async with connection.stream(ROWS) as rows:
            return len([row async for row in rows])

    async def ask(session: AsyncSession) -> int:
        return sum([await session.scalar(text("SELECT 1")) or 0 for _ in range(40)])

    async with new_db_ctx():
        session = await db_session(db)
        counts = [count(session), count(session), ask(session), count_on_connection(session), ask(session)]
        assert await asyncio.gather(*counts) == [2000, 2000, 40, 2000, 40]


@KINDS
async def test_a_statement_that_fails_as_it_is_streamed_inside_of_a_savepoint_raises_its_own_error(
    db: DBConnect,
) -> None:
    async def stream(session: AsyncSession) -> None:
        async with session.begin_nested():
            await session.stream(text("SELECT * FROM nowhere"))

    with pytest.raises(DBAPIError, match="nowhere"):
        async with new_db_ctx():
            await stream(await db_session(db))
    with pytest.raises(DBAPIError, match="nowhere"):
        async with new_non_ctx_session(db) as session:
            await stream(session)


# --- the driver's connection ------------------------------------------------------------------------------------------


async def driver_connection_of(session: AsyncSession) -> Any:
    raw = await (await session.connection()).get_raw_connection()
    return raw.driver_connection


async def test_copy_before_the_first_statement_is_rolled_back(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            driver = await driver_connection_of(await db_session(db))
            await driver.copy_records_to_table("item", records=[("copied",)])
            raise LookupError
    assert await database.names() == []


async def test_copy_in_a_session_outside_of_units_is_rolled_back(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_non_ctx_atomic_session(db) as session:
            driver = await driver_connection_of(session)
            await driver.copy_records_to_table("item", records=[("copied",)])
            raise LookupError
    assert await database.names() == []


async def test_copy_is_committed_with_the_transaction(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await insert(db, "inserted")
        driver = await driver_connection_of(session)
        assert isinstance(driver, asyncpg.Connection)
        await driver.copy_records_to_table("item", records=[("copied",)])
        assert await driver.fetchval("SELECT count(*) FROM item") == 2
    assert await database.names() == ["copied", "inserted"]


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_swallowed_error_of_the_drivers_connection_makes_no_success(db: DBConnect, database: Database) -> None:
    with pytest.raises(TransactionAbortedError):
        async with new_db_ctx():
            driver = await driver_connection_of(await insert(db, "lost"))
            with pytest.raises((asyncpg.DivisionByZeroError, psycopg.errors.DivisionByZero)):
                await driver.execute("SELECT 1/0")
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_an_error_in_a_savepoint_of_the_drivers_connection_stays_in_it(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        driver = await driver_connection_of(await insert(db, "kept"))
        with pytest.raises((asyncpg.DivisionByZeroError, psycopg.errors.DivisionByZero)):
            async with driver.transaction():
                await driver.execute("SELECT 1/0")
    assert await database.names() == ["kept"]


async def test_a_connection_that_was_detached_from_its_pool_can_be_asked_for(db: DBConnect, database: Database) -> None:
    engine = await db.engine()
    event.listen(engine.sync_engine, "engine_connect", lambda connection: connection.detach())
    async with new_db_ctx():
        await driver_connection_of(await insert(db, "kept"))
    assert await database.names() == ["kept"]
    # A detached connection is closed, and never given back to the pool.
    database.in_use.clear()


async def test_a_drivers_connection_is_refused_once_it_was_given_back(database: Database) -> None:
    async with database.connect(pool_size=1) as db:
        async with new_db_ctx():
            session = await db_session(db)
            await session.execute(text("SELECT name FROM item"))
            driver = await driver_connection_of(session)
            cursor = await driver.cursor("SELECT generate_series(1, 9)")
            statement = await driver.prepare("SELECT 1")
            await cursor.fetch(2)
        async with new_db_ctx():
            await insert(db, "innocent")
            uses: list[Callable[[], Awaitable[object]]] = [
                lambda: driver.copy_records_to_table("item", records=[("intruder",)]),
                lambda: driver.execute("INSERT INTO item VALUES ('intruder')"),
                lambda: cursor.fetch(2),
                statement.fetch,
            ]
            for use in uses:
                with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                    await use()
            # SQLAlchemy's own statements, of which one was prepared before, go on.
            assert (await (await db_session(db)).execute(text("SELECT name FROM item"))).all() == [("innocent",)]
    assert await database.names() == ["innocent"]


async def test_a_commit_in_the_middle_of_a_statement_of_the_drivers_connection_gives_the_pool_no_open_transaction(
    database: Database,
) -> None:
    async with database.connect(pool_size=1) as db:
        async with new_db_ctx():
            driver = await driver_connection_of(await insert(db, "lost"))
            statement = asyncio.create_task(driver.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0)
            with pytest.raises(DBAPIError, match="another operation is in progress"):
                await commit_db_session(db)
            await asyncio.gather(statement, return_exceptions=True)
        await database.assert_quiet()
        async with new_db_ctx():
            await insert(db, "next")
    assert await database.names() == ["next"]


async def test_a_savepoint_that_the_driver_is_too_busy_to_roll_back_is_not_committed(
    db: DBConnect, database: Database
) -> None:
    statements: list[asyncio.Task[object]] = []
    with pytest.raises((DBAPIError, PendingRollbackError)):
        async with new_db_ctx():
            session = await insert(db, "outer")
            with suppress(LookupError, DBAPIError):
                async with session.begin_nested():
                    driver = await driver_connection_of(await insert(db, "undone"))
                    statements.append(asyncio.create_task(driver.execute("SELECT pg_sleep(0)")))
                    await asyncio.sleep(0)
                    raise LookupError
            await asyncio.gather(*statements, return_exceptions=True)
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_result_ends_with_the_savepoint_that_it_was_opened_in(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        before = await session.stream(ROWS, execution_options={"yield_per": 10})
        with suppress(LookupError):
            async with session.begin_nested():
                inside = await session.stream(ROWS, execution_options={"yield_per": 10})
                assert await inside.fetchone() == (1,)
                raise LookupError
        with pytest.raises(OpenCursorError, match="savepoint"):
            await inside.all()
        assert len(await before.all()) == 2000
        async with session.begin_nested():
            inside = await session.stream(ROWS, execution_options={"yield_per": 10})
        assert len(await inside.all()) == 2000


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_connection_of_psycopg_is_refused_once_it_was_given_back(database: Database) -> None:
    async with database.connect(pool_size=1) as db:
        async with new_db_ctx():
            driver = await driver_connection_of(await db_session(db))
            assert isinstance(driver, psycopg.AsyncConnection)
            cursor, of_server = driver.cursor(), driver.cursor("of_server")
            await of_server.execute("SELECT generate_series(1, 9)")
            assert await of_server.fetchmany(2) == [(1,), (2,)]
            async with driver.transaction(), cursor.copy("COPY item FROM STDIN") as copy:
                await copy.write_row(("copied",))
        async with new_db_ctx():
            await insert(db, "innocent")
            uses: list[Callable[[], Awaitable[object]]] = [
                lambda: driver.execute("INSERT INTO item VALUES ('intruder')"),
                lambda: cursor.execute("INSERT INTO item VALUES ('intruder')"),
                lambda: of_server.fetchmany(2),
                lambda: driver.set_autocommit(True),
                lambda: driver.cursor().execute("INSERT INTO item VALUES ('intruder')"),
            ]
            for use in uses:
                with pytest.raises(psycopg.InterfaceError, match="released back to the pool"):
                    await use()
        # psycopg would warn of this open cursor, which the application has kept.
        of_server._close()
    assert await database.names() == ["copied", "innocent"]


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_stand_in_of_psycopgs_connection_can_be_thrown_away(database: Database) -> None:
    async with database.connect(pool_size=1) as db:
        for number in range(3):
            async with new_db_ctx():
                driver = await driver_connection_of(await db_session(db))
                await driver.execute(f"INSERT INTO item VALUES ('{number}')")
                del driver
                gc.collect()
    assert await database.names() == ["0", "1", "2"]


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_streamed_result_that_is_cancelled_leaves_no_cursor_open(db: DBConnect, database: Database) -> None:
    async def read() -> None:
        async with new_db_ctx():
            async for _ in await (await db_session(db)).stream(ROWS, execution_options={"yield_per": 50}):
                pass

    for steps in range(15):
        with anyio.CancelScope() as scope:
            loop = asyncio.get_running_loop()
            after_steps(loop, steps, scope.cancel)
            await read()
        # psycopg warns of a cursor that is thrown away open, and the tests take a warning for an error.
        gc.collect()
        assert database.checked_out == 0


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
async def test_a_cancelled_result_of_sqlite_leaves_the_database_unlocked(db: DBConnect, database: Database) -> None:
    is_reading = asyncio.Event()

    async def read() -> None:
        async with new_db_ctx():
            session = await insert(db, "one")
            async for _ in await session.stream(ROWS, execution_options={"yield_per": 1}):
                is_reading.set()

    task = asyncio.create_task(read())
    await is_reading.wait()
    task.cancel()
    await asyncio.wait([task])
    # The task has the traceback of its error, and that has the cursor.
    assert task.cancelled()
    async with new_db_ctx():
        await insert(db, "two")
    assert await database.names() == ["two"]


def after_steps(loop: asyncio.AbstractEventLoop, steps: int, callback: Callable[[], object]) -> None:
    """Call `callback` after so many turns of the event loop."""
    if steps == 0:
        callback()
    else:
        loop.call_soon(after_steps, loop, steps - 1, callback)


async def test_a_connection_can_be_lent_again(database: Database) -> None:
    async with database.connect(pool_size=1) as db:
        for number in range(3):
            async with new_db_ctx():
                driver = await driver_connection_of(await db_session(db))
                await driver.execute(f"INSERT INTO item VALUES ('{number}')")
    assert await database.names() == ["0", "1", "2"]
