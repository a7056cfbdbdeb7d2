"""The application of a scenario in Quart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
from quart import Blueprint, Quart, Response, abort, got_request_exception, request, websocket
from tests.support import application as neutral
from tests.support.application import Application, Handler, Refusal, Reply, SocketHandler, Stream, current_request
from tests.support.frameworks.asgi import recording

from ctxdb_core.asgi import ASGIApp, Message, Receive, Scope, Send
from ctxdb_quart import setup


def build_quart(application: Application) -> ASGIApp:
    # Quart's ASGI types are those of a server.
    app: Any = Quart(__name__, static_folder=None)
    _set_up(app, application)
    _register(app, application)

    async def note_unhandled(app: Quart, exception: Exception, **kwargs: Any) -> None:
        """Quart answers unhandled exceptions by itself, and passes none on to the server."""
        application.errors.append(exception)

    got_request_exception.connect(note_unhandled, app, weak=False)
    return recording(app, application)


def _set_up(app: Quart, application: Application) -> None:
    setup(app, *application.dbs, before_commit=application.before_commit, commit_policy=application.commit_policy)


def _register(target: Quart | Blueprint, application: Application) -> None:
    for number, (path, handler) in enumerate(application.routes.items()):
        target.add_url_rule(path, f"route{number}", _view(handler), methods=["GET", "POST"])
    for number, (path, socket_handler) in enumerate(application.sockets.items()):
        target.add_websocket(path, f"socket{number}", _websocket_view(socket_handler))
    for kind, status in application.exception_statuses.items():
        target.register_error_handler(kind, _exception_handler(status))
    for number, (prefix, mounted) in enumerate(application.mounts.items()):
        blueprint = Blueprint(f"mount{number}", __name__)
        _register(blueprint, mounted)
        blueprint.record(_bringing_along(mounted))
        target.register_blueprint(blueprint, url_prefix=prefix)


def _bringing_along(mounted: Application) -> Callable[[Any], None]:
    return lambda state: _set_up(state.app, mounted)


def _view(handler: Handler) -> Callable[[], Awaitable[Response]]:
    async def view() -> Response:
        current_request.set(neutral.Request(request.query_string.decode(), partial(request.get_data, as_text=False)))
        try:
            return _response(await handler())
        except Refusal as refusal:
            abort(Response(status=refusal.status))

    return view


def _response(reply: Reply | Stream) -> Response:
    if isinstance(reply, Stream):
        return Response(reply.chunks, reply.status, mimetype="text/plain")
    return Response(reply.body, reply.status, dict(reply.headers), mimetype="text/plain")


def _exception_handler(status: int) -> Callable[[Exception], Awaitable[tuple[str, int]]]:
    async def handle(exc: Exception) -> tuple[str, int]:
        return f"handled {type(exc).__name__}", status

    return handle


class _Socket:
    async def receive(self) -> str | None:
        try:
            return str(await websocket.receive())
        except asyncio.CancelledError:
            # Quart tells a handler in this way that its client has left.
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            return None

    async def send(self, text: str) -> None:
        await websocket.send(text)

    async def close(self, code: int) -> None:
        await websocket.close(code)


def _websocket_view(handler: SocketHandler) -> Callable[[], Awaitable[None]]:
    async def view() -> None:
        await websocket.accept()
        await handler(_Socket())

    return view


@asynccontextmanager
async def call_quart(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """Provide a client that calls the application as a server does, and Quart's own test client."""
    async with httpx.AsyncClient(transport=_Transport(app), base_url="http://test", timeout=60) as client:
        yield client


class _Transport(httpx.AsyncBaseTransport):
    """A transport that tells the application that its client leaves, where `httpx.ASGITransport` cancels it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        over = asyncio.Event()
        transport = httpx.ASGITransport(_served(self._app, over), raise_app_exceptions=False)
        answering = asyncio.ensure_future(transport.handle_async_request(request))
        try:
            await asyncio.wait([answering], timeout=request.extensions["timeout"]["read"])
            is_late = not answering.done()
        finally:
            over.set()
            await asyncio.wait([answering])
        if is_late:
            raise httpx.ReadTimeout("no response", request=request)
        return answering.result()


def _served(app: ASGIApp, over: asyncio.Event) -> ASGIApp:
    """Run `app` as a server does: tell it when the response is over, and fail where a server would answer by a 500."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        is_received = has_started = False

        async def receive_until_over() -> Message:
            nonlocal is_received
            if is_received:
                await over.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            is_received = not message.get("more_body", False)
            return message

        async def note_progress(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                over.set()

        try:
            await app(scope, receive_until_over, note_progress)
        except BaseException as exc:
            raise RuntimeError("the application has failed") from exc
        if not has_started:
            raise RuntimeError("the application has returned without a response")

    return serve
