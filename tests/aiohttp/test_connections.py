"""Connections: requests that share one, clients that leave, servers that end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientSession, web
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.aiohttp.conftest import Serve, either_way
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.wire import Wire, ask

from ctxdb_aiohttp import setup
from ctxdb_core import ContextClosedError, DBConnect, db_session
from ctxdb_core.adapters import is_context_initiated


def application(**handlers: Callable[[web.Request], Awaitable[Any]]) -> web.Application:
    app = web.Application()
    for name, handler in handlers.items():
        app.router.add_route("*", f"/{name}", handler)
    setup(app)
    return app


async def test_requests_that_share_a_connection_share_nothing_else(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    sessions: list[AsyncSession] = []

    async def write(request: web.Request) -> web.StreamResponse:
        assert is_context_initiated()
        sessions.append(await insert(db, request.query_string))
        return web.Response(status=400 if request.query_string == "b" else 200)

    async with Wire.connect(await serve(application(write=write))) as wire:
        assert [(await wire.ask(f"/write?{name}")).status for name in "abc"] == [200, 400, 200]
    assert len({id(session) for session in sessions}) == 3
    assert await database.names() == ["a", "c"]


async def test_requests_in_a_pipeline_are_answered_in_order(db: DBConnect, database: Database, serve: Serve) -> None:
    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, request.query_string)
        if request.query_string == "b":
            await insert_row_that_fails_at_commit(db)
        return web.Response(text=request.query_string)

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await insert(db, request.query_string)
        await response.prepare(request)
        await response.write(request.query_string.encode())
        return response

    async with Wire.connect(await serve(application(write=write, stream=stream))) as wire:
        for path in ("/write?a", "/stream?c", "/write?d", "/write?b"):
            await wire.send(path)
        answers = [await wire.read() for _ in range(4)]
        await wire.assert_nothing_follows()
    assert [answer.summary for answer in answers[:3]] == [(200, "a"), (200, "c"), (200, "d")]
    assert answers[3].status == 500
    assert await database.names() == ["a", "c", "d"]


async def test_a_failing_commit_does_not_make_aiohttps_client_ask_again(db: DBConnect, serve: Serve) -> None:
    async def write(request: web.Request) -> web.StreamResponse:
        calls.append(request)
        await insert_row_that_fails_at_commit(db)
        return web.Response(text="success")

    async def hello(request: web.Request) -> web.StreamResponse:
        return web.Response()

    calls: list[web.Request] = []
    base_url = await serve(application(write=write, hello=hello))
    async with ClientSession(base_url) as client:
        async with client.get("/hello") as response:
            assert response.status == 200
        async with client.get("/write") as response:
            assert response.status == 500
    assert len(calls) == 1


async def test_a_client_that_expects_to_be_told_to_continue_is(db: DBConnect, database: Database, serve: Serve) -> None:
    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, await request.text())
        return web.Response(text="success")

    async with Wire.connect(await serve(application(write=write))) as wire:
        await wire.send("/write", "POST", {"Expect": "100-continue", "Content-Length": "4"})
        assert (await wire.read_head())[0] == 100
        wire.writer.write(b"body")
        assert (await wire.read()).summary == (200, "success")
        await wire.assert_nothing_follows()
    assert await database.names() == ["body"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/missing", 404), ("PUT", "/only_get", 405), ("GET", "/only_get", 200)]
)
async def test_answers_of_aiohttp_itself_are_left_alone(
    database: Database, serve: Serve, method: str, path: str, status: int
) -> None:
    async def only_get(request: web.Request) -> web.StreamResponse:
        return web.Response()

    app = web.Application()
    app.router.add_get("/only_get", only_get)
    setup(app, database.connect())
    assert (await ask(await serve(app), path, method)).status == status
    assert database.engines == []


async def test_a_task_that_outlives_its_request_gets_an_error_that_says_so(db: DBConnect, serve: Serve) -> None:
    release = asyncio.Event()
    tasks: list[asyncio.Task[AsyncSession]] = []

    async def late() -> AsyncSession:
        await release.wait()
        return await db_session(db)

    async def plain(request: web.Request) -> web.StreamResponse:
        tasks.append(asyncio.create_task(late()))
        return web.Response()

    async def stream(request: web.Request) -> web.StreamResponse:
        tasks.append(asyncio.create_task(late()))
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    async def generated(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            yield b"body"

        tasks.append(asyncio.create_task(late()))
        return web.Response(body=body())

    async def error(request: web.Request) -> web.StreamResponse:
        tasks.append(asyncio.create_task(late()))
        raise LookupError

    base_url = await serve(application(plain=plain, stream=stream, generated=generated, error=error))
    for path in ("/plain", "/stream", "/generated", "/error"):
        await ask(base_url, path)
    release.set()
    for task in tasks:
        with pytest.raises(ContextClosedError, match="run_in_new_ctx"):
            await task


async def test_a_connection_killed_before_the_commit_is_a_500(db: DBConnect, database: Database, serve: Serve) -> None:
    async def plain(request: web.Request) -> web.StreamResponse:
        await insert(db, "lost")
        assert database.terminate_backends("state = 'idle in transaction'") == 1
        return web.Response(text="success")

    async def stream(request: web.Request) -> web.StreamResponse:
        await plain(request)
        response = web.StreamResponse()
        await response.prepare(request)
        raise AssertionError

    async def after(request: web.Request) -> web.StreamResponse:
        await insert(db, "after")
        return web.Response()

    base_url = await serve(application(plain=plain, stream=stream, after=after))
    for path in ("/plain", "/stream"):
        answer = await ask(base_url, path)
        assert answer.status == 500
        assert "success" not in answer.text
    assert (await ask(base_url, "/after")).status == 200
    assert await database.names() == ["after"]


# --- clients that leave -----------------------------------------------------------------------------------------------


@either_way
async def test_a_client_that_leaves_during_the_handler(
    db: DBConnect, database: Database, serve: Serve, handler_cancellation: bool
) -> None:
    entered, proceed, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def write(request: web.Request) -> web.StreamResponse:
        try:
            await insert(db, "one")
            entered.set()
            await proceed.wait()
        finally:
            ended.set()
        return web.Response()

    async with Wire.connect(await serve(application(write=write))) as wire:
        await wire.send("/write")
        await entered.wait()
        wire.abort()
    if not handler_cancellation:
        proceed.set()
    await eventually(ended.is_set, "the handler was not cancelled")
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == ([] if handler_cancellation else ["one"])


@either_way
async def test_a_client_that_leaves_during_a_query(
    db: DBConnect, database: Database, serve: Serve, handler_cancellation: bool
) -> None:
    async def sleep(request: web.Request) -> web.StreamResponse:
        session = await insert(db, "one")
        await session.execute(text("SELECT pg_sleep(300)"))
        return web.Response()

    async with Wire.connect(await serve(application(sleep=sleep))) as wire:
        await wire.send("/sleep")
        await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
        wire.abort()
    if not handler_cancellation:
        database.terminate_backends("wait_event = 'PgSleep'")
    await eventually(lambda: not database.backends("wait_event = 'PgSleep'"), "the query runs on")
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


@either_way
@pytest.mark.parametrize("path", ["/plain", "/stream"])
async def test_a_commit_is_seen_through_although_its_client_leaves(
    db: DBConnect, database: Database, serve: Serve, path: str
) -> None:
    async def plain(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    async def stream(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    base_url = await serve(application(plain=plain, stream=stream))
    with database.held_commits():
        async with Wire.connect(base_url) as wire:
            await wire.send(path)
            await database.commit_is_held()
            wire.abort()
        for _ in range(20):
            # What would stop it gets its turns.
            await asyncio.sleep(0)
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == ["one"]


# --- servers that end -------------------------------------------------------------------------------------------------


async def test_a_graceful_shutdown_waits_for_a_request(db: DBConnect, database: Database) -> None:
    entered, proceed = asyncio.Event(), asyncio.Event()

    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        entered.set()
        await proceed.wait()
        return web.Response(text="done")

    runner = web.AppRunner(application(write=write))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with Wire.connect(f"http://127.0.0.1:{runner.addresses[0][1]}") as wire:
        await wire.send("/write")
        await entered.wait()
        shutdown = asyncio.create_task(runner.cleanup())
        proceed.set()
        assert (await wire.read()).summary == (200, "done")
        await shutdown
    assert await database.names() == ["one"]


async def test_a_request_that_a_shutdown_cancels_is_rolled_back(db: DBConnect, database: Database) -> None:
    entered = asyncio.Event()

    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    runner = web.AppRunner(application(write=write), shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with Wire.connect(f"http://127.0.0.1:{runner.addresses[0][1]}") as wire:
        await wire.send("/write")
        await entered.wait()
        await runner.cleanup()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


async def test_base_exception_rolls_back(db: DBConnect, database: Database, serve: Serve) -> None:
    class Exit(BaseException):
        pass

    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        raise Exit

    async with Wire.connect(await serve(application(write=write))) as wire:
        await wire.send("/write")
        assert await wire.reader.read() == b""
    assert database.checked_out == 0
    assert await database.names() == []
