"""The application of a scenario in aiohttp, and the servers that aiohttp brings along."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer
from aiohttp.typedefs import Handler, Middleware
from tests.support import application as neutral
from tests.support.application import Application, Around, Refusal, Reply, SocketHandler, Stream, current_request

from ctxdb_aiohttp import setup


def build_aiohttp(application: Application) -> web.Application:
    app = _build(application)

    async def record_errors(app: web.Application) -> None:
        app.middlewares.insert(0, _recorder(application))

    # When the application starts, the adapter moves to the front. The recorder is put in front of it then.
    app.on_startup.append(record_errors)
    return app


def _build(application: Application) -> web.Application:
    app = web.Application(middlewares=[_error_middleware(application)])
    if application.around is not None:
        app.middlewares.append(_giving_up(application.around))
    for path, handler in application.routes.items():
        app.router.add_route("*", path, _handler(handler))
    for path, socket_handler in application.sockets.items():
        app.router.add_get(path, _socket_handler(socket_handler))
    setup(
        app,
        *application.dbs,
        before_commit=application.before_commit,
        commit_policy=application.commit_policy,
    )
    for prefix, mounted in application.mounts.items():
        app.add_subapp(prefix, _build(mounted))
    return app


def _handler(handler: neutral.Handler) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        current_request.set(neutral.Request(request.query_string, request.read))
        try:
            reply = await handler()
        except Refusal as refusal:
            raise _http_exception(refusal.status) from None
        if isinstance(reply, Reply):
            return web.Response(text=reply.body, status=reply.status, headers=reply.headers)
        return await _stream(request, reply)

    return handle


def _http_exception(status: int) -> web.HTTPException:
    kinds = [kind for kind in vars(web).values() if isinstance(kind, type) and issubclass(kind, web.HTTPException)]
    kind: Any = next(kind for kind in kinds if kind.status_code == status)
    return kind("/elsewhere") if issubclass(kind, web.HTTPRedirection) else kind()  # type: ignore[no-any-return]


async def _stream(request: web.Request, stream: Stream) -> web.StreamResponse:
    response = web.StreamResponse(status=stream.status)
    async with aclosing(stream.chunks):
        await response.prepare(request)
        async for chunk in stream.chunks:
            await response.write(chunk.encode())
    return response


class _Socket:
    def __init__(self, connection: web.WebSocketResponse) -> None:
        self._connection = connection
        self.send = connection.send_str

    async def receive(self) -> str | None:
        message = await self._connection.receive()
        return message.data if message.type is web.WSMsgType.TEXT else None

    async def close(self, code: int) -> None:
        await self._connection.close(code=code)


def _socket_handler(handler: SocketHandler) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        await handler(_Socket(connection))
        return connection

    return handle


def _error_middleware(application: Application) -> Middleware:
    @web.middleware
    async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as exc:
            for kind, status in application.exception_statuses.items():
                if isinstance(exc, kind):
                    return web.Response(text=f"handled {type(exc).__name__}", status=status)
            raise

    return answer_errors


def _giving_up(around: Around) -> Middleware:
    @web.middleware
    async def give_up(request: web.Request, handler: Handler) -> web.StreamResponse:
        calls: list[asyncio.Future[web.StreamResponse]] = []

        def call() -> None:
            calls.append(asyncio.ensure_future(handler(request)))
            # Nobody waits for the handler: its error is read here, so that asyncio does not log it.
            calls[0].add_done_callback(lambda call: call.cancelled() or call.exception())

        reply = await around(call)
        return web.Response(text=reply.body, status=reply.status)

    return give_up


def _recorder(application: Application) -> Middleware:
    @web.middleware
    async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException:
            raise
        except BaseException as exc:
            application.errors.append(exc)
            raise

    return record


@asynccontextmanager
async def serve_aiohttp(app: web.Application, *, handler_cancellation: bool = False) -> AsyncIterator[str]:
    """Serve `app`, and yield the server's base URL: as it is by default, a handler outlives its client."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=handler_cancellation, shutdown_timeout=5)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        try:
            await runner.setup()
            await web.SockSite(runner, listener).start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            await runner.cleanup()


@asynccontextmanager
async def call_aiohttp(app: web.Application) -> AsyncIterator[httpx.AsyncClient]:
    """Provide a client for `app` on aiohttp's test server, which cancels a handler whose client leaves."""
    # Where aiohttp alone is tested, there is no uvicorn, which that module serves with.
    from tests.support.server import http_client

    async with TestServer(app) as server, http_client(f"http://{server.host}:{server.port}") as client:
        yield client
