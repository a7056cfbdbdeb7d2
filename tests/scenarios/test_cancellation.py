"""Promise 4: what a handler gives up halfway is not done, on the server either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import anyio
import pytest
from sqlalchemy import text
from tests.support.application import Reply
from tests.support.database import eventually, insert
from tests.support.world import World

from ctxdb_core import db_session

pytestmark = pytest.mark.postgresql


@contextmanager
def _by_the_task(cancels: list[Callable[[], object]]) -> Iterator[None]:
    task = asyncio.current_task()
    assert task is not None
    cancels.append(task.cancel)
    with suppress(asyncio.CancelledError):
        yield
    task.uncancel()


@contextmanager
def _by_anyio(cancels: list[Callable[[], object]]) -> Iterator[None]:
    with anyio.CancelScope() as scope:
        cancels.append(scope.cancel)
        yield


GivingUp = Callable[[list[Callable[[], object]]], AbstractContextManager[None]]
ways = pytest.mark.parametrize("giving_up", [_by_the_task, _by_anyio])


async def sleep_until_cancelled(world: World, giving_up: GivingUp) -> None:
    """Let the request's session sleep on the server, and be cancelled there."""
    cancels: list[Callable[[], object]] = []

    async def cancel() -> None:
        await eventually(lambda: bool(world.database.backends("wait_event = 'PgSleep'")), "no query")
        cancels[0]()

    watcher = asyncio.create_task(cancel())
    with giving_up(cancels):
        await (await db_session(world.db)).execute(text("SELECT pg_sleep(300)"))
    await watcher


@ways
async def test_a_statement_that_is_given_up_stops_on_the_server(world: World, giving_up: GivingUp) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        await sleep_until_cancelled(world, giving_up)
        return Reply(status=504)

    assert (await world.get(handler)).status_code == 504
    await eventually(lambda: not world.database.backends("wait_event = 'PgSleep'"), "the query runs on")
    assert await world.names() == []


@ways
async def test_a_transaction_lost_with_a_statement_is_no_success(world: World, giving_up: GivingUp) -> None:
    """The statement's connection is gone, and what was written before on it as well."""

    async def handler() -> Reply:
        await insert(world.db, "one")
        await sleep_until_cancelled(world, giving_up)
        return Reply("success")

    response = await world.get(handler)
    assert response.status_code == 500
    assert "success" not in response.text
    assert await world.names() == []


@ways
async def test_after_a_roll_back_the_request_can_go_on(world: World, giving_up: GivingUp) -> None:
    async def handler() -> Reply:
        session = await insert(world.db, "given up")
        await sleep_until_cancelled(world, giving_up)
        await session.rollback()
        await insert(world.db, "instead")
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert await world.names() == ["instead"]
