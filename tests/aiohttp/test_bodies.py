"""What is done while a body is made: in the same unit of work, in transactions of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncResult, AsyncSession
from tests.aiohttp.conftest import Serve, either_way
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.wire import Wire, ask

from ctxdb_aiohttp import setup
from ctxdb_core import ContextClosedError, DBConnect, db_session


def application(handler: Handler, *paths: str) -> web.Application:
    app = web.Application()
    for path in paths or ("/",):
        app.router.add_route("*", path, handler)
    setup(app)
    return app


# --- bodies of plain responses, which are made when all middlewares have returned -------------------------------------


async def test_a_body_works_on_with_the_same_session(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        session = await insert(db, "response")

        async def body() -> AsyncGenerator[bytes, None]:
            assert await db_session(db) is session
            assert database.checked_out == 0
            assert await database.names() == ["response"]
            await insert(db, "body")
            yield b"body"

        return web.Response(body=body())

    assert (await ask(await serve(application(handler)))).summary == (200, "body")
    assert await database.names() == ["body", "response"]


async def test_a_body_can_be_the_first_to_use_the_database(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            await insert(db, "body")
            yield b"body"

        return web.Response(body=body())

    assert (await ask(await serve(application(handler)))).summary == (200, "body")
    assert await database.names() == ["body"]


async def test_a_body_is_committed_before_its_end_is_sent(db: DBConnect, database: Database, serve: Serve) -> None:
    """What the client has read to its end is there."""

    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            yield b"body"
            await insert(db, "body")

        return web.Response(body=body())

    async with Wire.connect(await serve(application(handler))) as wire:
        assert (await wire.ask("/")).summary == (200, "body")
        assert await database.names() == ["body"]
        assert database.checked_out == 0


async def test_a_body_that_only_reads_holds_no_connection_between_its_parts(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            await (await db_session(db)).execute(text("SELECT 1"))
            yield b"part"
            held.append(database.checked_out)

        return web.Response(body=body())

    held: list[int] = []
    assert (await ask(await serve(application(handler)))).text == "part"
    assert held == [0]


async def test_a_body_whose_commit_fails_breaks_off(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")

        async def body() -> AsyncGenerator[bytes, None]:
            yield b"body"
            await insert(db, "body")
            await insert_row_that_fails_at_commit(db)

        return web.Response(body=body())

    async with Wire.connect(await serve(application(handler))) as wire:
        with pytest.raises(asyncio.IncompleteReadError):
            await wire.ask("/")
    assert await database.names() == ["response"]


async def test_a_body_that_fails_undoes_only_its_own_work(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")

        async def body() -> AsyncGenerator[bytes, None]:
            yield b"body"
            await insert(db, "body")
            raise LookupError

        return web.Response(body=body())

    async with Wire.connect(await serve(application(handler))) as wire:
        with pytest.raises(asyncio.IncompleteReadError):
            await wire.ask("/")
    await eventually(lambda: not database.checked_out, "the body's connection is not back")
    assert await database.names() == ["response"]


async def test_a_body_behind_an_error_is_committed(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")

        async def body() -> AsyncGenerator[bytes, None]:
            await insert(db, "body")
            yield b"body"

        return web.Response(body=body(), status=400)

    assert (await ask(await serve(application(handler)))).summary == (400, "body")
    assert await database.names() == ["body"]


async def test_a_body_that_is_not_sent_leaves_nothing_behind(db: DBConnect, database: Database, serve: Serve) -> None:
    """The one of a response to HEAD."""
    sessions: list[AsyncSession] = []
    made: list[bool] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        sessions.append(await insert(db, "response"))

        async def body() -> AsyncGenerator[bytes, None]:
            made.append(True)
            yield b"body"

        return web.Response(body=body())

    assert (await ask(await serve(application(handler)), method="HEAD")).status == 200
    assert await database.names() == ["response"]
    assert made == []
    with pytest.raises(ContextClosedError):
        await sessions[0].execute(text("SELECT 1"))


@either_way
async def test_a_client_that_leaves_during_a_body_undoes_only_what_is_open(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    ended = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")

        async def body() -> AsyncGenerator[bytes, None]:
            try:
                await insert(db, "body")
                while True:
                    await asyncio.sleep(0)
                    yield b"x" * 65536
            finally:
                ended.set()

        return web.Response(body=body())

    async with Wire.connect(await serve(application(handler))) as wire:
        await wire.send("/")
        assert (await wire.read_head())[0] == 200
        await wire.reader.readexactly(1)
        wire.abort()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == ["response"]


async def test_a_body_of_an_application_that_is_shut_down_leaves_nothing_behind(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            await insert(db, "body")
            yield b"body"
            begun.set()
            await asyncio.Event().wait()

        return web.Response(body=body())

    begun = asyncio.Event()
    app = application(handler)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with Wire.connect(f"http://127.0.0.1:{runner.addresses[0][1]}") as wire:
        await wire.send("/")
        await begun.wait()
        await runner.cleanup()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


# --- streams, which a handler sends -----------------------------------------------------------------------------------


async def test_a_stream_works_on_with_the_same_session(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        session = await insert(db, "response")
        response = web.StreamResponse()
        await response.prepare(request)
        assert await db_session(db) is session
        assert database.checked_out == 0
        await insert(db, "stream")
        await response.write(b"body")
        return response

    assert (await ask(await serve(application(handler)))).summary == (200, "body")
    assert await database.names() == ["response", "stream"]


async def test_a_stream_that_only_reads_holds_no_connection_behind_a_part(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await (await db_session(db)).execute(text("SELECT 1"))
        await response.write(b"part")
        held.append(database.checked_out)
        return response

    held: list[int] = []
    assert (await ask(await serve(application(handler)))).text == "part"
    assert held == [0]


@pytest.mark.parametrize("ends", [False, True])
async def test_a_stream_that_has_written_is_committed_although_it_has_left_a_result_open(
    db: DBConnect, database: Database, serve: Serve, ends: bool
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        results.append(await (await db_session(db)).stream(text("SELECT generate_series(1, 5000)")))
        await insert(db, "stream")
        await response.write(b"part")
        if ends:
            await response.write_eof()
        return response

    # What refers to the result outlives the handler.
    results: list[AsyncResult[Any]] = []
    assert (await ask(await serve(application(handler)))).text == "part"
    assert await database.names() == ["stream"]


async def test_a_stream_whose_commit_fails_breaks_off(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"body")
        await insert(db, "stream")
        await insert_row_that_fails_at_commit(db)
        return response

    async with Wire.connect(await serve(application(handler))) as wire:
        with pytest.raises(asyncio.IncompleteReadError):
            await wire.ask("/")
    assert await database.names() == ["response"]


@pytest.mark.parametrize("error", [LookupError, web.HTTPBadRequest, web.HTTPOk, ConnectionResetError])
async def test_a_handler_that_fails_in_a_stream_undoes_only_what_is_open(
    db: DBConnect, database: Database, serve: Serve, error: type[Exception]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"body")
        await insert(db, "stream")
        raise error

    async with Wire.connect(await serve(application(handler))) as wire:
        await wire.send("/")
        assert (await wire.read_head())[0] == 200
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == ["response"]


@pytest.mark.parametrize("options", [{}, {"position": 0}], ids=["behind the handler", "behind the middlewares"])
async def test_a_handler_that_fails_in_a_stream_undoes_what_is_open_although_a_middleware_answers_its_error(
    db: DBConnect, database: Database, serve: Serve, options: dict[str, Any]
) -> None:
    has_failed = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"body")
        await insert(db, "stream")
        raise LookupError

    @web.middleware
    async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except LookupError:
            has_failed.set()
            return web.Response(status=409)

    app = web.Application(middlewares=[answer_errors])
    app.router.add_get("/", handler)
    setup(app, **options)
    async with Wire.connect(await serve(app)) as wire:
        await wire.send("/")
        assert (await wire.read_head())[0] == 200
        await has_failed.wait()
        await eventually(lambda: not db.status().units, "the unit of work goes on")
    assert await database.names() == []


@either_way
async def test_a_client_that_leaves_during_a_stream_undoes_only_what_is_open(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")
        response = web.StreamResponse()
        await response.prepare(request)
        await insert(db, "stream")
        while True:
            await asyncio.sleep(0)
            await response.write(b"x" * 65536)

    async with Wire.connect(await serve(application(handler))) as wire:
        await wire.send("/")
        assert (await wire.read_head())[0] == 200
        await wire.reader.readexactly(1)
        wire.abort()
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == ["response"]


# --- slow clients -----------------------------------------------------------------------------------------------------


async def _large(request: web.Request, path: Path) -> web.StreamResponse:
    return web.Response(body=b"x" * 5_000_000)


async def _large_file(request: web.Request, path: Path) -> web.StreamResponse:
    if not path.exists():
        path.write_bytes(b"x" * 5_000_000)
    return web.FileResponse(path)


async def _large_body(request: web.Request, path: Path) -> web.StreamResponse:
    async def body() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"x" * 65536

    return web.Response(body=body())


async def _large_stream(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"x" * 65536)


Respond = Callable[[web.Request, Path], Awaitable[web.StreamResponse]]


@either_way
@pytest.mark.parametrize("respond", [_large, _large_file, _large_body, _large_stream])
async def test_slow_clients_hold_no_connection(
    db: DBConnect,
    database: Database,
    serve: Serve,
    tmp_path: Path,
    respond: Respond,
) -> None:
    """Ten that do not read, on a pool of five: an eleventh is served at once."""

    async def download(request: web.Request) -> web.StreamResponse:
        await (await db_session(db)).execute(text("SELECT 1"))
        return await respond(request, tmp_path / "file")

    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, "quick")
        return web.Response()

    app = application(download, "/download")
    app.router.add_get("/", write)
    base_url = await serve(app)
    async with asyncio.TaskGroup() as group:
        release = asyncio.Event()
        started: list[Wire] = []

        async def read_nothing() -> None:
            async with Wire.connect(base_url) as wire:
                await wire.send("/download")
                assert (await wire.read_head())[0] == 200
                started.append(wire)
                await release.wait()
                wire.abort()

        for _ in range(10):
            group.create_task(read_nothing())
        await eventually(lambda: len(started) == 10, lambda: f"only {len(started)} downloads were begun")
        assert database.checked_out == 0
        assert (await ask(base_url)).status == 200
        release.set()


async def test_a_body_that_its_handler_ends_is_committed_before_that(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await insert(db, "body")
        await response.write_eof(b"body")
        await ended.wait()
        return response

    ended = asyncio.Event()
    async with Wire.connect(await serve(application(handler))) as wire:
        assert (await wire.ask("/")).summary == (200, "body")
        assert await database.names() == ["body"]
        assert database.checked_out == 0
        ended.set()


async def test_a_body_that_its_handler_ends_breaks_off_where_its_commit_fails(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await insert(db, "body")
        await insert_row_that_fails_at_commit(db)
        await response.write_eof(b"body")
        return response

    async with Wire.connect(await serve(application(handler))) as wire:
        with pytest.raises(asyncio.IncompleteReadError):
            await wire.ask("/")
    assert await database.names() == []
