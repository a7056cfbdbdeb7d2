"""Slow queries with a time limit of the program's own, and an answer without them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy import text
from tests.support.application import Reply, Stream
from tests.support.database import insert
from tests.support.world import World

from ctxdb_core import DBConnect, StatementInterruptedError, db_session, run_in_new_ctx


async def suggestions(db: DBConnect) -> str:
    try:
        await asyncio.wait_for((await db_session(db)).execute(text("SELECT pg_sleep(300)")), 0.05)
    except TimeoutError:
        return "none"
    raise AssertionError("not reached")


async def test_a_page_that_only_reads_is_answered_without_its_slow_part(world: World) -> None:
    async def page() -> Reply:
        await (await db_session(world.db)).execute(text("SELECT 1"))
        return Reply(await suggestions(world.db))

    response = await world.get(page)
    assert (response.status_code, response.text) == (200, "none")


async def test_a_body_that_only_reads_goes_on_without_its_slow_part(world: World) -> None:
    async def page() -> Stream:
        async def body() -> AsyncGenerator[str]:
            await (await db_session(world.db)).execute(text("SELECT 1"))
            yield await suggestions(world.db)
            yield await (await db_session(world.db)).scalar(text("SELECT ', the end'"))

        return Stream(body())

    assert (await world.get(page)).text == "none, the end"


@pytest.mark.exception_handlers
async def test_an_order_whose_row_went_with_the_slow_query_is_no_success(world: World) -> None:
    async def order() -> Reply:
        await insert(world.db, "order")
        return Reply(await suggestions(world.db))

    world.application.exception_statuses[StatementInterruptedError] = 507
    assert (await world.get(order)).status_code == 507
    assert await world.names() == []


async def test_a_slow_query_beside_the_transaction_costs_the_order_nothing(world: World) -> None:
    async def order() -> Reply:
        await insert(world.db, "order")
        return Reply(await run_in_new_ctx(suggestions, world.db))

    response = await world.get(order)
    assert (response.status_code, response.text) == (200, "none")
    assert await world.names() == ["order"]
