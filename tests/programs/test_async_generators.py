"""Helpers that yield rows out of a unit of work of their own, and what frameworks drive as context managers."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from litestar import post
from litestar.di import Provide
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Reply, Stream
from tests.support.database import Database, insert
from tests.support.litestar_app import Injected, litestar_app
from tests.support.server import http_client, serve
from tests.support.world import World

from ctxdb_core import DBConnect, TransactionContext, db_session, new_db_ctx, transactional
from ctxdb_litestar import CtxDBPlugin
from ctxdb_starlette import DBSessionMiddleware


async def due_invoices(db: DBConnect) -> AsyncGenerator[str]:
    async with new_db_ctx():  # a snapshot of its own, not in the request's transaction
        for (name,) in await (await db_session(db)).execute(
            text("SELECT 'invoice ' || n FROM generate_series(1, 3) n")
        ):
            yield name


async def test_writes_of_a_consumer_are_rolled_back_with_its_response(world: World) -> None:
    async def pay_all() -> Reply:
        async for invoice in due_invoices(world.db):
            await insert(world.db, invoice)
        return Reply("the bank has refused", status=409)

    assert (await world.get(pay_all)).status_code == 409
    assert await world.names() == []


async def test_a_handler_that_stops_in_the_middle_keeps_its_session(world: World) -> None:
    async def pay_first() -> Reply:
        async for invoice in due_invoices(world.db):
            await insert(world.db, invoice)
            break
        await insert(world.db, "receipt")
        return Reply()

    assert (await world.get(pay_first)).status_code == 200
    assert await world.names() == ["invoice 1", "receipt"]


@pytest.mark.exception_handlers
async def test_rows_out_of_a_savepoint_of_the_requests_session_are_refused_by_name(world: World) -> None:
    context = TransactionContext(world.db)

    async def due_invoices() -> AsyncGenerator[int]:
        async with context.transaction():
            for number in range(3):
                yield number

    async def pay_first() -> Reply:
        async for number in due_invoices():
            await insert(world.db, str(number))
            break
        return Reply()

    client = await world.start(("/", pay_first))
    assert (await client.get("/")).status_code == 500
    assert await world.names() == []
    (error, *_) = world.application.errors
    assert "due_invoices() is inside of a block" in str(error)


async def test_a_streamed_body_can_have_a_unit_of_its_own_around_its_chunks(world: World) -> None:
    async def export() -> AsyncGenerator[str]:
        async with new_db_ctx():
            for number in range(3):
                await insert(world.db, f"chunk {number}")
                yield f"{number}\n"

    async def handler() -> Stream:
        await insert(world.db, "request")
        return Stream(export())

    response = await world.get(handler)
    assert response.text == "0\n1\n2\n"
    assert await world.names() == ["chunk 0", "chunk 1", "chunk 2", "request"]


async def test_a_dependency_of_fastapi_hands_its_unit_to_its_endpoint(db: DBConnect, database: Database) -> None:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    async def audit() -> AsyncIterator[AsyncSession]:
        async with new_db_ctx():
            yield await db_session(db)

    async def nested() -> AsyncIterator[None]:
        async with transactional(db, "nested"):
            yield

    @app.post("/audit", status_code=409)
    async def in_a_unit(session: Annotated[AsyncSession, Depends(audit)]) -> bool:
        return await insert(db, "audit") is session

    @app.post("/nested", status_code=201)
    async def in_a_savepoint(_: Annotated[None, Depends(nested)]) -> bool:
        await insert(db, "nested")
        return True

    async with serve(app) as url, http_client(url) as client:
        assert [(await client.post(path)).json() for path in ("/audit", "/nested")] == [True, True]
    # The dependency's unit is its own, and stands although the response is an error.
    assert await database.names() == ["audit", "nested"]


async def test_a_dependency_of_litestar_hands_its_unit_to_its_handler(db: DBConnect, database: Database) -> None:
    async def audit() -> AsyncGenerator[AsyncSession]:
        async with new_db_ctx():
            yield await db_session(db)

    @post("/", dependencies={"audit": Provide(audit)}, status_code=409)
    async def handle(audit: Injected[AsyncSession]) -> bool:
        return await insert(db, "audit") is audit

    app = litestar_app(handle, plugins=[CtxDBPlugin(db)])
    async with serve(app) as url, http_client(url) as client:
        assert (await client.post("/")).json() is True
    assert await database.names() == ["audit"]
