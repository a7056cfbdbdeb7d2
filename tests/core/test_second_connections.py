"""Code that holds a connection and takes a second one: as many at once as the pool has connections stand still."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tests.support.database import Database, insert

from ctxdb_core import (
    DBConnect,
    TransactionContext,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
    transactional,
)

pytestmark = pytest.mark.postgresql


@pytest.fixture
async def db(database: Database) -> AsyncIterator[DBConnect]:
    async with DBConnect(
        lambda host: database.watch_new(pool_size=2, max_overflow=0, pool_timeout=0.3), host="127.0.0.1"
    ) as db:
        yield db


async def audit(db: DBConnect) -> None:
    await insert(db, "entry")


async def by_run_in_new_ctx(db: DBConnect) -> None:
    await run_in_new_ctx(audit, db)


async def by_new_db_ctx(db: DBConnect) -> None:
    async with new_db_ctx():
        await audit(db)


async def by_requires_new(db: DBConnect) -> None:
    async with transactional(db, "requires_new"):
        await audit(db)


async def by_new_transaction(db: DBConnect) -> None:
    async with TransactionContext(db).new_transaction():
        await audit(db)


async def by_new_non_ctx_session(db: DBConnect) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(text("SELECT 1"))


async def by_another_database_on_the_same_engine(db: DBConnect) -> None:
    await (await db_session(DBConnect.from_engine(await db.engine()))).execute(text("SELECT 1"))


WAYS = [
    by_another_database_on_the_same_engine,
    by_run_in_new_ctx,
    by_new_db_ctx,
    by_requires_new,
    by_new_transaction,
    by_new_non_ctx_session,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_the_time_out_names_the_units_that_wait_and_the_code(
    db: DBConnect, way: Callable[[DBConnect], Awaitable[None]]
) -> None:
    both_hold = asyncio.Barrier(2)

    async def order() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))
            await both_hold.wait()
            await way(db)

    errors = await asyncio.gather(order(), order(), return_exceptions=True)
    told = [str(each) for each in errors if isinstance(each, PoolTimeoutError)]
    assert told
    assert any("2 units of work hold a connection of this pool and wait for a second one" in each for each in told)
    assert all(__file__ in each and "await commit_db_session(db)" in each for each in told)


async def test_the_call_that_takes_the_second_connection_is_named(
    db: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_db_ctx():
        await (await db_session(db)).execute(text("SELECT 1"))
        await by_run_in_new_ctx(db)
    (warning,) = caplog.messages
    assert "by run_in_new_ctx() in by_run_in_new_ctx() at" in warning


async def test_a_line_that_takes_second_connections_is_warned_of_once(
    db: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))
            async with new_non_ctx_session(db) as session:
                await session.execute(text("SELECT 1"))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("ctxdb", logging.WARNING)
    assert __file__ in record.getMessage()


async def test_code_that_has_given_its_connection_back_is_not_warned_of(
    db: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_db_ctx():
        await insert(db, "order")
        await commit_db_session(db)
        await by_run_in_new_ctx(db)
    assert caplog.messages == []


async def test_a_pool_that_is_merely_too_small_says_what_sqlalchemy_says(db: DBConnect) -> None:
    async def hold(errors: list[str]) -> None:
        async with new_db_ctx():
            try:
                await (await db_session(db)).execute(text("SELECT pg_sleep(0.6)"))
            except PoolTimeoutError as exc:
                errors.append(str(exc))

    errors: list[str] = []
    await asyncio.gather(*(hold(errors) for _ in range(3)))
    (error,) = errors
    assert "QueuePool limit" in error
    assert "second" not in error
