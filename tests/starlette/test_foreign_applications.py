"""What a Starlette or FastAPI application is built of: middlewares that are entered, and applications left alone."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Host, Mount, Route, Router
from tests.support.connection import Connection
from tests.support.database import Database, insert
from tests.support.foreign import EndlessApplication, InASGI, InASGI3, WSGIApplication, asgi2, wsgi
from tests.support.stacks import Ask, DoNothing

from ctxdb_core import DBConnect
from ctxdb_core.asgi import ASGIApp, Message, Receive, Scope, Send
from ctxdb_starlette import DBSessionMiddleware

# --- applications that are left alone ---------------------------------------------------------------------------------


FOREIGN = pytest.mark.parametrize(
    "foreign",
    [
        lambda: InASGI(wsgi),
        lambda: InASGI(WSGIApplication()),
        lambda: InASGI3(asgi2),
        lambda: InASGI3(lambda scope: InASGI3(asgi2).app(scope)),
        EndlessApplication,
    ],
    ids=["wsgi", "wsgi object", "asgi 2", "asgi 2 in asgi 2", "endless"],
)


def in_a_mount(foreign: Any) -> list[BaseRoute]:
    return [Mount("/", foreign)]


def in_a_mount_with_a_middleware(foreign: Any) -> list[BaseRoute]:
    return [Mount("/", foreign, middleware=[Middleware(DoNothing)])]


def in_a_host(foreign: Any) -> list[BaseRoute]:
    return [Host("test", foreign), Host("127.0.0.1", foreign)]


def in_a_route(foreign: Any) -> list[BaseRoute]:
    return [Route("/", foreign)]


def in_a_route_with_a_middleware(foreign: Any) -> list[BaseRoute]:
    return [Route("/", foreign, middleware=[Middleware(DoNothing)])]


def in_an_application_that_is_mounted(foreign: Any) -> list[BaseRoute]:
    inner = Starlette(routes=[Mount("/", foreign)])
    inner.add_middleware(DoNothing)
    return [Mount("/", inner)]


def in_a_middleware_that_is_mounted(foreign: Any) -> list[BaseRoute]:
    return [Mount("/", GZipMiddleware(foreign))]


@FOREIGN
@pytest.mark.parametrize(
    "place",
    [
        in_a_mount,
        in_a_mount_with_a_middleware,
        in_a_host,
        in_a_route,
        in_a_route_with_a_middleware,
        in_an_application_that_is_mounted,
        in_a_middleware_that_is_mounted,
    ],
    ids=lambda place: place.__name__,
)
@pytest.mark.parametrize("around", [None, DoNothing])
async def test_an_application_of_another_kind_is_left_alone(
    framework: type[Starlette],
    ask: Ask,
    foreign: Callable[[], Any],
    place: Callable[[Any], list[BaseRoute]],
    around: Any,
) -> None:
    app = framework(routes=place(foreign()))
    if around is not None:
        app.add_middleware(around)
    app.add_middleware(DBSessionMiddleware)
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.text) == (200, "foreign")


async def test_a_wsgi_application_in_starlettes_own_middleware_is_left_alone(
    framework: type[Starlette], ask: Ask
) -> None:
    with warnings.catch_warnings(action="ignore"):
        # Starlette warns of its deprecation.
        from starlette.middleware.wsgi import WSGIMiddleware

    app = framework(routes=[Mount("/", WSGIMiddleware(wsgi), middleware=[Middleware(DoNothing)])])
    app.add_middleware(DBSessionMiddleware)
    assert (await (await ask(app)).get("/")).text == "foreign"


@FOREIGN
async def test_an_application_of_another_kind_is_left_alone_beneath_the_middleware_itself(
    foreign: Callable[[], Any],
) -> None:
    connection = await Connection(path="/").run(DBSessionMiddleware(foreign()))
    assert [message.get("body") for message in connection.sent] == [None, b"foreign"]


def test_an_unknown_object_that_is_mounted_keeps_what_it_has_in_app() -> None:
    inner = Starlette()
    inner.add_middleware(DoNothing)
    unknown: Any = InASGI3(asgi2)
    unknown.app = inner
    app = Starlette(routes=[Mount("/", unknown)])
    app.add_middleware(DBSessionMiddleware)
    app.middleware_stack = app.build_middleware_stack()
    assert unknown.app is inner
    assert "build_middleware_stack" not in vars(inner)


# --- middlewares that are entered -------------------------------------------------------------------------------------


class HoldBack:
    """Waits for the first chunk of a body before it sends the start: a middleware that no framework knows."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)
            if message["type"] != "http.response.start":
                for each in held:
                    await send(each)
                held.clear()

        await self.app(scope, receive, hold if scope["type"] == "http" else send)


