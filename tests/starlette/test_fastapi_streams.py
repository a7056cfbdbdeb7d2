"""Endpoints of FastAPI that yield, whose bodies are made in one task and sent in another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware
from tests.support.database import Database, eventually, insert
from tests.support.server import RawClient, http_client, serve
from tests.support.stacks import DoNothing

from ctxdb_core import DBConnect
from ctxdb_starlette import DBSessionMiddleware

EventSourceResponse = pytest.importorskip("fastapi.sse").EventSourceResponse
STACKS = pytest.mark.parametrize("stack", [[], [DoNothing], [GZipMiddleware]], ids=["plain", "queue", "gzip"])


@pytest.fixture
def app(stack: list[Any]) -> FastAPI:
    app = FastAPI()
    for middleware in stack:
        app.add_middleware(middleware)
    app.add_middleware(DBSessionMiddleware)
    return app


@STACKS
@pytest.mark.parametrize("fails", [False, True])
async def test_work_of_an_event_stream_is_committed_unless_it_fails(
    app: FastAPI, db: DBConnect, database: Database, *, fails: bool
) -> None:
    @app.get("/", response_class=EventSourceResponse)
    async def events() -> AsyncIterable[str]:
        yield "first"
        await insert(db, "event")
        if fails:
            raise LookupError
        yield "second"

    async with serve(app) as url, http_client(url) as client:
        # A middleware with a queue ends a body properly that has failed.
        with suppress(httpx.RemoteProtocolError):
            assert (await client.get("/")).text.count("data") == (1 if fails else 2)
    assert await database.names() == ([] if fails else ["event"])


@STACKS
async def test_work_of_an_event_stream_whose_client_leaves_is_rolled_back(
    app: FastAPI, db: DBConnect, database: Database
) -> None:
    has_written, has_ended = asyncio.Event(), asyncio.Event()

    @app.get("/", response_class=EventSourceResponse)
    async def events() -> AsyncIterable[str]:
        yield "first"
        await insert(db, "event")
        has_written.set()
        try:
            await asyncio.Event().wait()
        finally:
            has_ended.set()

    async with serve(app) as url:
        async with RawClient.connect(url) as client:
            await client.send("/")
            await client.read_head()
            await has_written.wait()
            client.abort()
        await eventually(has_ended.is_set, "the stream goes on")
    assert await database.names() == []
