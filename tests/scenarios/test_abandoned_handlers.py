"""Middlewares that give up on a handler and answer in its place, while it goes on: a response never lies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from tests.support.application import Reply
from tests.support.database import Item, eventually, insert, insert_row_that_fails_at_commit
from tests.support.world import World

from ctxdb_core import (
    AbandonedWorkError,
    ContextClosedError,
    commit_db_session,
    db_session,
    run_in_new_ctx,
)

pytestmark = [pytest.mark.middlewares, pytest.mark.sockets]

Step = Callable[[], Awaitable[object]]


async def nothing() -> None:
    """Leave the database alone."""


async def give_up(
    world: World, status: int = 200, *, before: Step = nothing, handler: Step = nothing, after: Step = nothing
) -> httpx.Response:
    """Request a handler that goes on after its `handler` step; a middleware around it gives up on it there.

    Args:
        world: where.
        status: what the middleware answers.
        before: what the middleware does before it calls the handler.
        handler: what the handler does until then.
        after: what the middleware does then.
    """
    entered, answered = asyncio.Event(), asyncio.Event()
    errors: list[BaseException] = []

    async def handle() -> Reply:
        try:
            await handler()
            entered.set()
            await answered.wait()
            await insert(world.db, "too late")
        except BaseException as exc:
            errors.append(exc)
            raise
        raise AssertionError

    async def around(call: Callable[[], None]) -> Reply:
        await before()
        call()
        await entered.wait()
        await after()
        return Reply("instead", status=status)

    world.application.around = around
    world.application.exception_statuses[IntegrityError] = 409
    client = await world.start(("/", handle))
    response = await client.get("/")
    answered.set()
    await eventually(lambda: bool(errors), "the handler goes on")
    # A framework may have cancelled it for a middleware that has failed.
    assert type(errors[0]) in (
        (ContextClosedError,) if response.text == "instead" else (ContextClosedError, asyncio.CancelledError)
    )
    return response


def inserting(world: World, name: str) -> Step:
    return lambda: insert(world.db, name)


@pytest.mark.parametrize("status", [200, 503])
async def test_writes_of_the_abandoned_handler_are_rolled_back(world: World, status: int) -> None:
    response = await give_up(world, status, handler=inserting(world, "handler"))
    assert (response.status_code, response.text) == (status, "instead")
    assert await world.names() == []


async def test_a_middleware_that_has_only_read_can_answer_for_a_handler_that_has_written(world: World) -> None:
    async def read() -> None:
        session = await db_session(world.db)
        await session.execute(text("SELECT name FROM item"))
        await session.execute(select(Item))

    response = await give_up(world, before=read, handler=inserting(world, "handler"), after=read)
    assert (response.status_code, response.text) == (200, "instead")
    assert await world.names() == []


async def test_writes_of_the_middleware_are_committed_if_the_handler_only_reads(world: World) -> None:
    async def read() -> None:
        await (await db_session(world.db)).execute(select(Item))

    response = await give_up(world, before=inserting(world, "before"), handler=read, after=inserting(world, "after"))
    assert (response.status_code, response.text) == (200, "instead")
    assert await world.names() == ["after", "before"]


async def test_writes_of_the_middleware_are_rolled_back_for_an_error_response(world: World) -> None:
    response = await give_up(world, 503, before=inserting(world, "before"))
    assert (response.status_code, response.text) == (503, "instead")
    assert await world.names() == []


async def test_a_success_of_the_middleware_is_not_sent_if_its_commit_fails(world: World) -> None:
    response = await give_up(world, before=lambda: insert_row_that_fails_at_commit(world.db))
    # In aiohttp, the commit comes after this middleware has returned, so it does not see the error.
    handled = world.setting.adapter.has_exception_handlers and world.setting.adapter.name != "aiohttp"
    assert response.status_code == (409 if handled else 500)


@pytest.mark.parametrize("step", ["before", "after"])
async def test_a_success_for_work_of_middleware_and_handler_is_refused(world: World, step: str) -> None:
    steps: dict[str, Step] = {"before": nothing, "after": nothing, step: inserting(world, "middleware")}
    response = await give_up(world, before=steps["before"], handler=inserting(world, "handler"), after=steps["after"])
    assert response.status_code == 500
    assert [type(error) for error in world.application.errors] == [AbandonedWorkError]
    assert await world.names() == []


async def test_an_error_for_work_of_middleware_and_handler_is_sent(world: World) -> None:
    response = await give_up(world, 503, handler=inserting(world, "handler"), after=inserting(world, "middleware"))
    assert (response.status_code, response.text) == (503, "instead")
    assert await world.names() == []


async def test_a_success_for_unflushed_work_of_an_unknown_author_is_refused(world: World) -> None:
    """Objects that have not been flushed do not say who has added them."""

    async def add() -> None:
        (await db_session(world.db)).add(Item(name="middleware"))

    assert (await give_up(world, after=add)).status_code == 500
    assert await world.names() == []


async def test_early_commit_of_the_middleware_stands(world: World) -> None:
    async def write_and_commit() -> None:
        await insert(world.db, "middleware")
        await commit_db_session(world.db)

    response = await give_up(world, before=write_and_commit, handler=inserting(world, "handler"))
    assert (response.status_code, response.text) == (200, "instead")
    assert await world.names() == ["middleware"]


@pytest.mark.parametrize("committed_by", ["unit", "session"])
@pytest.mark.parametrize("begun_by", ["object", "begin"])
async def test_a_transaction_that_the_handler_begins_after_a_commit_is_rolled_back(
    world: World, committed_by: str, begun_by: str
) -> None:
    async def write_and_commit() -> None:
        session = await insert(world.db, "middleware")
        await (session.commit() if committed_by == "session" else commit_db_session(world.db))

    async def begin_and_write() -> None:
        session = await db_session(world.db)
        if begun_by == "begin":
            await session.begin()
        session.add(Item(name="handler"))
        await session.flush()

    response = await give_up(world, before=write_and_commit, handler=begin_and_write)
    assert (response.status_code, response.text) == (200, "instead")
    assert await world.names() == ["middleware"]


@pytest.mark.postgresql
async def test_writes_of_the_middleware_in_another_unit_of_work_stand(world: World) -> None:
    response = await give_up(
        world,
        handler=inserting(world, "handler"),
        after=lambda: run_in_new_ctx(insert, world.db, "middleware"),
    )
    assert (response.status_code, response.text) == (200, "instead")
    assert await world.names() == ["middleware"]
