"""Other middlewares, on either side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, insert, insert_row_that_fails_at_commit
from tests.support.wire import ask

from ctxdb_aiohttp import setup
from ctxdb_core import DBConnect, commit_2xx, db_session


def application(handler: Handler, *middlewares: Middleware) -> web.Application:
    app = web.Application(middlewares=middlewares)
    app.router.add_route("*", "/", handler)
    return app


ORDERS = pytest.mark.parametrize("order", ["before", "after", "in_front"])


def set_up(app: web.Application, middleware: Middleware, order: str) -> None:
    """Add a middleware before, after, or after and in front of ours."""
    if order == "before":
        app.middlewares.append(middleware)
    setup(app)
    if order == "after":
        app.middlewares.append(middleware)
    elif order == "in_front":
        app.middlewares.insert(0, middleware)


@ORDERS
async def test_a_middleware_can_use_the_database_before_and_after_the_handler(
    db: DBConnect, database: Database, serve: Serve, order: str
) -> None:
    @web.middleware
    async def audit(request: web.Request, handler: Handler) -> web.StreamResponse:
        session = await insert(db, "before")
        response = await handler(request)
        assert await insert(db, "after") is session
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "handler")
        return web.Response()

    app = application(handler)
    set_up(app, audit, order)
    assert (await ask(await serve(app))).status == 200
    assert await database.names() == ["after", "before", "handler"]


async def test_work_of_a_middleware_that_cannot_be_committed_is_a_500(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    @web.middleware
    async def audit(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        await insert(db, "after")
        await insert_row_that_fails_at_commit(db)
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "handler")
        return web.Response(text="success")

    app = application(handler, audit)
    setup(app)
    answer = await ask(await serve(app))
    assert answer.status == 500
    assert "success" not in answer.text
    assert await database.names() == ["handler"]


@ORDERS
@pytest.mark.parametrize(("status", "expected"), [(202, ["one"]), (303, ["one"]), (404, []), (500, [])])
async def test_an_error_that_a_middleware_answers_counts_by_the_status_of_its_answer(
    db: DBConnect, database: Database, serve: Serve, order: str, status: int, expected: list[str]
) -> None:
    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except LookupError:
            return web.Response(status=status, text="handled")

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        raise LookupError

    app = application(handler)
    set_up(app, answer, order)
    assert (await ask(await serve(app))).summary == (status, "handled")
    assert await database.names() == expected


@ORDERS
async def test_an_error_response_that_a_middleware_replaces_by_a_success_is_committed(
    db: DBConnect, database: Database, serve: Serve, order: str
) -> None:
    @web.middleware
    async def forgive(request: web.Request, handler: Handler) -> web.StreamResponse:
        await handler(request)
        return web.Response(text="forgiven")

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response(status=404)

    app = application(handler)
    set_up(app, forgive, order)
    assert (await ask(await serve(app))).summary == (200, "forgiven")
    assert await database.names() == ["one"]


@ORDERS
async def test_a_middleware_sees_no_success_that_was_not_committed(
    db: DBConnect, database: Database, serve: Serve, order: str
) -> None:
    """It may keep it for the next who asks."""
    seen: list[object] = []

    @web.middleware
    async def remember(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except Exception as exc:
            seen.append(type(exc))
            raise
        seen.append((response.status, await database.names()))
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        if request.method == "POST":
            await insert_row_that_fails_at_commit(db)
        return web.Response()

    app = application(handler)
    set_up(app, remember, order)
    base_url = await serve(app)
    assert (await ask(base_url, method="POST")).status == 500
    assert (await ask(base_url)).status == 200
    assert seen == [IntegrityError, (200, ["one"])]


async def test_a_middleware_that_is_added_while_the_application_starts_learns_of_a_commit_that_fails(
    db: DBConnect, serve: Serve
) -> None:
    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except IntegrityError:
            return web.Response(status=409, text="handled")

    async def add_middleware(app: web.Application) -> None:
        app.middlewares.append(answer)

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        return web.Response(text="success")

    app = application(handler)
    setup(app)
    app.on_startup.append(add_middleware)
    assert (await ask(await serve(app))).summary == (409, "handled")


async def test_attributes_of_the_handler_reach_the_middlewares(db: DBConnect, serve: Serve) -> None:
    """They ask it, for instance, whether it needs a login."""
    seen: list[object] = []

    @web.middleware
    async def look(request: web.Request, handler: Handler) -> web.StreamResponse:
        seen.append((handler.__name__, handler.public))  # type: ignore[attr-defined]  # see above
        return await handler(request)

    async def add_middleware(app: web.Application) -> None:
        app.middlewares.append(look)

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response()

    handler.public = True  # type: ignore[attr-defined]  # see above
    app = application(handler, look)
    setup(app)
    app.on_startup.append(add_middleware)
    assert (await ask(await serve(app))).status == 200
    assert seen == [("handler", True)] * 2


async def test_at_position_0_a_middleware_can_still_turn_a_success_into_an_error(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    @web.middleware
    async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
        await handler(request)
        assert await database.names() == []
        return web.Response(status=422)

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    app = web.Application(middlewares=[refuse])
    app.router.add_get("/", handler)
    setup(app, position=0)
    assert (await ask(await serve(app))).status == 422
    assert await database.names() == []


async def test_a_position_is_between_the_applications_own_middlewares(
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

    app = application(handler)
    setup(app, position=1)
    app.middlewares.extend([look, look])
    assert (await ask(await serve(app))).status == 200
    assert seen == [[], ["one"]]


async def test_response_that_a_middleware_makes_of_the_handlers_result_decides(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    """Handlers may return what they like, as long as a middleware makes a response of it."""

    @web.middleware
    async def respond(request: web.Request, handler: Handler) -> web.StreamResponse:
        status: object = await handler(request)
        assert isinstance(status, int)
        return web.Response(status=status)

    async def handler(request: web.Request) -> web.StreamResponse:
        status = 400 if request.method == "POST" else 200
        await insert(db, str(status))
        return status  # type: ignore[return-value]  # see above

    app = application(handler, respond)
    setup(app)
    base_url = await serve(app)
    assert (await ask(base_url, method="POST")).status == 400
    assert (await ask(base_url)).status == 200
    assert await database.names() == ["200"]


async def test_a_handler_that_returns_nothing_is_rolled_back(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return None  # type: ignore[return-value]  # a mistake that aiohttp answers

    app = application(handler)
    setup(app)
    assert (await ask(await serve(app))).status == 500
    assert await database.names() == []


async def test_a_middleware_that_answers_by_itself_is_committed(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    @web.middleware
    async def log_in(request: web.Request, handler: Handler) -> web.StreamResponse:
        await insert(db, "visit")
        raise web.HTTPSeeOther("/login")

    async def handler(request: web.Request) -> web.StreamResponse:
        raise AssertionError

    app = application(handler, log_in)
    setup(app)
    assert (await ask(await serve(app))).status == 303
    assert await database.names() == ["visit"]


async def test_a_middleware_may_pass_a_copy_of_the_request_on(db: DBConnect, database: Database, serve: Serve) -> None:
    @web.middleware
    async def forwarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await handler(request.clone(scheme="https"))

    async def handler(request: web.Request) -> web.StreamResponse:
        session = await insert(db, "response")
        response = web.StreamResponse()
        await response.prepare(request)
        assert database.checked_out == 0
        assert await db_session(db) is session
        return response

    async def fail(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        await web.StreamResponse().prepare(request)
        raise AssertionError

    app = application(handler, forwarded)
    app.router.add_get("/fail", fail)
    setup(app)
    base_url = await serve(app)
    assert (await ask(base_url)).status == 200
    assert (await ask(base_url, "/fail")).status == 500
    assert await database.names() == ["response"]


async def test_a_middleware_with_a_time_limit_rolls_back(db: DBConnect, database: Database, serve: Serve) -> None:
    @web.middleware
    async def limit(request: web.Request, handler: Handler) -> web.StreamResponse:
        waiting = asyncio.ensure_future(handler(request))
        await entered.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        return web.Response(status=504)

    async def handler(request: web.Request) -> web.StreamResponse:
        session = await insert(db, "one")
        entered.set()
        await session.execute(text("SELECT pg_sleep(300)"))
        return web.Response()

    entered = asyncio.Event()
    app = application(handler, limit)
    setup(app)
    assert (await ask(await serve(app))).status == 504
    assert await database.names() == []


@ORDERS
async def test_paths_are_normalized_on_either_side(db: DBConnect, database: Database, serve: Serve, order: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    app = web.Application()
    app.router.add_get("/path/", handler)
    set_up(app, web.normalize_path_middleware(), order)
    base_url = await serve(app)
    answer = await ask(base_url, "/path")
    assert (answer.status, answer.headers["location"]) == (308, "/path/")
    assert (await ask(base_url, "/path/")).status == 200
    assert await database.names() == ["one"]


async def test_a_policy_decides_on_what_the_middlewares_have_made(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    @web.middleware
    async def redirect(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except LookupError as exc:
            raise web.HTTPSeeOther("/elsewhere") from exc

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        raise LookupError

    app = application(handler, redirect)
    setup(app, commit_policy=commit_2xx)
    assert (await ask(await serve(app))).status == 303
    assert await database.names() == []


async def test_a_middleware_can_wrap_a_body_that_uses_the_database(
    db: DBConnect, database: Database, serve: Serve
) -> None:
    @web.middleware
    async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        assert isinstance(response, web.Response)

        async def body() -> AsyncGenerator[bytes, None]:
            await insert(db, "body")
            yield b"wrapped"

        response.body = body()
        del response.headers["Content-Type"]
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "handler")
        return web.Response(text="body")

    app = application(handler, note)
    setup(app)
    assert (await ask(await serve(app))).summary == (200, "wrapped")
    assert await database.names() == ["body", "handler"]
