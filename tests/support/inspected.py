"""One small application on each framework, with the inspector beside it, on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from fastapi import FastAPI
from litestar import Litestar, Request, Response, get
from litestar.handlers import asgi
from sqlalchemy import text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from tests.support.server import serve

import ctxdb_aiohttp
import ctxdb_inspector
from ctxdb_core import DBConnect, db_session
from ctxdb_inspector import Authorise, UnitHeader, inspector
from ctxdb_litestar import CtxDBPlugin
from ctxdb_starlette import DBSessionMiddleware

Answer = tuple[int, str]
MakeApp = Callable[["Desk", Authorise | None], Any]


@dataclass
class Desk:
    """What the handlers do, whichever the framework, and what a test tells them."""

    db: DBConnect
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    stays: list[Any] = field(default_factory=list)

    async def read(self) -> Answer:
        session = await db_session(self.db)
        await session.execute(text("SELECT name FROM item WHERE name = :name"), {"name": "a secret parameter"})
        return 200, "read"

    async def refuse(self) -> Answer:
        await self.read()
        return 409, "refused"

    async def fail_at_commit(self) -> Answer:
        session = await db_session(self.db)
        await session.execute(text("INSERT INTO child (parent) VALUES ('nobody')"))
        return 200, "never seen"

    async def hold(self) -> Answer:
        await self.read()
        self.arrived.set()
        await self.go_on.wait()
        return 200, "held"

    async def leak(self) -> Answer:
        await self.read()
        session = await self.db.create_session()
        await session.execute(text("SELECT 2"))
        self.stays.append(session)
        return 200, "leaked"

    async def leak_alone(self) -> Answer:
        session = await self.db.create_session()
        await session.execute(text("SELECT 3"))
        self.stays.append(session)
        return 200, "leaked"

    async def fail(self) -> Answer:
        await self.read()
        raise LookupError("nobody handles this")

    async def fail_idle(self) -> Answer:
        raise LookupError("nobody handles this")

    async def run_sync(self) -> Answer:
        def read_in_it(session: Session) -> None:
            session.execute(text("SELECT 4"))

        await (await db_session(self.db)).run_sync(read_in_it)
        return 200, "read"

    async def idle(self) -> Answer:
        return 200, "no database"


PATHS = ("read", "refuse", "fail_at_commit", "hold", "leak", "leak_alone", "fail", "fail_idle", "run_sync", "idle")


def starlette_app(desk: Desk, authorise: Authorise | None) -> Starlette:
    def endpoint(name: str) -> Callable[[StarletteRequest], Awaitable[PlainTextResponse]]:
        async def handle(request: StarletteRequest) -> PlainTextResponse:
            status, body = await getattr(desk, name)()
            return PlainTextResponse(body, status)

        return handle

    app = Starlette(routes=[Route(f"/{name}", endpoint(name)) for name in PATHS])
    app.add_middleware(DBSessionMiddleware)
    app.routes.append(Mount("/_ctxdb", inspector(desk.db, authorise=authorise)))
    return app


def fastapi_app(desk: Desk, authorise: Authorise | None) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)

    @app.get("/{name}")
    async def handle(name: str) -> Any:
        status, body = await getattr(desk, name)()
        return PlainTextResponse(body, status)

    app.mount("/_ctxdb", inspector(desk.db, authorise=authorise))
    return app


def litestar_app(desk: Desk, authorise: Authorise | None) -> Litestar:
    @get("/{name:str}")
    async def handle(request: Request[Any, Any, Any]) -> Response[str]:
        name = request.path_params["name"]
        status, body = await getattr(desk, name)()
        return Response(body, status_code=status)

    mounted = asgi("/_ctxdb", is_mount=True, copy_scope=True)(inspector(desk.db, authorise=authorise))
    return Litestar([handle, mounted], plugins=[CtxDBPlugin()], logging_config=None, openapi_config=None)


def aiohttp_app(desk: Desk, authorise: Authorise | None) -> web.Application:
    app = web.Application()
    ctxdb_aiohttp.setup(app)
    ctxdb_inspector.setup(app, desk.db, authorise=authorise)

    async def handle(request: web.Request) -> web.Response:
        status, body = await getattr(desk, request.match_info["name"])()
        return web.Response(status=status, text=body)

    app.router.add_get("/{name}", handle)
    return app


@asynccontextmanager
async def serve_app(app: Any) -> AsyncIterator[str]:
    """Serve an application of any of the frameworks, and yield the server's base URL."""
    if not isinstance(app, web.Application):
        async with serve(UnitHeader(app)) as url:
            yield url
        return
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


MAKERS: dict[str, MakeApp] = {
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "litestar": litestar_app,
    "aiohttp": aiohttp_app,
}
