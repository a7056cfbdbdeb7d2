"""How long the statements of a unit of work may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from tests.support.database import Database, Item, insert

from ctxdb_core import (
    ContextNotInitiatedError,
    CtxDBError,
    DBConnect,
    DeadlineExceededError,
    UnexpectedRollbackError,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    set_statement_timeout,
)

POSTGRESQL = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)

# Counts for hours.
ENDLESS = text(
    "WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 100000000000) "
    "SELECT count(*) FROM number"
)


@pytest.fixture
async def db(database: Database) -> AsyncIterator[DBConnect]:
    """A pool of one connection, so that a limit which was left on it is seen by the next transaction."""
    options = {"pool_size": 1} if database.is_postgresql else {}
    async with DBConnect(lambda host: database.watch_new(**options), host="127.0.0.1") as db:
        yield db
        await database.assert_quiet()


def now() -> float:
    return asyncio.get_running_loop().time()


async def timeout_of(session: AsyncSession) -> str:
    timeout: str = await session.scalar(text("SHOW statement_timeout"))
    return timeout


@POSTGRESQL
async def test_each_transaction_of_the_unit_has_the_timeout_and_none_after_it(db: DBConnect) -> None:
    async with new_db_ctx(statement_timeout=1.5):
        session = await db_session(db)
        assert await timeout_of(session) == "1500ms"
        await commit_db_session(db)
        assert await timeout_of(session) == "1500ms"
    async with new_db_ctx():
        assert await timeout_of(await db_session(db)) == "0"


@POSTGRESQL
async def test_a_statement_that_takes_too_long_fails_and_the_unit_is_rolled_back(
    db: DBConnect, database: Database
) -> None:
    with pytest.raises(DBAPIError) as caught:
        async with new_db_ctx(statement_timeout=0.2):
            session = await insert(db, "one")
            await session.execute(text("SELECT pg_sleep(60)"))
    assert getattr(caught.value.orig, "sqlstate", None) == "57014"
    assert await database.names() == []
    async with new_db_ctx():
        assert await timeout_of(await db_session(db)) == "0"


@POSTGRESQL
async def test_an_autocommit_connection_has_the_timeout_until_it_goes_back(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True, pool_size=1, max_overflow=0) as db:
        async with new_db_ctx(statement_timeout=0.2):
            session = await db_session(db)
            assert await timeout_of(session) == "200ms"
            with pytest.raises(DBAPIError, match="statement timeout"):
                await session.execute(text("SELECT pg_sleep(60)"))
        async with new_db_ctx():
            assert await timeout_of(await db_session(db)) == "0"


@POSTGRESQL
async def test_a_deadline_leaves_each_transaction_the_time_that_is_left(db: DBConnect) -> None:
    async with new_db_ctx(deadline=now() + 5):
        session = await db_session(db)
        assert 4000 < int((await timeout_of(session)).removesuffix("ms")) < 5000
        await set_statement_timeout(deadline=now() + 0.8)
        await commit_db_session(db)
        assert 400 < int((await timeout_of(session)).removesuffix("ms")) <= 800


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_past_the_deadline_the_database_is_not_touched(db: DBConnect, database: Database) -> None:
    with pytest.raises(DeadlineExceededError, match="deadline"):
        async with new_db_ctx(deadline=now() - 1):
            session = await db_session(db)
            await session.execute(text("SELECT 1"))
    with pytest.raises(DeadlineExceededError):
        async with new_db_ctx(deadline=now() - 1):
            (await db_session(db)).add(Item(name="flushed at the commit"))
    assert database.checkouts == 0


@POSTGRESQL
async def test_past_the_deadline_no_statement_is_sent_and_the_unit_is_rolled_back(
    db: DBConnect, database: Database
) -> None:
    deadline = now() + 0.2
    with pytest.raises(DeadlineExceededError):
        async with new_db_ctx(deadline=deadline):
            session = await insert(db, "one")
            async with session.begin_nested():
                await asyncio.sleep(deadline - now() + 0.01)
                await insert(db, "two")
    assert await database.names() == []


@POSTGRESQL
async def test_timeout_can_be_set_and_lifted_in_the_middle_of_a_transaction(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        assert await timeout_of(session) == "0"
        await set_statement_timeout(2)
        assert await timeout_of(session) == "2s"
        await set_statement_timeout(3, deadline=now() + 60)
        assert await timeout_of(session) == "3s"
        await set_statement_timeout()
        assert await timeout_of(session) == "0"
        await commit_db_session(db)
        assert await timeout_of(session) == "0"


@POSTGRESQL
async def test_timeout_can_be_set_between_two_transactions_of_a_session(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        assert await timeout_of(session) == "0"
        await commit_db_session(db)
        await set_statement_timeout(2)
        assert await timeout_of(session) == "2s"


@POSTGRESQL
async def test_timeout_can_be_set_before_the_first_session(db: DBConnect) -> None:
    async with new_db_ctx():
        await set_statement_timeout(2)
        assert await timeout_of(await db_session(db)) == "2s"


@POSTGRESQL
async def test_timeout_does_not_prevent_a_hand_written_isolation_level(db: DBConnect) -> None:
    async with new_db_ctx(statement_timeout=2):
        session = await db_session(db)
        # Refused by PostgreSQL after any query of the transaction.
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        assert await timeout_of(session) == "2s"


@POSTGRESQL
async def test_timeout_can_be_combined_with_isolation_level_and_read_only(db: DBConnect) -> None:
    async with (
        new_db_ctx(statement_timeout=2),
        atomic_db_session(db, isolation_level="SERIALIZABLE", read_only=True) as session,
    ):
        assert await timeout_of(session) == "2s"
        assert await session.scalar(text("SHOW transaction_read_only")) == "on"


async def test_a_unit_inside_has_no_timeout_of_the_unit_around_it(database: Database) -> None:
    async with database.connect() as db, new_db_ctx(statement_timeout=2), new_db_ctx():
        assert await timeout_of(await db_session(db)) == "0"


async def test_a_transaction_that_other_code_has_begun_keeps_its_limit(database: Database) -> None:
    engine = database.watch_new()
    async with engine.connect() as connection, connection.begin() as outer:
        db = DBConnect(lambda host: engine, lambda engine: async_sessionmaker(connection), host="a")
        async with new_db_ctx(statement_timeout=2):
            assert await timeout_of(await db_session(db)) == "0"
        assert await connection.scalar(text("SHOW statement_timeout")) == "0"
        async with new_db_ctx(deadline=now() - 1):
            with pytest.raises(DeadlineExceededError):
                await timeout_of(await db_session(db))
        await outer.rollback()
    await db.close()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
async def test_a_timeout_that_is_not_positive_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="statement_timeout"):
        async with new_db_ctx(statement_timeout=seconds):
            pytest.fail("the block was entered")


async def test_a_deadline_that_is_no_number_is_refused() -> None:
    with pytest.raises(CtxDBError, match="a str is given as `deadline`"):
        async with new_db_ctx(deadline="2 s"):  # type: ignore[arg-type]  # the mistake
            pytest.fail("the block was entered")


async def test_a_timeout_needs_a_unit_of_work() -> None:
    with pytest.raises(ContextNotInitiatedError):
        await set_statement_timeout(1)


@SQLITE
async def test_a_statement_is_interrupted_on_sqlite(db: DBConnect, database: Database) -> None:
    with pytest.raises(DBAPIError, match="interrupted"):
        async with new_db_ctx(statement_timeout=0.2):
            session = await insert(db, "one")
            await session.execute(ENDLESS)
    assert await database.names() == []


@SQLITE
async def test_timeout_can_be_set_in_the_middle_of_a_transaction_on_sqlite(db: DBConnect, database: Database) -> None:
    with pytest.raises(DBAPIError, match="interrupted"):
        async with new_db_ctx():
            session = await insert(db, "one")
            await set_statement_timeout(0.2)
            await session.execute(ENDLESS)
    assert await database.names() == []


@SQLITE
async def test_half_of_an_interrupted_transaction_cannot_be_committed(db: DBConnect, database: Database) -> None:
    with pytest.raises(UnexpectedRollbackError, match="interrupted"):
        async with new_db_ctx(statement_timeout=0.2):
            session = await insert(db, "before")
            with pytest.raises(DBAPIError, match="interrupted"):
                await session.execute(text(f"INSERT INTO item {ENDLESS}"))
            await insert(db, "after")
    assert await database.names() == []


@SQLITE
async def test_statements_that_are_quick_enough_are_left_alone(db: DBConnect, database: Database) -> None:
    async with new_db_ctx(statement_timeout=0.2):
        await insert(db, "one")
        await asyncio.sleep(0.3)
        await insert(db, "two")
    assert await database.names() == ["one", "two"]
