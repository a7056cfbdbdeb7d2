"""A statement that is interrupted or fails, and what the others of its transaction are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import DateTime, Executable, func, literal, literal_column, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.util import greenlet_spawn
from tests.support.database import Database, Item, insert

from ctxdb_core import (
    DBConnect,
    StatementInterruptedError,
    TransactionAbortedError,
    UnexpectedRollbackError,
    commit_db_session,
    db_session,
    new_db_ctx,
    on_begin,
    on_commit,
    on_rollback,
    rollback_db_session,
    transactional,
)
from ctxdb_core._sqlalchemy.reading_functions import may_leave_work
from ctxdb_core._sqlalchemy.traced_session import MOST_READS

POSTGRESQL = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)


async def suggestions(db: DBConnect) -> list[str]:
    session = await db_session(db)
    # The time limit is to meet the slow statement, and not the opening of a connection.
    await session.execute(text("SELECT 1"))
    try:
        async with asyncio.timeout(0.05):
            await session.execute(text("SELECT pg_sleep(300)"))
    except TimeoutError:
        return []
    raise AssertionError("not reached")


@POSTGRESQL
async def test_a_unit_that_has_only_read_answers_its_fallback(db: DBConnect) -> None:
    async with new_db_ctx():
        assert await suggestions(db) == []


@POSTGRESQL
async def test_a_unit_that_has_only_read_goes_on_after_its_fallback(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        assert await suggestions(db) == []
        await insert(db, "after the fallback")
    assert await database.names() == ["after the fallback"]


@POSTGRESQL
async def test_what_was_loaded_stays_readable_after_the_fallback(db: DBConnect, database: Database) -> None:
    await database.query("INSERT INTO item VALUES ('loaded') RETURNING 1")
    async with new_db_ctx():
        item = await (await db_session(db)).get_one(Item, "loaded")
        await suggestions(db)
        assert await (await db_session(db)).scalar(text("SELECT 1")) == 1
        assert item.name == "loaded"


@POSTGRESQL
@pytest.mark.parametrize("in_savepoint", [True, False])
async def test_what_is_added_and_changed_after_the_fallback_is_stored(
    db: DBConnect, database: Database, in_savepoint: bool
) -> None:
    await database.query("INSERT INTO item VALUES ('old') RETURNING 1")
    async with new_db_ctx():
        session = await db_session(db)
        item = await session.get_one(Item, "old")
        if in_savepoint:
            with suppress(TimeoutError):
                async with session.begin_nested(), asyncio.timeout(0.05):
                    await session.execute(text("SELECT pg_sleep(300)"))
        else:
            await suggestions(db)
        session.add(Item(name="added"))
        item.name = "changed"
    assert await database.names() == ["added", "changed"]


SLOW = text("SELECT pg_sleep(300)")


@pytest.mark.parametrize(
    "call",
    [
        lambda session: session.run_sync(lambda sync_session: sync_session.execute(SLOW)),
        # As attributes of `AsyncAttrs` are loaded: past the session.
        lambda session: greenlet_spawn(session.sync_session.execute, SLOW),
    ],
    ids=["run_sync", "own_greenlet"],
)
async def test_what_is_added_after_any_other_call_that_was_given_up_is_stored(
    db: DBConnect, database: Database, call: Callable[[AsyncSession], Awaitable[object]]
) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await call(session)
        session.add(Item(name="added"))
    assert await database.names() == ["added"]


async def test_on_commit_waits_for_the_transaction_that_goes_on_after_the_fallback(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        on_commit(db, lambda: seen.append("committed"))
        on_rollback(db, lambda: seen.append("rolled back"))
        await suggestions(db)
        await insert(db, "after the fallback")
    assert seen == ["committed"]


@POSTGRESQL
async def test_an_attribute_is_loaded_on_demand_after_the_fallback(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await suggestions(db)
        # As attributes of `AsyncAttrs` are loaded: past the session.
        assert await greenlet_spawn(session.sync_session.scalar, text("SELECT 1")) == 1


async def test_on_rollback_is_called_by_a_roll_back_of_the_sessions_own_after_the_fallback(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        on_commit(db, lambda: seen.append("committed"))
        on_rollback(db, lambda: seen.append("rolled back"))
        await suggestions(db)
        await (await db_session(db)).rollback()
    assert seen == ["rolled back"]


async def test_what_on_begin_sets_is_set_again_after_the_fallback(db: DBConnect, database: Database) -> None:
    async def set_application(session: AsyncSession) -> None:
        await session.execute(text("SET LOCAL application_name = 'set again'"))

    async with new_db_ctx():
        on_begin(db, set_application)
        await suggestions(db)
        session = await insert(db, "after the fallback")
        assert await session.scalar(text("SHOW application_name")) == "set again"
    assert await database.names() == ["after the fallback"]


async def test_what_on_begin_writes_is_lost_work(db: DBConnect) -> None:
    async def note(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO item VALUES ('noted')"))

    with pytest.raises(StatementInterruptedError, match="pg_sleep"):
        async with new_db_ctx():
            on_begin(db, note)
            await suggestions(db)


async def test_half_of_a_joined_block_is_not_stored_after_its_fallback(db: DBConnect, database: Database) -> None:
    with pytest.raises(UnexpectedRollbackError):
        async with new_db_ctx():
            session = await db_session(db)
            with suppress(LookupError):
                async with transactional(db):
                    await suggestions(db)
                    session.add(Item(name="half"))
                    raise LookupError
            await session.execute(text("SELECT 1"))
    assert await database.names() == []


async def test_a_roll_back_takes_what_a_failed_joined_block_has_doomed(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        with suppress(LookupError):
            async with transactional(db):
                await suggestions(db)
                raise LookupError
        await rollback_db_session(db)
        await insert(db, "new")
    assert await database.names() == ["new"]


@POSTGRESQL
async def test_a_block_that_goes_on_after_its_fallback_is_told_what_was_interrupted(db: DBConnect) -> None:
    with pytest.raises(StatementInterruptedError, match="pg_sleep"):
        async with new_db_ctx():
            session = await db_session(db)
            async with session.begin_nested():
                await suggestions(db)


@POSTGRESQL
@pytest.mark.parametrize("by_block", [True, False])
async def test_a_session_that_has_only_read_can_be_closed_after_its_fallback(db: DBConnect, by_block: bool) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await suggestions(db)
        if by_block:
            async with session:
                pass
        else:
            await session.close()
        assert await session.scalar(text("SELECT 1")) == 1


@POSTGRESQL
async def test_what_is_added_after_rows_that_took_too_long_is_stored(db: DBConnect, database: Database) -> None:
    # Both drivers have fetched the first rows by then.
    slow = text("SELECT i, CASE WHEN i > 100 THEN pg_sleep(300) END FROM generate_series(1, 3000) i")
    seen = 0
    async with new_db_ctx():
        session = await db_session(db)
        rows = await session.stream(slow)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                async for _ in rows:
                    seen += 1
        session.add(Item(name="added"))
    assert seen
    assert await database.names() == ["added"]


async def test_a_unit_that_has_only_read_ends_well_after_rows_that_took_too_long(db: DBConnect) -> None:
    async with new_db_ctx():
        rows = await (await db_session(db)).stream(text("SELECT pg_sleep(300) FROM generate_series(1, 2)"))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(rows)


@POSTGRESQL
async def test_a_commit_of_lost_work_names_the_interrupted_statement(db: DBConnect, database: Database) -> None:
    with pytest.raises(StatementInterruptedError, match=r"pg_sleep\(300\).*rollback_db_session"):
        async with new_db_ctx():
            await insert(db, "lost")
            await suggestions(db)
    assert await database.names() == []


@pytest.fixture
async def writing_function(database: Database) -> AsyncIterator[None]:
    """Provide a function of the database that inserts an item."""
    await database.query(
        "CREATE FUNCTION write(name text) RETURNS int LANGUAGE sql AS 'INSERT INTO item VALUES ($1) RETURNING 1'"
    )
    await database.query("CREATE SCHEMA app")
    await database.query("CREATE FUNCTION app.log(name text) RETURNS int LANGUAGE sql AS 'SELECT public.write(name)'")
    yield
    await database.query("DROP SCHEMA app CASCADE")
    await database.query("DROP FUNCTION write")


@pytest.mark.parametrize(
    "call",
    [
        text("SELECT write('a')"),
        text('SELECT i FROM generate_series(1, 2) i WHERE "write"(i::text) > 0'),
        select(func.write("a")),
        select(literal_column("write('a')")),
        select(literal(1)).where(func.write("a") > 0),
        select(func.app.log("a")),
        text("SELECT app.log('a')"),
        text("""SELECT item.name FROM item RIGHT JOIN "app" . log('a') ON true"""),
    ],
    ids=range(8),
)
@pytest.mark.usefixtures("writing_function")
async def test_a_function_that_writes_is_lost_work(db: DBConnect, database: Database, call: Executable) -> None:
    with pytest.raises(StatementInterruptedError):
        async with new_db_ctx():
            session = await db_session(db)
            await session.execute(call)
            await suggestions(db)
    assert await database.names() == []


class Utcnow(FunctionElement[Any]):
    """A construct of the application's, which has no name of a function."""

    inherit_cache = True
    type = DateTime()


