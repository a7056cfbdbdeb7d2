"""`setup` for an application, for a sub-application, for both, and twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.aiohttp.conftest import Serve, either_way
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.wire import Wire, ask

from ctxdb_aiohttp import setup
from ctxdb_core import ContextClosedError, ContextNotInitiatedError, DBConnect, commit_2xx, db_session

WHERE = pytest.mark.parametrize("where", ["outer", "inner", "both"])


def applications(handler: Handler, where: str, *, inner_middlewares: tuple[Middleware, ...] = ()) -> web.Application:
    """Return an application with a sub-application that handles ``/inner/``."""
    outer = web.Application()
    inner = web.Application(middlewares=inner_middlewares)
    inner.router.add_route("*", "/", handler)
    if where != "outer":
        setup(inner)
    outer.add_subapp("/inner", inner)
    if where != "inner":
        setup(outer)
    return outer


def answer_by(status: int) -> Middleware:
    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except IntegrityError:
            return web.Response(status=status, text="handled")

    return answer


@WHERE
async def test_a_request_has_one_unit_of_work(db: DBConnect, database: Database, serve: Serve, where: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        assert await db_session(db) is await db_session(db)
        return web.Response(status=int(request.query_string))

    base_url = await serve(applications(handler, where))
    assert (await ask(base_url, "/inner/?409")).status == 409
    assert await database.names() == []
    assert (await ask(base_url, "/inner/?201")).status == 201
    assert await database.names() == ["one"]


@WHERE
async def test_a_stream_and_a_body_work_on(db: DBConnect, database: Database, serve: Serve, where: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        session = await insert(db, f"{request.method} handler")

        async def body() -> AsyncGenerator[bytes, None]:
            assert await insert(db, f"{request.method} body") is session
            yield b"body"

        if request.method == "GET":
            return web.Response(body=body())
        response = web.StreamResponse()
        await response.prepare(request)
        async for chunk in body():
            await response.write(chunk)
        return response

    base_url = await serve(applications(handler, where))
    for method in ("GET", "POST"):
        assert (await ask(base_url, "/inner/", method)).summary == (200, "body")
    assert await database.names() == ["GET body", "GET handler", "POST body", "POST handler"]


async def test_the_outer_ones_options_hold(db: DBConnect, database: Database, serve: Serve) -> None:
    calls: list[str] = []

    async def outer_hook(session: AsyncSession) -> None:
        calls.append("outer")

    async def inner_hook(session: AsyncSession) -> None:
        calls.append("inner")

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, request.query_string)
        return web.Response(status=int(request.query_string))

    outer, inner = web.Application(), web.Application()
    inner.router.add_get("/", handler)
    setup(inner, before_commit=inner_hook)
    setup(outer, before_commit=outer_hook, commit_policy=commit_2xx)
    outer.add_subapp("/inner", inner)
    base_url = await serve(outer)
    assert (await ask(base_url, "/inner/?303")).status == 303
    assert (await ask(base_url, "/inner/?200")).status == 200
    assert await database.names() == ["200"]
    assert calls == ["outer"]


async def test_of_two_set_ups_the_last_one_holds(db: DBConnect, database: Database, serve: Serve) -> None:
    calls: list[str] = []

    async def first(session: AsyncSession) -> None:
        calls.append("first")

    async def last(session: AsyncSession) -> None:
        calls.append("last")

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app, before_commit=first)
    setup(app, before_commit=last)
    assert (await ask(await serve(app))).status == 200
    assert await database.names() == ["one"]
    assert calls == ["last"]


@WHERE
async def test_a_sub_applications_own_error_middleware_answers_first(db: DBConnect, serve: Serve, where: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        return web.Response(text="success")

    app = applications(handler, where, inner_middlewares=(answer_by(418),))
    app.middlewares.append(answer_by(409))
    base_url = await serve(app)
    # The first request is where the adapter finds its places.
    for _ in range(2):
        assert (await ask(base_url, "/inner/")).summary == (418, "handled")


@pytest.mark.parametrize("set_up", ["outer", "middle"])
async def test_the_innermost_of_several_applications_answers_first(db: DBConnect, serve: Serve, set_up: str) -> None:
    class View(web.View):
        async def get(self) -> web.StreamResponse:
            await insert_row_that_fails_at_commit(db)
            return web.Response(text="success")

    outer, middle = web.Application(middlewares=[answer_by(409)]), web.Application(middlewares=[answer_by(410)])
    inner = web.Application(middlewares=[answer_by(418)])
    inner.router.add_view("/", View)
    if set_up == "middle":
        setup(middle)
    middle.add_subapp("/inner", inner)
    outer.add_subapp("/middle", middle)
    if set_up == "outer":
        setup(outer)
    assert (await ask(await serve(outer), "/middle/inner/")).summary == (418, "handled")


async def test_a_sub_applications_middleware_sees_no_success_that_was_not_committed(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    seen: list[list[str]] = []

    @web.middleware
    async def look(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        seen.append(await database.names())
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    assert (await ask(await serve(applications(handler, "outer", inner_middlewares=(look,))), "/inner/")).status == 200
    assert seen == [["one"]]


@pytest.mark.parametrize("positioned", ["outer", "inner"])
async def test_a_position_holds_for_sub_applications_too(
    db: DBConnect, database: Database, serve: Serve, positioned: str
) -> None:
    @web.middleware
    async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
        await handler(request)
        return web.Response(status=422)

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    outer, inner = web.Application(), web.Application(middlewares=[refuse])
    inner.router.add_get("/", handler)
    if positioned == "inner":
        setup(inner, position=0)
    outer.add_subapp("/inner", inner)
    setup(outer, position=0 if positioned == "outer" else None)
    assert (await ask(await serve(outer), "/inner/")).status == 422
    assert await database.names() == []


async def test_each_attempt_of_a_sub_applications_middleware_begins_anew(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    attempts: list[web.Request] = []

    @web.middleware
    async def try_again(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except IntegrityError:
            return await handler(request)

    async def handler(request: web.Request) -> web.StreamResponse:
        attempts.append(request)
        await insert(db, f"attempt {len(attempts)}")
        if len(attempts) == 1:
            await insert_row_that_fails_at_commit(db)
        return web.Response()

    app = applications(handler, "outer", inner_middlewares=(try_again,))
    assert (await ask(await serve(app), "/inner/")).status == 200
    assert await database.names() == ["attempt 2"]


async def test_an_unknown_path_of_a_sub_application_reaches_its_middlewares(db: DBConnect, serve: Serve) -> None:
    @web.middleware
    async def replace(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPNotFound:
            await insert(db, "miss")
            return web.Response(text="instead")

    async def handler(request: web.Request) -> web.StreamResponse:
        raise AssertionError

    app = applications(handler, "outer", inner_middlewares=(replace,))
    assert (await ask(await serve(app), "/inner/unknown")).summary == (200, "instead")


async def test_old_style_middlewares_are_no_hindrance(db: DBConnect, database: Database, serve: Serve) -> None:
    async def factory(app: web.Application, handler: Handler) -> Handler:
        async def middleware(request: web.Request) -> web.StreamResponse:
            return await handler(request)

        return middleware

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    app = applications(handler, "outer")
    app.middlewares.append(factory)  # type: ignore[arg-type]  # as it was once
    with pytest.warns(DeprecationWarning, match="old-style middleware"):
        base_url = await serve(app)
    assert (await ask(base_url, "/inner/")).status == 200
    assert await database.names() == ["one"]


@WHERE
async def test_the_error_middleware_of_the_outer_application_answers_where_the_inner_one_has_none(
    db: DBConnect, serve: Serve, where: str
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        return web.Response(text="success")

    app = applications(handler, where)
    app.middlewares.append(answer_by(409))
    assert (await ask(await serve(app), "/inner/")).summary == (409, "handled")


async def test_a_new_attempt_keeps_what_the_sub_applications_middlewares_do_in_it(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    attempts = 0

    @web.middleware
    async def try_again(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except LookupError:
            return await handler(request)

    @web.middleware
    async def audit(request: web.Request, handler: Handler) -> web.StreamResponse:
        await insert(db, f"audit {attempts}")
        return await handler(request)

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal attempts
        attempts += 1
        await insert(db, f"attempt {attempts}")
        if attempts == 1:
            raise LookupError
        return web.Response()

    app = applications(handler, "both", inner_middlewares=(audit,))
    app.middlewares.append(try_again)
    assert (await ask(await serve(app), "/inner/")).status == 200
    assert await database.names() == ["attempt 2", "audit 1"]


async def test_a_middleware_around_a_sub_application_that_has_the_adapter_can_change_its_responses(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    @web.middleware
    async def set_cookie(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        assert not response.prepared
        response.set_cookie("name", "value")
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "handler")

        async def body() -> AsyncGenerator[bytes, None]:
            await insert(db, "body")
            yield b"body"

        return web.Response(body=body())

    app = applications(handler, "inner")
    app.middlewares.append(set_cookie)
    answer = await ask(await serve(app), "/inner/")
    assert answer.summary == (200, "body")
    assert answer.headers["set-cookie"].startswith("name=value")
    assert await database.names() == ["body", "handler"]


@either_way
async def test_a_middleware_around_a_sub_application_can_handle_requests_in_tasks_of_their_own(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    sessions: list[AsyncSession] = []

    @web.middleware
    async def in_a_task(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await asyncio.ensure_future(handler(request))

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        sessions.append(await insert(db, f"signal {request.query_string}"))

    async def handler(request: web.Request) -> web.StreamResponse:
        sessions.append(await insert(db, f"handler {request.query_string}"))

        async def body() -> AsyncGenerator[bytes, None]:
            assert {f"handler {request.query_string}", f"signal {request.query_string}"} <= {*await database.names()}
            assert database.checked_out == 0
            sessions.append(await insert(db, f"body {request.query_string}"))
            yield b"body"

        return web.Response(body=body())

    outer, inner = web.Application(middlewares=[in_a_task]), web.Application()
    inner.router.add_get("/", handler)
    inner.on_response_prepare.append(prepare)
    setup(inner)
    outer.add_subapp("/inner", inner)
    async with Wire.connect(await serve(outer)) as wire:
        for n in range(2):
            assert (await wire.ask(f"/inner/?{n}")).summary == (200, "body")
            assert len(set(sessions[3 * n :])) == 1
            assert f"body {n}" in await database.names()
    with pytest.raises(ContextClosedError):
        await sessions[0].execute(text("SELECT 1"))


@either_way
async def test_a_client_that_leaves_a_request_that_is_handled_in_a_task_of_its_own_ends_the_unit_of_work(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    sessions: list[AsyncSession] = []

    @web.middleware
    async def in_a_task(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await asyncio.ensure_future(handler(request))

    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            sessions.append(await insert(db, "body"))
            while True:
                yield bytes(1 << 16)

        return web.Response(body=body())

    outer, inner = web.Application(middlewares=[in_a_task]), web.Application()
    inner.router.add_get("/", handler)
    setup(inner)
    outer.add_subapp("/inner", inner)
    async with Wire.connect(await serve(outer)) as wire:
        await wire.send("/inner/")
        assert (await wire.read_head())[0] == 200
        await wire.reader.readexactly(1)
    await eventually(lambda: database.checked_out == 0, "the connection was not given back")
    with pytest.raises(ContextClosedError):
        await sessions[0].execute(text("SELECT 1"))
    assert await database.names() == []


async def test_a_middleware_around_a_sub_application_can_drop_its_response(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    @web.middleware
    async def replace(request: web.Request, handler: Handler) -> web.StreamResponse:
        await handler(request)
        return web.Response(text="instead")

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "handler")

        async def body() -> AsyncGenerator[bytes, None]:
            await insert(db, "body")
            yield b"body"

        return web.Response(body=body())

    app = applications(handler, "inner")
    app.middlewares.append(replace)
    assert (await ask(await serve(app), "/inner/")).summary == (200, "instead")
    assert await database.names() == ["handler"]


async def test_outside_of_a_sub_application_that_has_the_adapter_there_is_no_unit_of_work(
    db: DBConnect, serve: Serve
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        with pytest.raises(ContextNotInitiatedError):
            await db_session(db)
        return web.Response()

    app = applications(handler, "inner")
    app.router.add_get("/", handler)
    assert (await ask(await serve(app))).status == 200


async def test_an_application_that_is_started_inside_of_a_request_does_not_meet_it(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    async def ask_another(request: web.Request) -> web.StreamResponse:
        await insert(db, "first")
        assert (await ask(await serve(other))).status == 200
        assert await database.names() == ["second"]
        assert "write_headers" not in vars(request.writer)
        return web.Response(status=400)

    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, "second")
        return web.Response()

    app, other = web.Application(), web.Application()
    app.router.add_get("/", ask_another)
    other.router.add_get("/", write)
    setup(app)
    setup(other)
    assert (await ask(await serve(app))).status == 400
    assert await database.names() == ["second"]


async def test_two_applications_in_one_process_do_not_meet(db: DBConnect, database: Database, serve: Serve) -> None:
    """One asks the other while it has a session open itself."""

    async def ask_the_other(request: web.Request) -> web.StreamResponse:
        await insert(db, "first")
        assert (await ask(other_url)).status == 200
        return web.Response(status=400)

    async def write(request: web.Request) -> web.StreamResponse:
        await insert(db, "second")
        return web.Response()

    first, second = web.Application(), web.Application()
    first.router.add_get("/", ask_the_other)
    second.router.add_get("/", write)
    setup(first)
    setup(second)
    other_url = await serve(second)
    assert (await ask(await serve(first))).status == 400
    assert await database.names() == ["second"]
