"""Answers in the place of an endpoint that a middleware has given up on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from tests.support.database import Database, insert, insert_row_that_fails_at_commit
from tests.support.server import http_client, serve

from ctxdb_core import AbandonedWorkError, DBConnect, new_db_ctx
from ctxdb_starlette import DBSessionMiddleware


@pytest.mark.parametrize("outcome", [200, 503, "the commit fails"])
async def test_the_handler_of_the_error_writes_and_answers(
    db: DBConnect, database: Database, outcome: int | str
) -> None:
    written = asyncio.Event()

    class GiveUp(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            waiting = asyncio.ensure_future(call_next(request))
            waiting.add_done_callback(lambda task: task.cancelled() or task.exception())
            await written.wait()
            await insert(db, "middleware")
            return Response("instead")

    app = FastAPI()
    app.add_middleware(GiveUp)
    app.add_middleware(DBSessionMiddleware)

    @app.exception_handler(AbandonedWorkError)
    async def answer(request: Request, exc: AbandonedWorkError) -> JSONResponse:
        await insert(db, "handler of the error")
        if outcome == "the commit fails":
            await insert_row_that_fails_at_commit(db)
        background = BackgroundTask(insert, db, "background")
        return JSONResponse("abandoned", outcome if isinstance(outcome, int) else 200, background=background)

    @app.get("/")
    async def endpoint() -> None:
        await insert(db, "endpoint")
        written.set()
        await asyncio.Event().wait()

    async with serve(app) as url, http_client(url) as client:
        response = await client.get("/")
        assert response.status_code == (500 if outcome == "the commit fails" else outcome)
        await database.assert_quiet()
    expected = {200: ["background", "handler of the error"], 503: ["background"], "the commit fails": []}
    assert await database.names() == expected[outcome]


async def test_a_middleware_that_gives_up_can_stream_an_answer_of_its_own(db: DBConnect, database: Database) -> None:
    written, go_on = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[str]:
        yield "instead"
        async with new_db_ctx():
            await insert(db, "middleware")
        yield " of it"

    class GiveUp(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            waiting = asyncio.ensure_future(call_next(request))
            waiting.add_done_callback(lambda task: task.cancelled() or task.exception())
            await written.wait()
            return StreamingResponse(body())

    app = FastAPI()
    app.add_middleware(GiveUp)
    app.add_middleware(DBSessionMiddleware)

    @app.get("/")
    async def endpoint() -> None:
        await insert(db, "endpoint")
        written.set()
        await go_on.wait()

    async with serve(app) as url, http_client(url) as client, client.stream("GET", "/") as response:
        go_on.set()
        assert (response.status_code, await response.aread()) == (200, b"instead of it")
    assert await database.names() == ["middleware"]