Endpoint = Callable[[Request], Awaitable[Response]]


def of_the_application(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    app = framework(routes=[Route("/", endpoint)])
    app.add_middleware(HoldBack)
    return app


def of_a_mounted_application(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    return framework(routes=[Mount("/", of_the_application(framework, endpoint))])


def of_a_mounted_application_in_a_middleware(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    return framework(routes=[Mount("/", GZipMiddleware(of_the_application(framework, endpoint), minimum_size=10**6))])


def of_an_application_for_a_host(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    inner = of_the_application(framework, endpoint)
    return framework(routes=[Host("test", inner), Host("127.0.0.1", inner)])


def of_a_mount(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    return framework(routes=[Mount("/", routes=[Route("/", endpoint)], middleware=[Middleware(HoldBack)])])


def of_a_mount_of_an_application(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    inner = framework(routes=[Route("/", endpoint)])
    return framework(routes=[Mount("/", inner, middleware=[Middleware(HoldBack)])])


def of_a_route(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    return framework(routes=[Route("/", endpoint, middleware=[Middleware(HoldBack)])])


def of_a_router(framework: type[Starlette], endpoint: Endpoint) -> Starlette:
    router = Router(routes=[Route("/", endpoint)], middleware=[Middleware(HoldBack)])
    return framework(routes=[Mount("/", router)])


@pytest.mark.parametrize(
    "build",
    [
        of_the_application,
        of_a_mounted_application,
        of_a_mounted_application_in_a_middleware,
        of_an_application_for_a_host,
        of_a_mount,
        of_a_mount_of_an_application,
        of_a_route,
        of_a_router,
    ],
    ids=lambda build: build.__name__,
)
async def test_a_middleware_that_was_given_as_such_is_entered(
    db: DBConnect,
    database: Database,
    framework: type[Starlette],
    ask: Ask,
    build: Callable[[type[Starlette], Endpoint], Starlette],
) -> None:
    app = build(framework, streaming(db))
    app.add_middleware(DBSessionMiddleware)
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.text) == (404, "body")
    # By a boundary: otherwise, the work of the body would be taken for that of the error, and rolled back.
    assert await database.names() == ["body"]


async def test_a_mount_in_a_router_that_fastapi_includes_is_entered(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    router = APIRouter()
    router.mount("/inner", of_the_application(FastAPI, streaming(db)))
    app = FastAPI()
    app.include_router(router, prefix="/router")
    if not any(hasattr(route, "original_router") for route in app.router.routes):
        pytest.skip("This version of FastAPI leaves out what is mounted in a router that it includes.")
    app.add_middleware(DBSessionMiddleware)
    response = await (await ask(app)).get("/router/inner/")
    assert (response.status_code, response.text) == (404, "body")
    assert await database.names() == ["body"]


def streaming(db: DBConnect) -> Endpoint:
    async def chunks() -> AsyncGenerator[str, None]:
        await insert(db, "body")
        yield "body"

    async def endpoint(request: Request) -> Response:
        await insert(db, "response")
        return StreamingResponse(chunks(), 404)

    return endpoint


async def test_a_middleware_that_cannot_be_changed_is_left_as_it_is(framework: type[Starlette], ask: Ask) -> None:
    @dataclass(frozen=True)
    class Frozen:
        app: ASGIApp

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("done")

    app = framework(routes=[Route("/", endpoint)])
    app.add_middleware(Frozen)
    app.add_middleware(DBSessionMiddleware)
    assert (await (await ask(app)).get("/")).text == "done"


def test_an_application_that_is_mounted_in_itself_is_entered_once(framework: type[Starlette]) -> None:
    app = framework()
    app.router.routes.append(Mount("/again", app))
    app.add_middleware(DoNothing)
    app.middleware_stack = app.build_middleware_stack()
    assert DBSessionMiddleware(app).has_boundary


@pytest.mark.parametrize(("middlewares", "expected"), [([], False), ([DoNothing], True), ([HoldBack], True)])
def test_writers_are_followed_only_where_a_middleware_may_hold_a_start_back(
    framework: type[Starlette], middlewares: list[Any], expected: bool
) -> None:
    app = framework(routes=[Route("/", streaming)])
    for each in middlewares:
        app.add_middleware(each)
    middleware = DBSessionMiddleware(app)
    app.middleware_stack = app.build_middleware_stack()
    assert middleware.has_boundary is expected
