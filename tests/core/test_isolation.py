"""Isolation level and read-only, for one transaction."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from tests.support.database import Database, Item, insert

from ctxdb_core import (
    DBConnect,
    TransactionAlreadyActiveError,
    TransactionOptionsError,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
)
from ctxdb_core.adapters import CurrentTransaction, IsolationLevel

POSTGRESQL = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
MODES: tuple[CurrentTransaction, ...] = ("commit", "rollback", "append", "raise", "savepoint")


async def level_of(session: AsyncSession) -> str:
    level: str = await session.scalar(text("SHOW transaction_isolation"))
    return level


async def is_read_only(session: AsyncSession) -> bool:
    sqlite = session.get_bind().dialect.name == "sqlite"
    answer = await session.scalar(text("PRAGMA query_only" if sqlite else "SHOW transaction_read_only"))
    return answer in ("on", 1)


@pytest.fixture
async def db(database: Database, db: DBConnect) -> DBConnect:
    """A pool of one connection, so that a setting which was left on it is seen by the next transaction."""
    if not database.is_postgresql:
        return db
    return DBConnect(lambda host: database.watch_new(pool_size=1), host="127.0.0.1")


@POSTGRESQL
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_a_level_holds_for_one_transaction(db: DBConnect, level: IsolationLevel) -> None:
    async with db:
        async with new_db_ctx():
            async with atomic_db_session(db, isolation_level=level) as session:
                assert await level_of(session) == level.lower()
            assert await level_of(session) == "read committed"
        async with new_db_ctx():
            assert await level_of(await db_session(db)) == "read committed"


@POSTGRESQL
async def test_a_level_ends_with_an_early_commit(db: DBConnect) -> None:
    async with db, new_db_ctx(), atomic_db_session(db, isolation_level="SERIALIZABLE") as session:
        await level_of(session)
        await commit_db_session(db)
        assert await level_of(session) == "read committed"


@KINDS
async def test_a_read_only_transaction_refuses_writes_and_the_next_one_takes_them(
    db: DBConnect, database: Database
) -> None:
    async with db:
        async with new_db_ctx():
            with pytest.raises(DBAPIError, match=r"read-only|readonly"):
                async with atomic_db_session(db, read_only=True):
                    await insert(db, "refused")
            async with atomic_db_session(db, read_only=True) as session:
                assert await session.scalar(text("SELECT count(*) FROM item")) == 0
            await insert(db, "one")
        async with new_db_ctx():
            await insert(db, "two")
    assert await database.names() == ["one", "two"]


@POSTGRESQL
async def test_a_read_only_transaction_leaves_the_servers_default_alone(db: DBConnect, database: Database) -> None:
    # A hot standby has this default, and refuses every BEGIN READ WRITE.
    await database.query(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    try:
        async with db:
            for _ in range(2):
                async with new_db_ctx():
                    async with atomic_db_session(db, read_only=True):
                        await is_read_only(await db_session(db))
                    assert await is_read_only(await db_session(db))
    finally:
        await database.query("SET default_transaction_read_only = off")
        await database.query(f"ALTER DATABASE {database.name} RESET default_transaction_read_only")


@POSTGRESQL
async def test_an_isolation_level_and_read_only_can_be_had_together(db: DBConnect) -> None:
    async with db, new_db_ctx(), atomic_db_session(db, isolation_level="REPEATABLE READ", read_only=True) as session:
        assert await level_of(session) == "repeatable read"
        assert await is_read_only(session)


@POSTGRESQL
@pytest.mark.parametrize("mode", MODES)
async def test_every_mode_begins_a_transaction_with_the_level(db: DBConnect, mode: CurrentTransaction) -> None:
    async with db, new_db_ctx(), atomic_db_session(db, mode, isolation_level="SERIALIZABLE", read_only=True) as session:
        assert await level_of(session) == "serializable"
        assert await is_read_only(session)


@POSTGRESQL
@pytest.mark.parametrize("mode", ["commit", "rollback"])
async def test_an_open_transaction_is_ended_before_a_transaction_with_a_level(
    db: DBConnect, database: Database, mode: CurrentTransaction
) -> None:
    async with db, new_db_ctx():
        await insert(db, "open")
        async with atomic_db_session(db, mode, isolation_level="SERIALIZABLE") as session:
            assert await level_of(session) == "serializable"
    assert await database.names() == (["open"] if mode == "commit" else [])


@POSTGRESQL
@pytest.mark.parametrize("mode", ["append", "savepoint"])
async def test_an_open_transaction_of_another_level_is_an_error_and_stays(
    db: DBConnect, database: Database, mode: CurrentTransaction
) -> None:
    async with db, new_db_ctx():
        await insert(db, "open")
        with pytest.raises(TransactionOptionsError, match=r"'READ COMMITTED'.*commit_db_session.*run_in_new_ctx"):
            async with atomic_db_session(db, mode, isolation_level="SERIALIZABLE"):
                pytest.fail("the block was entered")
        await insert(db, "still open")
    assert await database.names() == ["open", "still open"]


@KINDS
@pytest.mark.parametrize("mode", ["append", "savepoint"])
async def test_an_open_transaction_that_may_write_is_an_error_and_stays(
    db: DBConnect, database: Database, mode: CurrentTransaction
) -> None:
    async with db, new_db_ctx():
        await insert(db, "open")
        with pytest.raises(TransactionOptionsError, match="may write"):
            async with atomic_db_session(db, mode, read_only=True):
                pytest.fail("the block was entered")
    assert await database.names() == ["open"]


@POSTGRESQL
@pytest.mark.parametrize("mode", ["append", "savepoint"])
async def test_an_open_transaction_of_the_same_level_is_joined(db: DBConnect, mode: CurrentTransaction) -> None:
    async with db, new_db_ctx(), atomic_db_session(db, isolation_level="SERIALIZABLE", read_only=True) as session:
        await level_of(session)
        async with atomic_db_session(db, mode, isolation_level="SERIALIZABLE", read_only=True):
            assert await level_of(session) == "serializable"


@POSTGRESQL
@pytest.mark.parametrize("mode", ["append", "savepoint"])
async def test_isolation_level_can_be_chosen_while_objects_are_only_added(
    db: DBConnect, database: Database, mode: CurrentTransaction
) -> None:
    async with db, new_db_ctx():
        (await db_session(db)).add(Item(name="added"))
        async with atomic_db_session(db, mode, isolation_level="SERIALIZABLE") as session:
            assert await level_of(session) == "serializable"
    assert await database.names() == ["added"]


@KINDS
async def test_a_read_only_savepoint_as_the_first_work_of_a_unit_leaves_the_rest_writable(
    db: DBConnect, database: Database
) -> None:
    async with db, new_db_ctx():
        async with atomic_db_session(db, "savepoint", read_only=True) as session:
            await session.execute(text("SELECT 1"))
        await insert(db, "written")
    assert await database.names() == ["written"]


async def test_an_open_transaction_is_still_an_error_if_asked(db: DBConnect) -> None:
    async with db, new_db_ctx():
        await insert(db, "open")
        with pytest.raises(TransactionAlreadyActiveError):
            async with atomic_db_session(db, "raise", isolation_level="SERIALIZABLE"):
                pytest.fail("the block was entered")


@KINDS
@pytest.mark.parametrize("level", ["SNAPSHOT", "AUTOCOMMIT", "serializable"])
async def test_an_unknown_level_is_an_error_before_anything_is_lost(
    db: DBConnect, database: Database, level: IsolationLevel
) -> None:
    async with db, new_db_ctx():
        await insert(db, "open")
        with pytest.raises(ValueError, match="SERIALIZABLE"):
            async with atomic_db_session(db, "rollback", isolation_level=level):
                pytest.fail("the block was entered")
    assert await database.names() == ["open"]


@SQLITE
async def test_a_level_that_the_database_does_not_have_is_an_error_before_anything_is_lost(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert(db, "open")
        with pytest.raises(ValueError, match="sqlite"):
            async with atomic_db_session(db, "rollback", isolation_level="REPEATABLE READ"):
                pytest.fail("the block was entered")
    assert await database.names() == ["open"]


@SQLITE
async def test_sqlite_has_its_two_levels(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        async with atomic_db_session(db, isolation_level="SERIALIZABLE") as session:
            assert await session.scalar(text("PRAGMA read_uncommitted")) == 0
            await insert(db, "one")
        async with atomic_db_session(db, isolation_level="READ UNCOMMITTED") as session:
            assert await session.scalar(text("PRAGMA read_uncommitted")) == 1
            await insert(db, "two")
        assert await session.scalar(text("PRAGMA read_uncommitted")) == 0
    assert await database.names() == ["one", "two"]


@SQLITE
async def test_a_level_differs_from_the_engines_own(database: Database) -> None:
    db = DBConnect(lambda host: database.watch_new(isolation_level="READ UNCOMMITTED"), host="a")
    async with db, new_db_ctx():
        async with atomic_db_session(db, isolation_level="SERIALIZABLE") as session:
            assert await session.scalar(text("PRAGMA read_uncommitted")) == 0
        assert await session.scalar(text("PRAGMA read_uncommitted")) == 1


@KINDS
async def test_a_read_only_database_takes_no_level_and_is_read_only_already(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as db, new_db_ctx():
        with pytest.raises(TransactionOptionsError, match="autocommit"):
            async with atomic_db_session(db, isolation_level="SERIALIZABLE"):
                pytest.fail("the block was entered")
        async with atomic_db_session(db, read_only=True) as session:
            assert await is_read_only(session)
        assert await is_read_only(session)


async def test_an_engine_in_autocommit_has_no_read_only_transactions(database: Database) -> None:
    db = DBConnect(lambda host: database.watch_new(isolation_level="AUTOCOMMIT"), host="a")
    async with db, new_db_ctx():
        with pytest.raises(TransactionOptionsError, match="from_url"):
            async with atomic_db_session(db, read_only=True):
                pytest.fail("the block was entered")


async def test_a_transaction_that_cannot_be_begun_leaves_nothing_behind(db: DBConnect, database: Database) -> None:
    async with db, new_db_ctx():
        with pytest.raises(DBAPIError):
            async with atomic_db_session(db, isolation_level="SERIALIZABLE"):
                await (await db_session(db)).execute(text("SELECT * FROM nowhere"))
        assert database.checked_out == 0


async def test_a_session_on_a_connection_of_other_code_takes_the_transaction_as_it_is(database: Database) -> None:
    engine = database.watch_new()
    async with engine.connect() as connection, connection.begin() as outer:

        def on_connection(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
            return async_sessionmaker(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)

        db = DBConnect(lambda host: engine, on_connection, host="a")
        async with new_db_ctx(), atomic_db_session(db, isolation_level="SERIALIZABLE", read_only=True):
            await insert(db, "of a test")
        await outer.rollback()
    await db.close()
    assert await database.names() == []
