"""The application of a scenario in Starlette and in FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from tests.support import application as neutral
from tests.support.application import (
    Application,
    Around,
    Handler,
    Refusal,
    Reply,
    SocketHandler,
    Stream,
    current_request,
)
from tests.support.frameworks.asgi import recording

from ctxdb_core.asgi import ASGIApp
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown


def _response(reply: Reply | Stream) -> Response:
    background = None if reply.background is None else BackgroundTask(reply.background)
    if isinstance(reply, Stream):
        return StreamingResponse(reply.chunks, reply.status, background=background)
    return PlainTextResponse(reply.body, reply.status, dict(reply.headers), background=background)


def _endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        current_request.set(neutral.Request(request.url.query, request.body))
        try:
            return _response(await handler())
        except Refusal as refusal:
            raise HTTPException(refusal.status) from None

    return endpoint


class _Socket:
    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self.send = websocket.send_text
        self.open = True

    async def receive(self) -> str | None:
        try:
            return await self._websocket.receive_text()
        except WebSocketDisconnect:
            self.open = False
            return None

    async def close(self, code: int) -> None:
        self.open = False
        await self._websocket.close(code)


def _socket_endpoint(handler: SocketHandler) -> Callable[[WebSocket], Awaitable[None]]:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        socket = _Socket(websocket)
        await handler(socket)
        if socket.open:
            await socket.close(1000)

    return endpoint


def _exception_handlers(application: Application) -> dict[Any, Any]:
    def handler(status: int) -> Callable[[Request, Exception], Response]:
        return lambda request, exc: PlainTextResponse(f"handled {type(exc).__name__}", status)

    return {kind: handler(status) for kind, status in application.exception_statuses.items()}


class _GiveUp(BaseHTTPMiddleware):
    """Lets the application run on, as Starlette does when no more than the call is cancelled."""

    def __init__(self, app: ASGIApp, around: Around) -> None:
        super().__init__(app)
        self._around = around

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        calls: list[asyncio.Future[Response]] = []
        reply = await self._around(lambda: calls.append(asyncio.ensure_future(call_next(request))))
        for call in calls:
            call.cancel()
        return _response(reply)


METHODS = ["GET", "POST"]


def build_starlette(application: Application) -> ASGIApp:
    routes: list[BaseRoute] = [
        *(Route(path, _endpoint(handler), methods=METHODS) for path, handler in application.routes.items()),
        *(WebSocketRoute(path, _socket_endpoint(handler)) for path, handler in application.sockets.items()),
        *(Mount(prefix, build_starlette(mounted)) for prefix, mounted in application.mounts.items()),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers=_exception_handlers(application),
        lifespan=close_on_shutdown(*application.dbs),
    )
    return _with_adapter(app, application)


def build_fastapi(application: Application) -> ASGIApp:
    app = FastAPI(exception_handlers=_exception_handlers(application), lifespan=close_on_shutdown(*application.dbs))
    for path, handler in application.routes.items():
        app.add_api_route(path, _endpoint(handler), methods=METHODS, response_model=None)
    for path, socket_handler in application.sockets.items():
        app.add_api_websocket_route(path, _socket_endpoint(socket_handler))
    for prefix, mounted in application.mounts.items():
        app.mount(prefix, build_fastapi(mounted))
    return _with_adapter(app, application)


def _with_adapter(app: Starlette, application: Application) -> ASGIApp:
    if application.around is not None:
        app.add_middleware(_GiveUp, around=application.around)
    app.add_middleware(
        DBSessionMiddleware, before_commit=application.before_commit, commit_policy=application.commit_policy
    )
    return recording(app, application)
