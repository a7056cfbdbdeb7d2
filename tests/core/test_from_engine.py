"""`DBConnect.from_engine`: an engine that there is already, which its owner disposes of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool
from tests.support.database import Database, Item, eventually

from ctxdb_core import DBConnect, TransactionAbortedError, db_session, new_db_ctx
from ctxdb_core.testing import shared_transaction


@pytest.fixture
async def engine(database: Database) -> AsyncIterator[AsyncEngine]:
    engine = database.watch_new()
    yield engine
    await engine.dispose()


async def test_sessions_are_on_the_engine(engine: AsyncEngine, database: Database) -> None:
    db = DBConnect.from_engine(engine)
    async with new_db_ctx():
        session = await db_session(db)
        assert session.bind is engine
        session.add(Item(name="one"))
    assert await database.names() == ["one"]
    assert await db.engine() is engine


async def test_close_leaves_the_engine_to_its_owner(engine: AsyncEngine, database: Database) -> None:
    async with DBConnect.from_engine(engine) as db, new_db_ctx():
        await (await db_session(db)).execute(text("SELECT 1"))
    connections = database.connections
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    assert database.connections == connections


async def test_a_second_event_loop_gets_an_engine_like_the_given_one(engine: AsyncEngine, database: Database) -> None:
    db = DBConnect.from_engine(engine)

    async def use(name: str) -> AsyncEngine:
        async with new_db_ctx():
            (await db_session(db)).add(Item(name=name))
        return await db.engine()

    assert await use("first") is engine
    other = await asyncio.to_thread(asyncio.run, use("second"))
    assert other is not engine
    assert await use("third") is engine
    assert sorted(await database.names()) == ["first", "second", "third"]
    if database.is_postgresql:
        await eventually(lambda: len(database.backends("true")) == 1, "the other loop's connection is still open")


async def test_an_engine_without_a_pool_serves_every_event_loop(database: Database) -> None:
    engine = create_async_engine(database.url, poolclass=NullPool)
    db = DBConnect.from_engine(engine)
    assert await db.engine() is engine
    assert await asyncio.to_thread(asyncio.run, db.engine()) is engine


async def test_sessions_are_made_by_the_users_session_maker(engine: AsyncEngine) -> None:
    db = DBConnect.from_engine(
        engine, session_maker_creator=lambda engine: async_sessionmaker(engine, info={"mine": True})
    )
    session = await db.create_session()
    assert session.info == {"mine": True}
    await session.close()


async def test_the_engine_gets_the_guards(database: Database, engine: AsyncEngine) -> None:
    if not database.is_postgresql:
        pytest.skip("SQLite does not abort transactions")
    db = DBConnect.from_engine(engine)
    with pytest.raises(TransactionAbortedError):
        async with new_db_ctx():
            session = await db_session(db)
            session.add(Item(name="one"))
            await session.flush()
            with pytest.raises(IntegrityError):
                await session.execute(text("INSERT INTO item VALUES ('one')"))


async def test_the_engine_is_part_of_a_shared_transaction(engine: AsyncEngine, database: Database) -> None:
    db = DBConnect.from_engine(engine)
    async with shared_transaction(db), new_db_ctx():
        (await db_session(db)).add(Item(name="one"))
    assert await database.names() == []
    # Its owner could not close a connection that belongs to the loop of the shared transaction, which has ended.
    assert await db.engine() is engine


async def test_a_host_change_does_nothing(engine: AsyncEngine) -> None:
    db = DBConnect.from_engine(engine)
    await db.change_host("elsewhere")
    assert await db.engine() is engine


def test_repr_shows_the_host_and_no_password() -> None:
    db = DBConnect.from_engine(create_async_engine("postgresql+asyncpg://u:secret@db.example/shop"))
    assert repr(db) == "<DBConnect host='db.example'>"
    assert "secret" not in repr(db.lazy_session_maker)


async def test_a_creator_without_a_parameter_needs_no_host(database: Database) -> None:
    async with DBConnect(lambda: database.watch_new()) as db:  # noqa: PLW0108 - the method takes options
        async with new_db_ctx():
            session: AsyncSession = await db_session(db)
            session.add(Item(name="one"))
        assert db.host
        with pytest.raises(ValueError, match="takes no host"):
            await db.change_host("elsewhere")
    assert await database.names() == ["one"]
