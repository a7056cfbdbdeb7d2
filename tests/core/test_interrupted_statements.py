"""A statement that is interrupted or fails, and what the others of its transaction are told."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from tests.support.database import Database, Item, insert

from ctxdb_core import (
    DBConnect,
    StatementInterruptedError,
    TransactionAbortedError,
    commit_db_session,
    db_session,
    new_db_ctx,
    rollback_db_session,
)

POSTGRESQL = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)


async def suggestions(db: DBConnect) -> list[str]:
    try:
        async with asyncio.timeout(0.05):
            await (await db_session(db)).execute(text("SELECT pg_sleep(300)"))
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
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
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
async def test_a_commit_of_lost_work_names_the_interrupted_statement(db: DBConnect, database: Database) -> None:
    with pytest.raises(StatementInterruptedError, match=r"pg_sleep\(300\).*rollback_db_session"):
        async with new_db_ctx():
            await insert(db, "lost")
            await suggestions(db)
    assert await database.names() == []


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
