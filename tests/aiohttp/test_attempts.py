"""Middlewares that call the handler again: each attempt begins anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from sqlalchemy.exc import DBAPIError, IntegrityError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, insert, insert_row_that_fails_at_commit
from tests.support.wire import ask

from ctxdb_aiohttp import setup
from ctxdb_core import ContextClosedError, DBConnect, db_session


def application(handler: Handler) -> web.Application:
    app = web.Application()
    app.router.add_route("*", "/", handler)
    return app


@pytest.mark.parametrize("order", ["before", "after", "in_front"])
async def test_each_attempt_of_a_middleware_that_tries_again_begins_anew(
    db: DBConnect, database: Database, serve: Serve, order: str
) -> None:
    attempts = 0

    @web.middleware
    async def try_again(request: web.Request, handler: Handler) -> web.StreamResponse:
        while True:
            try:
                return await handler(request)
            except DBAPIError:
                assert attempts < 4

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal attempts
        attempts += 1
        await insert(db, f"attempt {attempts}")
        if attempts == 1:
            await insert(db, "attempt 1")
        elif attempts == 2:
            await insert_row_that_fails_at_commit(db)
        return web.Response()

    app = application(handler)
    if order == "before":
        app.middlewares.append(try_again)
    setup(app)
    if order == "after":
        app.middlewares.append(try_again)
    elif order == "in_front":
        app.middlewares.insert(0, try_again)
    assert (await ask(await serve(app))).status == 200
    assert await database.names() == ["attempt 3"]


async def test_a_middleware_outside_of_all_can_try_again(db: DBConnect, database: Database, serve: Serve) -> None:
    """Where it stays outside: in the application around the one that has the adapter."""
    attempts = 0

    @web.middleware
    async def try_again(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except LookupError:
            return await handler(request)

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal attempts
        attempts += 1
        await insert(db, f"attempt {attempts}")
        if attempts == 1:
            raise LookupError
        return web.Response(text="success")

    inner = application(handler)
    setup(inner)
    app = web.Application(middlewares=[try_again])
    app.add_subapp("/inner", inner)
    assert (await ask(await serve(app), "/inner/")).summary == (200, "success")
    assert await database.names() == ["attempt 2"]


async def test_a_middleware_outside_of_all_can_try_again_after_a_response(db: DBConnect, serve: Serve) -> None:
    """Although that response has a body that may use the database, and does not know that it is not wanted."""

    @web.middleware
    async def try_again(request: web.Request, handler: Handler) -> web.StreamResponse:
        assert (await handler(request)).status == 503
        try:
            return await handler(request)
        except IntegrityError:
            return web.Response(status=409, text="handled")

    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            yield b"body"

        attempts.append(request)
        if len(attempts) == 1:
            return web.Response(body=body(), status=503)
        await insert_row_that_fails_at_commit(db)
        await web.StreamResponse().prepare(request)
        raise AssertionError

    attempts: list[web.Request] = []
    inner = application(handler)
    setup(inner)
    app = web.Application(middlewares=[try_again])
    app.add_subapp("/inner", inner)
    assert (await ask(await serve(app), "/inner/")).summary == (409, "handled")


@pytest.mark.parametrize("writes", [True, False])
async def test_an_attempt_may_succeed_while_one_that_was_given_up_goes_on(
    db: DBConnect, database: Database, serve: Serve, writes: bool
) -> None:
    entered, answered = asyncio.Event(), asyncio.Event()
    first: list[asyncio.Task[web.StreamResponse]] = []
    errors: list[BaseException] = []

    @web.middleware
    async def try_again(request: web.Request, handler: Handler) -> web.StreamResponse:
        first.append(asyncio.ensure_future(handler(request)))
        await entered.wait()
        response = await handler(request)
        try:
            await db_session(db)
        except ContextClosedError as exc:
            errors.append(exc)
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        if not entered.is_set():
            entered.set()
            await answered.wait()
            await insert(db, "too late")
        if writes:
            await insert(db, "second")
        return web.Response()

    app = application(handler)
    app.middlewares.append(try_again)
    setup(app)
    assert (await ask(await serve(app))).status == 200
    answered.set()
    with pytest.raises(ContextClosedError):
        await first[0]
    assert await database.names() == (["second"] if writes else [])
    assert len(errors) == writes
