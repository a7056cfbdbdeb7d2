"""Sessions that choose engines by themselves, which the `DBConnect` has not made: they get the guards of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import Delete, Insert, Update, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from tests.support.database import Database, Item, eventually

from ctxdb_core import DBConnect, TransactionAbortedError, db_session, joining_session, new_db_ctx

pytestmark = pytest.mark.postgresql

INSERT = text("INSERT INTO item VALUES ('one')")


@pytest.fixture
async def writer(database: Database) -> AsyncIterator[AsyncEngine]:
    engine = database.watch(create_async_engine(database.url))
    yield engine
    await engine.dispose()


@pytest.fixture(params=["get_bind", "binds"])
async def db(request: pytest.FixtureRequest, database: Database, writer: AsyncEngine) -> AsyncIterator[DBConnect]:
    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
            if self._flushing or isinstance(clause, Insert | Update | Delete) or "INSERT" in str(clause):
                return writer.sync_engine
            return super().get_bind(mapper, clause=clause, **kw)

    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        if request.param == "get_bind":
            return async_sessionmaker(engine, sync_session_class=RoutingSession)
        return async_sessionmaker(engine, binds={Item: writer})

    async with DBConnect(lambda host: database.watch_new(), make, host="127.0.0.1") as db:
        yield db


async def insert(session: AsyncSession) -> None:
    await session.execute(INSERT, bind_arguments={"mapper": Item})


async def test_a_swallowed_error_is_not_committed(db: DBConnect, database: Database) -> None:
    with pytest.raises(TransactionAbortedError):
        async with new_db_ctx():
            session = await db_session(db)
            await insert(session)
            with pytest.raises(IntegrityError):
                await insert(session)
    assert await database.names() == []


async def test_a_cancelled_query_is_stopped_on_the_server(db: DBConnect, database: Database) -> None:
    async def wait() -> None:
        async with new_db_ctx():
            session = await db_session(db)
            await insert(session)
            await session.execute(text("/* INSERT */ SELECT pg_sleep(600)"), bind_arguments={"mapper": Item})

    task = asyncio.create_task(wait())
    await eventually(lambda: bool(database.backends("strpos(query, 'pg_sleep') > 0")), "the query does not run")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not database.backends("strpos(query, 'pg_sleep') > 0"), "the query still runs")


async def test_commits_of_a_joining_session_are_rolled_back_with_the_unit(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            async with joining_session(db) as session:
                await insert(session)
                await session.commit()
                assert await database.names() == []
                session.add(Item(name="two"))
            raise LookupError
    assert await database.names() == []


async def test_what_a_joining_session_leaves_open_is_committed_with_the_unit(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        async with joining_session(db) as session:
            await insert(session)
        assert await database.names() == []
        with pytest.raises(LookupError):
            async with joining_session(db) as session:
                session.add(Item(name="undone"))
                await session.flush()
                raise LookupError
    assert await database.names() == ["one"]
