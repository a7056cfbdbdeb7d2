"""Orders that write an audit entry on a second connection while they hold the first one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tests.support.application import Reply, current_request
from tests.support.database import Database, insert
from tests.support.world import World

from ctxdb_core import commit_db_session, run_in_new_ctx

pytestmark = pytest.mark.exception_handlers

POOL = 2


@pytest.fixture
async def small_world(world: World, database: Database) -> AsyncIterator[World]:
    async with database.connect(pool_size=POOL, pool_timeout=0.3) as db:
        world.db = db
        yield world
        await world.stop()
        await database.assert_quiet()


async def test_orders_that_wait_for_each_other_are_told_why_and_the_next_one_is_served(small_world: World) -> None:
    world, all_hold = small_world, asyncio.Barrier(POOL)

    async def audited() -> Reply:
        name = current_request.get().query
        await insert(world.db, name)
        await all_hold.wait()
        await run_in_new_ctx(insert, world.db, f"audit of {name}")
        return Reply()

    async def order() -> Reply:
        await insert(world.db, "next")
        return Reply()

    told: list[str] = []
    world.application.exception_statuses[PoolTimeoutError] = 503
    client = await world.start(("/audited", _told(audited, told)), ("/order", order))
    statuses = await world.statuses(client, ["/audited?one", "/audited?two"])
    # A connection that one order gives back at its time-out may serve the other order.
    assert 503 in statuses
    assert "units of work hold a connection of this pool and wait for a second one" in told[0]
    assert f"{__name__.rpartition('.')[2]}.py" in told[0]
    assert (await client.get("/order")).status_code == 200
    names = set(await world.names()) - {"next"}
    answered = {name for name, status in zip(("one", "two"), statuses, strict=True) if status == 200}
    assert names == answered | {f"audit of {name}" for name in answered}


def _told(handler: Callable[[], Awaitable[Reply]], told: list[str]) -> Callable[[], Awaitable[Reply]]:
    async def handle() -> Reply:
        try:
            return await handler()
        except PoolTimeoutError as error:
            told.append(str(error))
            raise

    return handle


async def test_orders_that_give_the_first_connection_back_do_not_wait_for_each_other(small_world: World) -> None:
    world = small_world

    async def audited() -> Reply:
        name = current_request.get().query
        await insert(world.db, name)
        await commit_db_session(world.db)
        await run_in_new_ctx(insert, world.db, f"audit of {name}")
        return Reply()

    client = await world.start(("/audited", audited))
    orders = [str(number) for number in range(3 * POOL)]
    assert await world.statuses(client, [f"/audited?{order}" for order in orders]) == [200] * len(orders)
    assert await world.names() == sorted([*orders, *(f"audit of {order}" for order in orders)])
