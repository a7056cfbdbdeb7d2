"""The unit of work around an application as a whole, and the applications that keep it among their middlewares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Never

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import PrefixResource, UrlMappingMatchInfo
from sqlalchemy.exc import IntegrityError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, insert, insert_row_that_fails_at_commit
from tests.support.wire import ask

from ctxdb_aiohttp import setup
from ctxdb_core import DBConnect


async def name_callers(request: web.Request) -> web.Response:
    """Answer by the names of the coroutines that wait for this handler."""
    frame, names = inspect.currentframe(), []
    while frame is not None:
        names.append(frame.f_code.co_qualname.rpartition(".")[2])
        frame = frame.f_back
    return web.Response(text=" ".join(names))


def application(*setups: Callable[[web.Application], object]) -> web.Application:
    app = web.Application()
    app.router.add_get("/", name_callers)
    setup(app)
    for change in setups:
        change(app)
    return app


def add_middleware(app: web.Application) -> None:
    @web.middleware
    async def pass_on(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await handler(request)

    app.middlewares.append(pass_on)


def add_middleware_when_the_application_starts(app: web.Application) -> None:
    async def start(app: web.Application) -> None:
        add_middleware(app)

    app.on_startup.append(start)


def add_signal_handler(app: web.Application) -> None:
    async def look(request: web.Request, response: web.StreamResponse) -> None:
        """Do nothing."""

    app.on_response_prepare.append(look)


def add_sub_application(app: web.Application) -> None:
    app.add_subapp("/inner", web.Application())


async def test_an_application_without_middlewares_is_called_inside_of_the_unit_of_work(serve: Serve) -> None:
    callers = (await ask(await serve(application()))).text.split()
    assert callers[:3] == ["name_callers", "_handle", "open_unit"]


@pytest.mark.parametrize(
    "change",
    [add_middleware, add_middleware_when_the_application_starts, add_signal_handler, add_sub_application],
)
async def test_an_application_with_other_code_around_its_handlers_calls_its_middlewares(
    serve: Serve, change: Callable[[web.Application], object]
) -> None:
    callers = (await ask(await serve(application(change)))).text.split()
    assert callers.index("open_unit") < callers.index("_handle")


async def test_an_application_that_is_set_up_twice_calls_its_middlewares(serve: Serve) -> None:
    callers = (await ask(await serve(application(setup)))).text.split()
    assert callers.index("open_unit") < callers.index("_handle")


async def test_what_has_taken_the_place_of_the_method_that_handles_requests_sees_a_commit_that_fails(
    db: DBConnect, database: Database, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentry does so, to report the errors of an application."""
    seen: list[BaseException] = []
    handle = web.Application._handle

    async def report_errors(self: web.Application, request: web.Request) -> web.StreamResponse:
        try:
            return await handle(self, request)
        except Exception as exc:
            seen.append(exc)
            raise

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        return web.Response(text="success")

    monkeypatch.setattr(web.Application, "_handle", report_errors)
    app = web.Application()
    app.router.add_get("/", handler)
    setup(app)
    assert (await ask(await serve(app))).status == 500
    assert [type(each) for each in seen] == [IntegrityError]
    assert await database.names() == []


async def test_an_application_of_an_aiohttp_that_runs_its_middlewares_in_any_case_commits_once(
    db: DBConnect, database: Database, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of aiohttp that has other private names must not have two units of work for a request."""
    # This attribute cannot be set: what is written to it is lost.
    always = property(lambda app: True, lambda app, value: None)
    monkeypatch.setattr(web.Application, "_run_middlewares", always, raising=False)

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response(text="success")

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app)
    assert (await ask(await serve(app))).status == 200
    assert await database.names() == ["one"]


class Mount(PrefixResource):
    """A resource of the application's own, which hands requests to another application, with its middlewares."""

    def __init__(self, prefix: str, app: web.Application) -> None:
        super().__init__(prefix)
        self._app = app
        app.pre_freeze()

    def url_for(self, **parts: str) -> Never:
        raise NotImplementedError

    def get_info(self) -> Never:
        raise NotImplementedError

    async def resolve(self, request: web.Request) -> tuple[UrlMappingMatchInfo | None, set[str]]:
        found = await self._app.router.resolve(request)
        found.add_app(self._app)
        return found, set()

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        return iter(())


@web.middleware
async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
    raise web.HTTPUnauthorized


async def test_the_middlewares_of_an_application_behind_a_resource_of_an_unknown_class_are_called(serve: Serve) -> None:
    inner = web.Application(middlewares=[refuse])
    inner.router.add_get("/inner/secret", name_callers)
    app = application(lambda app: app.router.register_resource(Mount("/inner", inner)))
    assert (await ask(await serve(app), "/inner/secret")).status == 401
