"""`DBConnect.lazy_session_maker`: what libraries get that want a session maker when they are set up."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from tests.support.database import Database, Item

from ctxdb_core import DBConnect, HostNotSetError
from ctxdb_core.testing import shared_transaction


class ShopSession(AsyncSession):
    pass


def make(engine: AsyncEngine) -> async_sessionmaker[ShopSession]:
    return async_sessionmaker(engine, class_=ShopSession, expire_on_commit=False, info={"of": "shop"})


async def test_lazy_sessions_are_of_the_users_class_on_the_current_engine(database: Database) -> None:
    async with DBConnect(lambda host: database.watch_new(), make, host="h") as db:
        maker = db.lazy_session_maker
        assert isinstance(maker, async_sessionmaker)
        async with maker() as session:
            assert isinstance(session, ShopSession)
            assert session.bind is await db.engine()
            assert session.info == {"of": "shop"}
            session.add(Item(name="one"))
            await session.commit()
        async with maker.begin() as session:
            session.add(Item(name="two"))
    assert await database.names() == ["one", "two"]


def test_lazy_session_maker_exists_before_any_event_loop_and_serves_each_loop(database: Database) -> None:
    db = DBConnect(lambda host: database.watch_new(), make, host="h")
    maker = db.lazy_session_maker
    assert issubclass(maker.class_, ShopSession)

    async def use(name: str) -> AsyncEngine:
        async with maker() as session:
            session.add(Item(name=name))
            await session.commit()
        return await db.engine()

    assert asyncio.run(use("one")) is not asyncio.run(use("two"))
    assert asyncio.run(database.names()) == ["one", "two"]


def test_a_session_that_is_older_than_the_event_loop_is_on_its_engine(database: Database) -> None:
    db = DBConnect(lambda host: database.watch_new(), make, host="h")
    session = db.lazy_session_maker()

    async def use() -> None:
        async with session:
            session.add(Item(name="one"))
            await session.commit()
            assert (await session.connection()).engine.sync_engine is (await db.engine()).sync_engine

    asyncio.run(use())
    assert asyncio.run(database.names()) == ["one"]


async def test_options_of_one_session_and_of_all_are_kept_apart(db: DBConnect) -> None:
    maker = db.lazy_session_maker
    maker.configure(info={"all": True})
    async with maker(info={"one": True}, autoflush=False) as session:
        assert session.info == {"all": True, "one": True}
        assert not session.sync_session.autoflush
    async with maker() as session:
        assert session.info == {"all": True}


async def test_lazy_sessions_take_part_in_a_shared_transaction(db: DBConnect, database: Database) -> None:
    async with shared_transaction(db) as shared:
        async with db.lazy_session_maker.begin() as session:
            session.add(Item(name="one"))
        assert (await shared.scalars(select(Item.name))).all() == ["one"]
    assert await database.names() == []


async def test_lazy_sessions_go_to_the_current_host(database: Database) -> None:
    created: list[str] = []

    def create(host: str) -> AsyncEngine:
        created.append(host)
        return database.watch_new()

    async with DBConnect(create) as db:
        maker = db.lazy_session_maker
        with pytest.raises(HostNotSetError):
            maker()
        for host in ("a", "b"):
            await db.connect(host)
            async with maker() as session:
                await session.execute(text("SELECT 1"))
    assert created == ["a", "b"]


def test_a_database_has_one_lazy_session_maker() -> None:
    db = DBConnect.from_url("sqlite+aiosqlite://")
    assert db.lazy_session_maker is db.lazy_session_maker
