"""Every kind of response: committed before it starts, or replaced by the one of the error."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.replies import KINDS, STARTED_BY_HANDLER, Kind
from tests.support.wire import Wire, ask

from ctxdb_aiohttp import setup
from ctxdb_core import DBConnect, db_session

Work = Callable[[web.Request], Awaitable[object]]

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
kinds_of_handlers = pytest.mark.parametrize("kind", STARTED_BY_HANDLER, ids=lambda kind: kind.name)


@web.middleware
async def answer_409(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except IntegrityError:
        return web.Response(status=409, text="handled")


@web.middleware
async def do_nothing(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await handler(request)


def application(kind: Kind, directory: Path, work: Work) -> web.Application:
    async def handler(request: web.Request) -> web.StreamResponse:
        await work(request)
        return await kind.make(request, directory / "file.txt")

    app = web.Application()
    app.router.add_route("*", "/", handler)
    return app


@kinds
async def test_response_is_committed_before_its_first_byte(
    db: DBConnect, database: Database, serve: Serve, tmp_path: Path, kind: Kind
) -> None:
    async def work(request: web.Request) -> None:
        await insert(db, "one")

    app = application(kind, tmp_path, work)
    setup(app)
    async with Wire.connect(await serve(app)) as wire:
        await wire.send("/")
        status, _ = await wire.read_head()
        assert await database.names() == ["one"]
        assert database.checked_out == 0
        await wire.read_to_end()
    assert status == kind.status


@kinds
async def test_the_body_of_a_response_arrives_whole(db: DBConnect, serve: Serve, tmp_path: Path, kind: Kind) -> None:
    async def work(request: web.Request) -> None:
        await insert(db, "one")

    app = application(kind, tmp_path, work)
    setup(app)
    answer = await ask(await serve(app))
    body = zlib.decompress(answer.body) if "content-encoding" in answer.headers else answer.body
    assert (answer.status, body.decode()) == (kind.status, kind.body)


@kinds
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_if_the_commit_fails_a_500_is_sent_instead(
    db: DBConnect, database: Database, serve: Serve, tmp_path: Path, kind: Kind, method: str
) -> None:
    async def work(request: web.Request) -> None:
        calls.append(request)
        await insert_row_that_fails_at_commit(db)

    calls: list[web.Request] = []
    app = application(kind, tmp_path, work)
    setup(app)
    answer = await ask(await serve(app), method=method)
    assert answer.status == 500
    assert "success" not in answer.text
    assert "set-cookie" not in answer.headers
    assert len(calls) == 1


@kinds
@pytest.mark.parametrize("order", ["before", "after", "in_front"])
async def test_if_the_commit_fails_the_applications_error_middleware_answers(
    db: DBConnect, serve: Serve, tmp_path: Path, kind: Kind, order: str
) -> None:
    async def work(request: web.Request) -> None:
        await insert_row_that_fails_at_commit(db)

    app = application(kind, tmp_path, work)
    app.middlewares.extend([answer_409, do_nothing] if order == "before" else [do_nothing])
    setup(app)
    if order == "after":
        app.middlewares.append(answer_409)
    elif order == "in_front":
        app.middlewares.insert(0, answer_409)
    answer = await ask(await serve(app))
    assert answer.summary == (409, "handled")


@kinds_of_handlers
async def test_a_handler_that_answers_a_failing_start_by_another_response_has_its_way(
    db: DBConnect, database: Database, serve: Serve, tmp_path: Path, kind: Kind
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        try:
            return await kind.make(request, tmp_path / "file.txt")
        except IntegrityError:
            await insert(db, "instead")
            return web.Response(text="instead")

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app)
    answer = await ask(await serve(app))
    assert answer.summary == (200, "instead")
    assert await database.names() == ["instead"]


async def test_a_start_for_which_the_policy_fails_is_refused(db: DBConnect, database: Database, serve: Serve) -> None:
    def policy(status: int) -> bool:
        if status == 201:
            raise LookupError
        return True

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        with pytest.raises(LookupError):
            await web.StreamResponse(status=201).prepare(request)
        return web.Response(text="instead")

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app, commit_policy=policy)
    assert (await ask(await serve(app))).summary == (200, "instead")
    assert await database.names() == []


@pytest.mark.parametrize("where", ["outer", "inner"])
async def test_a_response_that_was_refused_is_never_sent(db: DBConnect, serve: Serve, where: str) -> None:
    """Whoever returns it all the same."""

    async def swallow(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        response = web.StreamResponse()
        for step in (response.prepare(request), response.write(b"success"), response.write_eof(b"success")):
            try:
                await step
            except Exception as exc:  # noqa: BLE001 - that is what swallowing is
                errors.append(type(exc))
        return response

    @web.middleware
    async def respond(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await swallow(request)

    errors: list[type[Exception]] = []
    app = web.Application(middlewares=[answer_409, respond] if where == "outer" else [answer_409])
    app.router.add_get("/", swallow)
    setup(app)
    answer = await ask(await serve(app))
    assert answer.status == (500 if where == "outer" else 409)
    assert "success" not in answer.text
    assert errors == [IntegrityError, RuntimeError, AssertionError]


async def test_length_of_a_refused_response_does_not_apply_to_the_next_one(db: DBConnect, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        response = web.StreamResponse()
        response.content_length = 4
        with pytest.raises(IntegrityError):
            await response.prepare(request)
        instead = web.StreamResponse(status=409)
        instead.enable_chunked_encoding()
        await instead.prepare(request)
        await instead.write(b"longer than that")
        return instead

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app)
    assert (await ask(await serve(app))).summary == (409, "longer than that")


async def test_a_response_that_was_refused_cannot_be_prepared_again(db: DBConnect, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        response = web.StreamResponse()
        with pytest.raises(IntegrityError):
            await response.prepare(request)
        await response.prepare(request)
        await response.write(b"success")
        return response

    app = web.Application(middlewares=[answer_409])
    app.router.add_get("/", handler)
    setup(app)
    assert (await ask(await serve(app))).summary == (409, "handled")


async def test_an_error_waits_for_a_statement_of_another_task_of_its_request(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handle(request: web.Request) -> web.Response:
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        tasks.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(0.3)"))))
        await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no statement")
        return web.Response(status=400)

    tasks: list[asyncio.Task[object]] = []
    app = web.Application()
    app.router.add_get("/", handle)
    setup(app)
    assert (await ask(await serve(app))).status == 400
    # The statement was not interrupted.
    await tasks[0]


def with_line_break_in_header() -> web.Response:
    return web.Response(headers={"X-Name": "a\r\nb"})


def with_line_break_in_name() -> web.Response:
    return web.Response(headers={"X-Na\nme": "a"})


def with_line_break_in_cookie() -> web.Response:
    response = web.Response()
    response.set_cookie("name", "value", path="/\r\n")
    return response


def with_control_character_in_reason() -> web.Response:
    return web.Response(reason="\x00")


def redirecting_with_control_character() -> web.Response:
    return web.HTTPFound("/", headers={"X-Name": "\x7f"})


@pytest.mark.parametrize("has_middleware", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        with_line_break_in_header,
        with_line_break_in_name,
        with_line_break_in_cookie,
        with_control_character_in_reason,
        redirecting_with_control_character,
    ],
)
async def test_a_response_whose_head_cannot_be_sent_commits_nothing(
    db: DBConnect, database: Database, serve: Serve, make: Callable[[], web.Response], has_middleware: bool
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "undone")
        response = make()
        if isinstance(response, web.HTTPException):
            raise response
        return response

    app = web.Application(middlewares=[do_nothing] if has_middleware else [])
    app.router.add_get("/", handler)
    setup(app)
    async with Wire.connect(await serve(app)) as wire:
        assert (await wire.ask("/")).status == 500
    assert await database.names() == []


@kinds_of_handlers
async def test_a_handler_that_prepares_a_head_that_cannot_be_sent_commits_nothing(
    db: DBConnect, database: Database, serve: Serve, tmp_path: Path, kind: Kind
) -> None:
    async def work(request: web.Request) -> None:
        await insert(db, "undone")

    async def break_header(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Name"] = "a\r\nb"

    app = application(kind, tmp_path, work)
    app.on_response_prepare.append(break_header)
    setup(app)
    async with Wire.connect(await serve(app)) as wire:
        await wire.send("/")
        await wire.read_to_end()
    assert await database.names() == []


async def test_a_tab_and_a_letter_beyond_ascii_in_a_header_are_sent(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "stored")
        return web.Response(headers={"X-Name": "a\té\xa0"})

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app)
    async with Wire.connect(await serve(app)) as wire:
        assert (await wire.ask("/")).status == 200
    assert await database.names() == ["stored"]
