"""Transactions of other kinds in requests of Starlette and FastAPI."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from tests.support.database import Database, insert
from tests.support.stacks import Ask, application

from ctxdb_core import (
    DBConnect,
    UnexpectedRollbackError,
    db_session,
    retry_on_conflict,
    set_statement_timeout,
    transactional,
)
from ctxdb_core.asgi import Scope
from ctxdb_starlette import DBSessionMiddleware


async def test_half_of_a_joined_block_is_never_answered_by_a_success(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    async def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse(f"from {type(exc.__cause__).__name__}", 503)

    async def write(request: Request) -> Response:
        await insert(db, "outer")
        with pytest.raises(LookupError):
            async with transactional(db):
                await insert(db, "half")
                raise LookupError
        return PlainTextResponse("success")

    handlers = {UnexpectedRollbackError: handle}
    app = application(framework, {"/": write}, DBSessionMiddleware, exception_handlers=handlers)
    response = await (await ask(app)).post("/")
    assert (response.status_code, response.text) == (503, "from LookupError")
    assert await database.names() == []


async def test_a_joined_block_is_committed_with_its_response(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    @transactional(db)
    async def add(name: str) -> None:
        await insert(db, name)

    @transactional(db, "requires_new")
    async def audit(name: str) -> None:
        await insert(db, name)

    async def write(request: Request) -> Response:
        status = int(request.query_params["status"])
        await add(f"joined {status}")
        await audit(f"new {status}")
        return PlainTextResponse("", status)

    client = await ask(application(framework, {"/": write}, DBSessionMiddleware))
    for status in (200, 409):
        assert (await client.post("/", params={"status": status})).status_code == status
    assert await database.names() == ["joined 200", "new 200", "new 409"]


async def test_a_decorated_endpoint_keeps_its_parameters(db: DBConnect, database: Database, ask: Ask) -> None:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)
    attempts = 0

    @app.post("/items/{name}")
    @retry_on_conflict(wait=0)
    @transactional(db, isolation_level="SERIALIZABLE")
    async def add(name: str, times: int = 1) -> str:
        nonlocal attempts
        attempts += 1
        session = await insert(db, name * times)
        if attempts == 1:
            await session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$"))
        return str(await session.scalar(text("SHOW transaction_isolation")))

    response = await (await ask(app)).post("/items/a", params={"times": 3})
    assert (response.status_code, response.json()) == (200, "serializable")
    assert await database.names() == ["aaa"]


async def test_the_middleware_and_a_dependency_limit_statements(db: DBConnect, ask: Ask) -> None:
    def deadline(scope: Scope) -> float | None:
        return asyncio.get_running_loop().time() + 10 if scope["path"] == "/deadline" else None

    async def hurry() -> None:
        await set_statement_timeout(2)

    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, statement_timeout=30, deadline=deadline)

    @app.get("/fixed")
    @app.get("/deadline")
    @app.get("/dependency", dependencies=[Depends(hurry)])
    async def show() -> str:
        return str(await (await db_session(db)).scalar(text("SHOW statement_timeout")))

    client = await ask(app)
    fixed, until_deadline, of_dependency = [
        (await client.get(path)).json() for path in ("/fixed", "/deadline", "/dependency")
    ]
    assert (fixed, of_dependency) == ("30s", "2s")
    assert 1000 < int(until_deadline.removesuffix("ms")) < 10000


async def test_a_statement_that_takes_too_long_is_answered_by_its_handler(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    async def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse(str(getattr(getattr(exc, "orig", None), "sqlstate", None)), 504)

    async def write(request: Request) -> Response:
        session = await insert(db, "one")
        await session.execute(text("SELECT pg_sleep(60)"))
        return PlainTextResponse("success")

    app = application(framework, {"/": write}, exception_handlers={DBAPIError: handle})
    app.add_middleware(DBSessionMiddleware, statement_timeout=0.2)
    response = await (await ask(app)).post("/")
    assert (response.status_code, response.text) == (504, "57014")
    assert await database.names() == []