@compiles(Utcnow, "postgresql")
def compile_utcnow(element: Utcnow, compiler: Any, **options: Any) -> str:
    return "timezone('utc', now())"


@pytest.mark.parametrize(
    "statement",
    [
        select(func.count(), func.lower("A"), func.now(), Utcnow()).where(literal(1).in_([1, 2])),
        select(func.jsonb_array_length(func.jsonb_build_array(1)), func.age(func.now()), func.current_setting("port")),
        select(func.generate_series(1, 2).column_valued("i")),
        text("SELECT max(i) FROM generate_series(1, 3) AS i WHERE i IN (1, 2)"),
        text("SELECT 'see write (later)', (1 + 2), CAST(1.5 AS decimal(10, 2)), 1.5::numeric(3, 1) -- or write (now)"),
        text("WITH RECURSIVE tree(id) AS (SELECT 1) SELECT id FROM tree"),
        text("SELECT a FROM (VALUES (1, 2)) AS pair(a, b), unnest(ARRAY[1]) AS u(c)"),
        text('SELECT 1 AS "write (now)", pg_catalog.version()'),
        select(func.pg_catalog.version()),
        text("SELECT substring('text' FOR (1 + 1)), 'locked FOR UPDATE'"),
    ],
    ids=range(10),
)
async def test_functions_that_are_known_to_write_nothing_are_reading(db: DBConnect, statement: Executable) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(statement)
        assert await suggestions(db) == []


