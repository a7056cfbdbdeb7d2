"""What `setup` takes, and what it does when the application starts and ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, eventually, insert
from tests.support.frameworks.aiohttp import serve_aiohttp
from tests.support.wire import Wire, ask

from ctxdb_aiohttp import DATABASES, ApplicationFrozenError, setup
from ctxdb_core import ArgumentTypeError, CtxDBError, DBConnect, new_db_ctx, on_commit, on_rollback


async def write(db: DBConnect, name: str) -> None:
    async with new_db_ctx():
        await insert(db, name)


class FailingToClose(DBConnect):
    async def close(self) -> None:
        await super().close()
        raise OSError


@pytest.mark.parametrize("wrong", ["postgresql+asyncpg://app:secret@127.0.0.1/app", None, DBConnect, object()])
def test_value_that_is_no_database_is_refused_without_its_secrets(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="DBConnect") as caught:
        setup(web.Application(), wrong)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("wrong", [None, web.Application, DBConnect.from_url("sqlite+aiosqlite://")])
def test_value_that_is_no_application_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"web\.Application"):
        setup(wrong)


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="position=-1"):
        setup(web.Application(), position=-1)


def test_a_position_that_is_no_number_is_refused() -> None:
    with pytest.raises(CtxDBError, match="position='0'"):
        setup(web.Application(), position="0")  # type: ignore[arg-type]  # the mistake


async def test_an_application_that_has_started_is_refused() -> None:
    app = web.Application()
    async with serve_aiohttp(app):
        with pytest.raises(ApplicationFrozenError, match="has been started"):
            setup(app)


async def test_an_application_that_is_starting_is_refused() -> None:
    errors: list[CtxDBError] = []

    async def start(app: web.Application) -> None:
        with pytest.raises(ApplicationFrozenError) as refused:
            setup(app)
        errors.append(refused.value)

    app = web.Application()
    app.on_startup.append(start)
    async with serve_aiohttp(app):
        assert len(errors) == 1


def test_an_application_that_was_added_to_another_is_refused() -> None:
    app = web.Application()
    web.Application().add_subapp("/inner", app)
    with pytest.raises(ApplicationFrozenError, match="add_subapp"):
        setup(app)


def test_a_refused_set_up_changes_nothing() -> None:
    app = web.Application()
    with pytest.raises(TypeError):
        setup(app, None)  # type: ignore[arg-type]  # the mistake
    assert len(app.middlewares) == len(app.on_response_prepare) == 0


def test_the_databases_are_kept_in_the_application(db: DBConnect, database: Database) -> None:
    second = database.connect()
    app = web.Application()
    setup(app, db)
    assert app[DATABASES] == (db,)
    setup(app, second)
    assert app[DATABASES] == (db, second)


async def test_the_clean_up_closes_every_database_even_if_one_fails(database: Database) -> None:
    failing = FailingToClose(lambda host: database.watch_new(), host="127.0.0.1")
    dbs = [database.connect(), failing, database.connect()]
    app = web.Application()
    setup(app, *dbs)
    with pytest.raises(OSError):  # noqa: PT011 - there is no text
        async with serve_aiohttp(app):
            for number, db in enumerate(dbs):
                await write(db, str(number))
            assert database.backends("true")
    await eventually(lambda: not database.backends("true"), "connections outlived the application")


@pytest.mark.parametrize("where", ["context", "signal"])
async def test_a_start_that_fails_closes_the_databases_too(db: DBConnect, database: Database, where: str) -> None:
    async def start(app: web.Application) -> None:
        await write(db, "one")
        assert database.backends("true")
        raise LookupError

    async def context(app: web.Application) -> AsyncIterator[None]:
        await start(app)
        yield

    app = web.Application()
    if where == "context":
        app.cleanup_ctx.append(context)
    else:
        app.on_startup.append(start)
    setup(app, db)
    with pytest.raises(LookupError):
        async with serve_aiohttp(app):
            raise AssertionError
    await eventually(lambda: not database.backends("true"), "connections outlived the application")


@pytest.mark.parametrize("order", ["before", "after"])
async def test_databases_that_others_use_while_they_clean_up_are_closed_after_them(
    db: DBConnect, database: Database, order: str
) -> None:
    async def context(app: web.Application) -> AsyncIterator[None]:
        yield
        await write(db, "context")

    async def clean_up(app: web.Application) -> None:
        await write(db, "signal")

    app = web.Application()
    if order == "before":
        setup(app, db)
    app.cleanup_ctx.append(context)
    app.on_cleanup.append(clean_up)
    if order == "after":
        setup(app, db)
    async with serve_aiohttp(app):
        pass
    await eventually(lambda: not database.backends("true"), "connections outlived the application")
    assert await database.names() == ["context", "signal"]


async def test_the_databases_of_a_sub_application_are_closed(db: DBConnect, database: Database, serve: Serve) -> None:
    inner, app = web.Application(), web.Application()
    setup(inner, db)
    app.add_subapp("/inner", inner)
    async with serve_aiohttp(app):
        await write(db, "one")
    await eventually(lambda: not database.backends("true"), "connections outlived the application")


async def test_databases_need_not_be_named(db: DBConnect, database: Database, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app)
    assert (await ask(await serve(app))).status == 200
    assert await database.names() == ["one"]


async def test_before_commit_is_called_once_for_each_session(db: DBConnect, database: Database, serve: Serve) -> None:
    async def hook(session: object) -> None:
        sessions.append(session)

    async def handler(request: web.Request) -> web.StreamResponse:
        used.append(await insert(db, "one"))
        return web.Response()

    sessions: list[object] = []
    used: list[object] = []
    app = web.Application()
    app.router.add_get("/", handler)
    setup(app, before_commit=hook)
    assert (await ask(await serve(app))).status == 200
    assert sessions == used


async def test_a_request_that_uses_no_database_leaves_nothing_on_its_writer(serve: Serve) -> None:
    writers: list[object] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        writers.append(request.writer)
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app)
    assert (await ask(await serve(app))).status == 200
    assert not {"write_headers", "write_eof"} & set(vars(writers[0]))


async def look(request: web.Request, response: web.StreamResponse) -> None:
    """Do nothing, as a handler for ``on_response_prepare``."""


@web.middleware
async def pass_on(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await handler(request)


AROUND = pytest.mark.parametrize("around", ["nothing", "a middleware", "a signal handler"])


def application(handler: Handler, around: str, **options: Any) -> web.Application:
    app = web.Application(middlewares=[pass_on] if around == "a middleware" else [])
    app.router.add_get("/", handler)
    if around == "a signal handler":
        app.on_response_prepare.append(look)
    setup(app, **options)
    return app


@AROUND
async def test_a_policy_that_fails_is_a_500_and_leaves_nothing_behind(
    db: DBConnect, database: Database, serve: Serve, around: str
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response()

    def policy(status: int) -> bool:
        raise LookupError

    base_url = await serve(application(handler, around, commit_policy=policy))
    async with Wire.connect(base_url) as wire:
        assert (await wire.ask("/")).status == 500
        # The connection of the client is still there.
        assert database.checked_out == 0
    assert await database.names() == []


@AROUND
async def test_an_error_is_rolled_back_whatever_the_policy_makes_of_its_answer(
    db: DBConnect, database: Database, serve: Serve, around: str
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        raise LookupError

    base_url = await serve(application(handler, around, commit_policy=lambda status: True))
    assert (await ask(base_url)).status == 500
    assert await database.names() == []


@AROUND
@pytest.mark.parametrize(("status", "called"), [(200, ["committed"]), (404, ["rolled back"])])
async def test_callbacks_are_called_for_a_request_without_a_session(
    db: DBConnect, serve: Serve, around: str, status: int, called: list[str]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        on_commit(db, lambda: calls.append("committed"))
        on_rollback(db, lambda: calls.append("rolled back"))
        return web.Response(status=status)

    calls: list[str] = []
    assert (await ask(await serve(application(handler, around)))).status == status
    assert calls == called


async def test_a_policy_may_take_the_request(db: DBConnect, database: Database, serve: Serve) -> None:
    def policy(status: int, request: web.Request) -> bool:
        return status < 400 and request.method == "POST"

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, f"{request.method} {request.path}")
        response = web.Response() if request.path == "/plain" else web.StreamResponse()
        if request.path == "/prepared":
            await response.prepare(request)
        return response

    app = web.Application()
    app.router.add_route("*", "/{path}", handler)
    setup(app, commit_policy=policy)
    base_url = await serve(app)
    for path in ("/plain", "/prepared"):
        for method in ("GET", "POST"):
            assert (await ask(base_url, path, method)).status == 200
    assert await database.names() == ["POST /plain", "POST /prepared"]


@pytest.mark.parametrize("wrong", [lambda: True, lambda status, request, more: True, 200, None])
def test_value_that_is_no_policy_is_refused(wrong: Any) -> None:
    app = web.Application()
    with pytest.raises(TypeError, match="commit policy"):
        setup(app, commit_policy=wrong)
    assert len(app.middlewares) == 0
