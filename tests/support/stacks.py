"""Starlette and FastAPI applications with stacks of middlewares, and clients for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tests.support.server import http_client, serve

from ctxdb_core.asgi import ASGIApp

Endpoint = Callable[[Request], Awaitable[Response]]


class DoNothing(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


class Ask:
    """Requests an application in process, or from a real server."""

    def __init__(self, stack: AsyncExitStack, over_sockets: bool) -> None:
        self._stack = stack
        self._over_sockets = over_sockets
        self.base_url = "http://test"

    async def __call__(self, app: ASGIApp) -> httpx.AsyncClient:
        if self._over_sockets:
            self.base_url = await self._stack.enter_async_context(serve(app))
            client = http_client(self.base_url)
        else:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url=self.base_url)
        return await self._stack.enter_async_context(client)


def application(framework: type[Starlette], routes: dict[str, Endpoint], *middleware: Any, **options: Any) -> Starlette:
    app = framework(**options)
    for path, endpoint in routes.items():
        app.router.routes.append(Route(path, endpoint, methods=["GET", "POST"]))
    for each in middleware:
        app.add_middleware(each)
    return app


def on_integrity_error(status: int) -> dict[Any, Any]:
    async def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse(f"handled {type(exc).__name__}", status)

    return {IntegrityError: handle}
