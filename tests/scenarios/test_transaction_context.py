"""`TransactionContext` in requests: its blocks take part in the request's unit of work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from sqlalchemy import text
from tests.support.application import Reply
from tests.support.database import eventually, insert
from tests.support.world import World

from ctxdb_core import ContextClosedError, TransactionContext, db_session, transactional


async def test_a_block_shares_the_session_of_its_request_which_decides(world: World) -> None:
    context = TransactionContext(world.db)
    status = 400

    async def handler() -> Reply:
        assert context.get_session() is await db_session(world.db)
        await insert(world.db, "request")
        async with context.transaction() as session:
            assert session is await db_session(world.db)
            await context.execute(text("INSERT INTO item VALUES ('block')"))
        return Reply(status=status)

    client = await world.start(("/", handler))
    assert (await client.get("/")).status_code == 400
    assert await world.names() == []
    status = 200
    assert (await client.get("/")).status_code == 200
    assert await world.names() == ["block", "request"]


async def test_a_new_transaction_stands_whatever_becomes_of_its_request(world: World) -> None:
    context = TransactionContext(world.db)

    async def handler() -> Reply:
        # Before the request has a transaction of its own: SQLite has one writer at a time.
        async with context.new_transaction():
            await insert(world.db, "audit")
        await insert(world.db, "request")
        return Reply(status=500)

    assert (await world.get(handler)).status_code == 500
    assert await world.names() == ["audit"]


@pytest.mark.parametrize("how", ["transaction", "single statement"])
async def test_transaction_of_a_task_that_outlives_its_request_is_committed(world: World, how: str) -> None:
    context = TransactionContext(world.db, auto_context_on_execute=True)
    answered = asyncio.Event()
    late: list[asyncio.Task[None]] = []

    async def write() -> None:
        await answered.wait()
        with pytest.raises(ContextClosedError):
            await db_session(world.db)
        if how == "single statement":
            await context.execute(text("INSERT INTO item VALUES ('late')"))
            return
        async with context.transaction():
            await insert(world.db, "late")

    async def handler() -> Reply:
        await insert(world.db, "request")
        late.append(asyncio.create_task(write()))
        return Reply()

    assert (await world.get(handler)).status_code == 200
    await world.stop()
    answered.set()
    await asyncio.gather(*late)
    assert await world.names() == ["late", "request"]


@pytest.mark.middlewares
@pytest.mark.sockets
@pytest.mark.parametrize("block", ["transaction", "transactional"])
async def test_a_handler_that_a_middleware_has_given_up_on_begins_no_transaction_of_its_own(
    world: World, block: str
) -> None:
    """Half of its work has been rolled back: it must not commit the other half."""
    entered, answered = asyncio.Event(), asyncio.Event()
    errors: list[BaseException] = []

    async def handler() -> Reply:
        await insert(world.db, "first half")
        entered.set()
        await answered.wait()
        try:
            async with (
                TransactionContext(world.db).transaction() if block == "transaction" else transactional(world.db)
            ):
                await insert(world.db, "second half")
        except ContextClosedError as exc:
            errors.append(exc)
        return Reply()

    async def around(call: Callable[[], None]) -> Reply:
        call()
        await entered.wait()
        return Reply("too late", status=503)

    world.application.around = around
    client = await world.start(("/", handler))
    assert (await client.get("/")).status_code == 503
    answered.set()
    await eventually(lambda: bool(errors), "the handler goes on")
    assert await world.names() == []
