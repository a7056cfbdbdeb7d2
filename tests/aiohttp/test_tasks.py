"""Tasks that a handler leaves behind: what they do since the commit for the response does not change that response."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, insert, insert_row_that_fails_at_commit

from ctxdb_aiohttp import setup
from ctxdb_core import DBConnect

Work = Callable[[], Awaitable[object]]


def around(work: Work) -> web.Application:
    """Return an application whose middleware does some `work` when its handler has returned."""

    @web.middleware
    async def working(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        await work()
        return response

    return web.Application(middlewares=[working])


async def do_nothing() -> None:
    pass


def alone(work: Work) -> web.Application:
    return web.Application()


def with_signal_handler(work: Work) -> web.Application:
    async def handle(request: web.Request, response: web.StreamResponse) -> None:
        await work()

    app = around(do_nothing)
    app.on_response_prepare.append(handle)
    return app


@pytest.mark.parametrize("make_app", [alone, around, with_signal_handler])
async def test_a_response_is_sent_although_a_task_fails_behind_its_commit(
    db: DBConnect,
    database: Database,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    make_app: Callable[[Work], web.Application],
) -> None:
    is_waiting = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def write_behind_commit() -> None:
        await database.commit_is_held()
        is_waiting.set()
        await insert_row_that_fails_at_commit(db)

    async def handler(request: web.Request) -> web.Response:
        await insert(db, "handler")
        tasks.append(asyncio.create_task(write_behind_commit()))
        return web.Response(text="stored")

    app = make_app(do_nothing)
    app.router.add_get("/", handler)
    setup(app)
    url = await serve(app)
    async with aiohttp.ClientSession() as client:
        with database.held_commits():
            asking = asyncio.create_task(client.get(url))
            await is_waiting.wait()
        response = await asking
        assert (response.status, await response.text()) == (200, "stored")
    await asyncio.gather(*tasks)
    assert await database.names() == ["handler"]
    assert await database.names("child", "parent") == []
    assert [record.getMessage() for record in caplog.records if "since" in record.getMessage()]


@pytest.mark.parametrize("make_app", [around, with_signal_handler])
async def test_an_error_behind_the_commit_of_a_handler_tells_that_it_stands(
    db: DBConnect,
    database: Database,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    make_app: Callable[[Work], web.Application],
) -> None:
    async def work() -> None:
        await insert_row_that_fails_at_commit(db)

    async def handler(request: web.Request) -> web.Response:
        await insert(db, "handler")
        return web.Response(text="stored")

    app = make_app(work)
    app.router.add_get("/", handler)
    setup(app)
    url = await serve(app)
    async with aiohttp.ClientSession() as client, client.get(url) as response:
        assert response.status == 500
    assert await database.names() == ["handler"]
    assert "what the handler had done was committed before that, and stands" in caplog.text
