"""Sessions that choose their engine by themselves (`get_bind`, `binds=`), in the styles that roll back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Delete, Insert, Update, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from tests.support.database import Database, Item

from ctxdb_core import DBConnect, commit_db_session, db_session, new_db_ctx, new_non_ctx_session
from ctxdb_core.testing import (
    SharedTransactionError,
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
    shared_transaction,
)

Engines = dict[str, AsyncEngine]


@pytest.fixture
async def engines(database: Database) -> AsyncIterator[Engines]:
    """The application's own engines: a writer and a reader, of which the `DBConnect` knows nothing."""
    engines = {name: database.watch(create_async_engine(database.url)) for name in ("writer", "reader")}
    yield engines
    for engine in engines.values():
        await engine.dispose()


def connect(database: Database, maker: Callable[[AsyncEngine], async_sessionmaker[AsyncSession]]) -> DBConnect:
    return DBConnect(lambda host: database.watch_new(), maker, host="127.0.0.1")


@pytest.fixture(params=["get_bind", "class attribute", "binds"])
async def db(request: pytest.FixtureRequest, database: Database, engines: Engines) -> AsyncIterator[DBConnect]:
    """A DBConnect whose sessions lead to the application's own engines."""

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
            writes = self._flushing or isinstance(clause, Insert | Update | Delete) or "INSERT" in str(clause)
            return engines["writer" if writes else "reader"].sync_engine

    class AsyncRoutingSession(AsyncSession):
        sync_session_class = RoutingSession

    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        if request.param == "get_bind":
            return async_sessionmaker(sync_session_class=RoutingSession, expire_on_commit=False)
        if request.param == "class attribute":
            return async_sessionmaker(class_=AsyncRoutingSession, info={"of": "application"})
        return async_sessionmaker(engine, binds={Item: engines["writer"]})

    async with connect(database, make) as db:
        yield db


async def write_and_read(db: DBConnect) -> list[str]:
    session = await db_session(db)
    session.add(Item(name="one"))
    await commit_db_session(db)
    return list((await session.scalars(select(Item.name))).all())


async def test_commits_of_routing_sessions_in_a_shared_transaction_are_rolled_back(
    db: DBConnect, database: Database
) -> None:
    for _ in range(2):
        async with shared_transaction(db) as session:
            async with new_db_ctx():
                assert await write_and_read(db) == ["one"]
            assert (await session.scalars(select(Item.name))).all() == ["one"]
    assert await database.names() == []


async def test_the_tests_session_in_a_shared_transaction_blocks_no_other_session(
    db: DBConnect, database: Database
) -> None:
    async with shared_transaction(db, timeout=0.05) as session:
        session.add(Item(name="prepared"))
        await session.flush()

        async def look() -> list[str]:
            async with new_non_ctx_session(db) as other:
                other.add(Item(name="written"))
                await other.commit()
                return list((await other.scalars(select(Item.name).order_by(Item.name))).all())

        assert await asyncio.create_task(look()) == ["prepared", "written"]
    assert await database.names() == []


async def test_other_event_loops_share_the_transaction(db: DBConnect, database: Database) -> None:
    async def elsewhere() -> None:
        async with new_db_ctx():
            await write_and_read(db)

    async with shared_transaction(db) as session:
        await asyncio.to_thread(asyncio.run, elsewhere())
        assert (await session.scalars(select(Item.name))).all() == ["one"]
    assert await database.names() == []


async def test_commits_of_routing_sessions_in_a_rollback_session_are_rolled_back(
    db: DBConnect, database: Database
) -> None:
    async with rollback_session(db) as session:
        session.add(Item(name="one"))
        await session.commit()
        assert (await session.scalars(select(Item.name))).all() == ["one"]
        assert await database.names() == []
    assert await database.names() == []


async def test_the_units_session_is_put_on_the_tests_connection(db: DBConnect, database: Database) -> None:
    async with rollback_session(db) as session, set_test_context(), put_savepoint_session_in_ctx(db, session):
        assert await write_and_read(db) == ["one"]
        assert (await session.scalars(select(Item.name))).all() == ["one"]
    assert await database.names() == []


async def test_a_rollback_session_inside_of_a_shared_transaction_is_on_its_connection(
    db: DBConnect, database: Database
) -> None:
    async with shared_transaction(db) as session:
        async with rollback_session(db) as inner:
            inner.add(Item(name="one"))
            await inner.commit()
        assert (await session.scalars(select(Item.name))).all() == []
    assert await database.names() == []


async def test_a_session_keeps_its_class_and_its_information(database: Database) -> None:
    class Own(Session):
        pass

    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, sync_session_class=Own, info={"of": "application"})

    async with connect(database, make) as db, shared_transaction(db), new_non_ctx_session(db) as session:
        assert isinstance(session.sync_session, Own)
        assert session.info["of"] == "application"


@asynccontextmanager
async def in_shared_transaction(db: DBConnect) -> AsyncIterator[AsyncSession]:
    async with shared_transaction(db):
        yield await db.create_session()


@pytest.mark.parametrize("style", [in_shared_transaction, rollback_session])
async def test_an_engine_to_another_database_is_refused_with_the_way_out(
    database: Database,
    tmp_path_factory: pytest.TempPathFactory,
    style: Callable[[DBConnect], AbstractAsyncContextManager[AsyncSession]],
) -> None:
    other = create_async_engine(f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('other') / 'other.db'}")

    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, binds={Item: other})

    async with connect(database, make) as db, style(db) as session:
        session.add(Item(name="one"))
        with pytest.raises(SharedTransactionError, match=r"would really commit.*one URL in tests"):
            await session.commit()
        await session.close()
    await other.dispose()
