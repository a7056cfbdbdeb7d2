"""Sessions that send writes to one engine and reads to another, by a `get_bind` of the program's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Insert, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from tests.support.application import Reply, Stream
from tests.support.database import Database, Item
from tests.support.world import World

from ctxdb_core import DBConnect, TransactionAbortedError, db_session
from ctxdb_core.testing import shared_transaction


@pytest.fixture
async def routing_world(world: World, database: Database) -> AsyncIterator[World]:
    writer = database.watch_new()

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
            return writer.sync_engine if self._flushing or isinstance(clause, Insert) else super().get_bind(mapper)

    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, sync_session_class=RoutingSession)

    async with DBConnect(lambda host: database.watch_new(), make, host="127.0.0.1") as db:
        world.db = db
        yield world
        await world.stop()
        await database.assert_quiet()
    await writer.dispose()


@pytest.mark.exception_handlers
async def test_an_error_that_was_swallowed_makes_no_success_of_lost_rows(routing_world: World) -> None:
    world = routing_world

    async def order() -> Reply:
        session = await db_session(world.db)
        await session.execute(select(Item))
        await session.execute(insert(Item).values(name="order"))
        with suppress(IntegrityError):
            await session.execute(insert(Item).values(name="order"))
        return Reply()

    world.application.exception_statuses[TransactionAbortedError] = 409
    assert (await world.get(order)).status_code == 409
    assert await world.names() == []


@pytest.mark.parametrize("status", [200, 404])
async def test_both_engines_follow_the_response(routing_world: World, status: int) -> None:
    world = routing_world

    async def order() -> Reply:
        session = await db_session(world.db)
        await session.execute(select(Item))
        session.add(Item(name="order"))
        return Reply(status=status)

    assert (await world.get(order)).status_code == status
    assert await world.names() == (["order"] if status == 200 else [])


async def test_a_body_reads_by_one_engine_what_it_writes_by_the_other(routing_world: World) -> None:
    world = routing_world

    async def export() -> Stream:
        async def body() -> AsyncIterator[str]:
            session = await db_session(world.db)
            for number in range(3):
                session.add(Item(name=str(number)))
                await session.commit()
                yield str(len((await session.scalars(select(Item))).all()))

        return Stream(body())  # type: ignore[arg-type]  # it is a generator

    assert (await world.get(export)).text == "123"
    assert await world.names() == ["0", "1", "2"]


async def test_a_shared_transaction_of_a_test_undoes_the_work_of_both_engines(routing_world: World) -> None:
    world = routing_world

    async def order() -> Reply:
        session = await db_session(world.db)
        session.add(Item(name="order"))
        await session.flush()
        return Reply(repr(list(await session.scalars(select(Item.name)))))

    async with shared_transaction(world.db):
        assert (await world.get(order)).text == "['order']"
    assert await world.names() == []
