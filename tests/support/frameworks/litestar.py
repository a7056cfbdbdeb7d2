"""The application of a scenario in Litestar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from litestar import HttpMethod, Litestar, MediaType, Request, Response, WebSocket, asgi, route, websocket
from litestar import response as responses
from litestar.background_tasks import BackgroundTask
from litestar.exceptions import HTTPException, WebSocketDisconnect
from litestar.handlers import BaseRouteHandler
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
from tests.support.frameworks.asgi import giving_up, recording
from tests.support.litestar_app import openapi_of

from ctxdb_core.asgi import ASGIApp
from ctxdb_litestar import CtxDBPlugin


def build_litestar(application: Application) -> ASGIApp:
    async def note_unhandled(exc: Exception, scope: Any) -> None:
        """Litestar answers unhandled exceptions by itself, and passes none on to the server."""
        if not isinstance(exc, (HTTPException, *application.exception_statuses)):
            application.errors.append(exc)

    route_handlers = [
        *(_route(path, handler) for path, handler in application.routes.items()),
        *(_websocket(path, handler) for path, handler in application.sockets.items()),
        *(
            asgi(prefix, is_mount=True, copy_scope=True)(build_litestar(mounted))
            for prefix, mounted in application.mounts.items()
        ),
    ]
    app: Any = Litestar(
        route_handlers,
        exception_handlers={
            kind: _exception_handler(status) for kind, status in application.exception_statuses.items()
        },
        after_exception=[note_unhandled],
        middleware=[] if application.around is None else [_giving_up(application.around)],
        logging_config=None,
        openapi_config=openapi_of(route_handlers),
        plugins=[
            CtxDBPlugin(
                *application.dbs, before_commit=application.before_commit, commit_policy=application.commit_policy
            )
        ],
    )
    return recording(app, application)


def _giving_up(around: Around) -> Any:
    return lambda app: giving_up(app, around)


def _route(path: str, handler: Handler) -> BaseRouteHandler:
    @route(path, http_method=[HttpMethod.GET, HttpMethod.POST])
    async def handle(request: Request[Any, Any, Any]) -> Response[Any]:
        current_request.set(neutral.Request(request.scope["query_string"].decode(), request.body))
        try:
            return _response(await handler())
        except Refusal as refusal:
            raise HTTPException(status_code=refusal.status) from None

    return handle


def _response(reply: Reply | Stream) -> Response[Any]:
    background = None if reply.background is None else BackgroundTask(reply.background)
    if isinstance(reply, Stream):
        return responses.Stream(
            reply.chunks, background=background, media_type=MediaType.TEXT, status_code=reply.status
        )
    return Response(
        reply.body, background=background, headers=reply.headers, media_type=MediaType.TEXT, status_code=reply.status
    )


def _exception_handler(status: int) -> Callable[[Request[Any, Any, Any], Exception], Response[str]]:
    return lambda request, exc: Response(f"handled {type(exc).__name__}", media_type=MediaType.TEXT, status_code=status)


class _Socket:
    def __init__(self, connection: WebSocket[Any, Any, Any]) -> None:
        self._connection = connection
        self.open = True

    async def receive(self) -> str | None:
        try:
            return await self._connection.receive_text()
        except WebSocketDisconnect:
            self.open = False
            return None

    async def send(self, text: str) -> None:
        await self._connection.send_text(text)

    async def close(self, code: int) -> None:
        self.open = False
        await self._connection.close(code)


def _websocket(path: str, handler: SocketHandler) -> BaseRouteHandler:
    @websocket(path)
    async def handle(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        accepted = _Socket(socket)
        await handler(accepted)
        if accepted.open:
            await accepted.close(1000)

    return handle
