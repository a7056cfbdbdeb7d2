"""Signal handlers of the application that use the database when a response is about to be sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Handler
from sqlalchemy.exc import IntegrityError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.replies import KINDS, STARTED_BY_AIOHTTP, STARTED_BY_HANDLER, Kind
from tests.support.wire import Wire, ask

from ctxdb_aiohttp import setup
from ctxdb_core import DBConnect

Signal = Callable[[web.Request], Awaitable[object]]

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
WHERE = pytest.mark.parametrize("where", ["before", "after", "in_sub_application"])


def application(kind: Kind, directory: Path, signal: Signal, where: str) -> web.Application:
    """Return an application which responds, and calls `signal` before the response is sent."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return await kind.make(request, directory / "file.txt")

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        await signal(request)

    app, inner = web.Application(), web.Application()
    inner.router.add_get("/", handler)
    if where == "before":
        app.on_response_prepare.append(prepare)
    setup(app)
    if where == "after":
        app.on_response_prepare.append(prepare)
    elif where == "in_sub_application":
        inner.on_response_prepare.append(prepare)
    app.add_subapp("/inner", inner)
    return app


@kinds
@WHERE
async def test_writes_of_signal_handlers_are_committed_before_the_first_byte(
    db: DBConnect, database: Database, serve: Serve, tmp_path: Path, kind: Kind, where: str
) -> None:
    async def signal(request: web.Request) -> None:
        await insert(db, "signal")

    async with Wire.connect(await serve(application(kind, tmp_path, signal, where))) as wire:
        await wire.send("/inner/")
        assert (await wire.read_head())[0] == kind.status
        assert await database.names() == ["signal"]
        assert database.checked_out == 0
        await wire.read_to_end()


@pytest.mark.parametrize("kind", STARTED_BY_AIOHTTP, ids=lambda kind: kind.name)
@WHERE
async def test_a_500_replaces_a_response_whose_signal_handlers_cannot_be_committed(
    db: DBConnect, serve: Serve, tmp_path: Path, kind: Kind, where: str
) -> None:
    async def signal(request: web.Request) -> None:
        calls.append(request)
        await insert_row_that_fails_at_commit(db)

    calls: list[web.Request] = []
    answer = await ask(await serve(application(kind, tmp_path, signal, where)), "/inner/")
    assert answer.status == 500
    assert "success" not in answer.text
    # aiohttp closes the connection behind it.
    assert answer.headers["connection"] == "close"
    assert len(calls) == 1


async def test_a_500_replaces_a_response_whose_policy_fails_behind_its_signal_handlers(
    db: DBConnect, database: Database, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text="success")

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        await insert(db, "signal")

    def policy(status: int) -> bool:
        raise LookupError

    app = web.Application()
    app.router.add_get("/", handler)
    app.on_response_prepare.append(prepare)
    setup(app, commit_policy=policy)
    async with Wire.connect(await serve(app)) as wire:
        await wire.send("/")
        assert (await wire.read_head())[0] == 500
        assert database.checked_out == 0
        await wire.read_to_end()
    assert "A response was replaced by a 500" in caplog.text
    assert await database.names() == []


async def test_500_in_answer_to_head_has_no_body(db: DBConnect, serve: Serve, tmp_path: Path) -> None:
    async def signal(request: web.Request) -> None:
        await insert_row_that_fails_at_commit(db)

    base_url = await serve(application(KINDS[0], tmp_path, signal, "after"))
    assert (await ask(base_url, "/inner/", "HEAD")).summary == (500, "")


async def test_access_log_shows_the_500(db: DBConnect, database: Database, tmp_path: Path) -> None:
    logged: list[int] = []

    class Log(AbstractAccessLogger):
        def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
            logged.append(response.status)

    async def signal(request: web.Request) -> None:
        await insert_row_that_fails_at_commit(db)

    runner = web.AppRunner(application(KINDS[0], tmp_path, signal, "after"), access_log_class=Log)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    assert (await ask(f"http://127.0.0.1:{runner.addresses[0][1]}", "/inner/")).status == 500
    await runner.cleanup()
    assert logged[0] == 500


@pytest.mark.parametrize("kind", STARTED_BY_HANDLER, ids=lambda kind: kind.name)
@WHERE
async def test_a_handler_that_prepares_its_response_learns_of_a_failing_commit(
    db: DBConnect, serve: Serve, tmp_path: Path, kind: Kind, where: str
) -> None:
    @web.middleware
    async def answer_409(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except IntegrityError:
            handled.set()
            return web.Response(status=409, text="handled")

    async def signal(request: web.Request) -> None:
        if not handled.is_set():
            await insert_row_that_fails_at_commit(db)

    handled = asyncio.Event()
    app = application(kind, tmp_path, signal, where)
    app.middlewares.append(answer_409)
    assert (await ask(await serve(app), "/inner/")).summary == (409, "handled")


@pytest.mark.parametrize("kind", STARTED_BY_HANDLER, ids=lambda kind: kind.name)
@WHERE
async def test_the_500_after_an_error_of_a_signal_handler_is_well_formed(
    db: DBConnect, database: Database, serve: Serve, tmp_path: Path, kind: Kind, where: str
) -> None:
    async def signal(request: web.Request) -> None:
        calls.append(request)
        if len(calls) == 1:
            await insert(db, "signal")
            raise LookupError

    calls: list[web.Request] = []
    answer = await ask(await serve(application(kind, tmp_path, signal, where)), "/inner/")
    assert answer.status == 500
    assert await database.names() == []


@WHERE
async def test_an_error_of_a_signal_handler_on_a_plain_response_leaves_nothing_behind(
    db: DBConnect, database: Database, serve: Serve, tmp_path: Path, where: str
) -> None:
    """aiohttp hangs up then."""

    async def signal(request: web.Request) -> None:
        await insert(db, "signal")
        raise LookupError

    async with Wire.connect(await serve(application(KINDS[0], tmp_path, signal, where))) as wire:
        await wire.send("/inner/")
        assert await wire.reader.read() == b""
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


@pytest.mark.parametrize("error", [web.HTTPNotFound, LookupError])
async def test_writes_of_signal_handlers_for_an_error_response_are_rolled_back(
    db: DBConnect, database: Database, serve: Serve, error: type[Exception]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise error

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        await insert(db, "signal")

    app = web.Application()
    app.router.add_get("/", handler)
    app.on_response_prepare.append(prepare)
    setup(app)
    assert (await ask(await serve(app))).status in (404, 500)
    assert await database.names() == []