async def test_many_statements_that_read_are_no_lost_work(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        for _ in range(MOST_READS + 1):
            await session.execute(text("SELECT 1"))
        assert await suggestions(db) == []


@pytest.mark.parametrize(
    "statement",
    [
        select(Item).with_for_update(),
        select(Item.name).where(Item.name.in_(select(Item.name).with_for_update(read=True))),
        text("SELECT name FROM item FOR NO KEY UPDATE SKIP LOCKED"),
        text("SELECT name FROM item FOR KEY SHARE"),
    ],
    ids=range(4),
)
async def test_locks_of_rows_are_lost_work(db: DBConnect, database: Database, statement: Executable) -> None:
    await database.query("INSERT INTO item VALUES ('locked') RETURNING 1")
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(statement)
        await suggestions(db)
        # Another transaction may have changed the row meanwhile.
        with pytest.raises(StatementInterruptedError):
            await session.execute(text("UPDATE item SET name = 'changed'"))
        await session.rollback()


@pytest.mark.usefixtures("writing_function")
async def test_a_function_that_writes_is_lost_work_behind_many_statements_that_read(db: DBConnect) -> None:
    with pytest.raises(StatementInterruptedError):
        async with new_db_ctx():
            session = await db_session(db)
            await session.execute(select(func.write("a")))
            for _ in range(MOST_READS + 1):
                await session.execute(text("SELECT 1"))
            await suggestions(db)


@POSTGRESQL
@pytest.mark.usefixtures("writing_function")
async def test_a_function_that_writes_is_lost_work_behind_the_result_that_took_too_long(db: DBConnect) -> None:
    slow = text("SELECT i, CASE WHEN i > 100 THEN pg_sleep(300) END FROM generate_series(1, 3000) i")
    with pytest.raises(StatementInterruptedError):
        async with new_db_ctx():
            session = await db_session(db)
            rows = await session.stream(slow)
            await session.execute(select(func.write("a")))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    async for _ in rows:
                        pass


@pytest.mark.usefixtures("writing_function")
@pytest.mark.parametrize("begins", [True, False], ids=["begin", "autobegin"])
@pytest.mark.parametrize("reads", [0, MOST_READS], ids=["kept", "looked_through"])
async def test_a_function_that_has_written_in_an_earlier_transaction_is_no_lost_work(
    db: DBConnect, database: Database, reads: int, begins: bool
) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(select(func.write("stays")))
        for _ in range(reads):
            await session.execute(text("SELECT 1"))
        await session.commit()
        if begins:
            await session.begin()
        await suggestions(db)
    assert await database.names() == ["stays"]


@POSTGRESQL
@pytest.mark.usefixtures("writing_function")
async def test_a_function_that_writes_in_autocommit_is_no_lost_work(db: DBConnect, database: Database) -> None:
    async with transactional(db, "not_supported"):
        session = await db_session(db)
        await session.execute(select(func.write("stays")))
        await suggestions(db)
        await insert(db, "after the fallback")
    assert await database.names() == ["after the fallback", "stays"]


def test_a_long_literal_is_looked_through_once() -> None:
    # One look at each rest of it would take minutes.
    assert not may_leave_work(text(f"SELECT {'a' * 1_000_000}"), make_url("postgresql+psycopg://").get_dialect()())


async def test_a_function_that_was_interrupted_itself_is_no_lost_work(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await session.execute(text("SELECT pg_catalog.pg_sleep(300)"))
        await session.execute(text("SELECT 1"))


@POSTGRESQL
async def test_the_next_statement_after_lost_work_names_the_interrupted_statement(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert(db, "lost")
        await suggestions(db)
        with pytest.raises(StatementInterruptedError, match=r"pg_sleep\(300\)"):
            await insert(db, "refused")
        await rollback_db_session(db)
        await insert(db, "kept")
        await commit_db_session(db)
    assert await database.names() == ["kept"]


@POSTGRESQL
async def test_the_siblings_of_a_failed_statement_are_told_of_the_failure(db: DBConnect) -> None:
    async def resolve(statement: str) -> None:
        await (await db_session(db)).execute(text(statement))

    with pytest.raises(TransactionAbortedError, match=r"SELECT 1 / 0.*division by zero"):
        async with new_db_ctx():
            results = await asyncio.gather(
                resolve("SELECT 1"),
                resolve("SELECT 1 / 0"),
                resolve("SELECT 2"),
                resolve("SELECT 3"),
                return_exceptions=True,
            )
    assert [type(result) for result in results[:1]] == [type(None)]
    assert isinstance(results[1], DBAPIError)
    for result in results[2:]:
        assert isinstance(result, DBAPIError)
        assert "aborted by the statement 'SELECT 1 / 0'" in str(result)
        assert "division by zero" in str(result)


@POSTGRESQL
async def test_the_failure_of_a_gathered_task_leaves_the_process_and_the_pool_well(
    db: DBConnect, database: Database
) -> None:
    async def resolve(number: int) -> object:
        statement = "SELECT 1 / 0" if number == 3 else "SELECT pg_sleep(0.001)"
        return await (await db_session(db)).execute(text(statement))

    for _ in range(8):
        with pytest.raises(DBAPIError):
            async with new_db_ctx():
                await asyncio.gather(*(resolve(number) for number in range(8)))
    await database.assert_quiet()
