"""The frameworks under test: how each builds an `Application`, and what it can do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.support.application import Application, Refusal, Reply, Stream

from ctxdb_core.asgi import ASGIApp, ASGIHTTPDBSessionMiddleware, Message, Receive, Scope, Send
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown


@dataclass(frozen=True)
class Adapter:
    """A framework, and the capabilities in which frameworks differ."""

    name: str
    build: Callable[[Application], ASGIApp]
    has_exception_handlers: bool = True
    """Whether applications register handlers for exceptions, which a failing commit must reach."""


# --- bare ASGI --------------------------------------------------------------------------------------------------------


def build_asgi(application: Application) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(application, receive, send)
            return
        handler = application.routes.get(scope["path"])
        try:
            reply = Reply(status=404) if handler is None else await handler()
        except Refusal as refusal:
            reply = Reply(status=refusal.status)
        headers = getattr(reply, "headers", {})
        start: Message = {
            "type": "http.response.start",
            "status": reply.status,
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }
        await send(start)
        if isinstance(reply, Stream):
            await _send_until_disconnect(reply, receive, send)
        else:
            await send({"type": "http.response.body", "body": reply.body.encode()})
        if reply.background is not None:
            await reply.background()

    return ASGIHTTPDBSessionMiddleware(app, application.before_commit, application.commit_policy)


async def _send_until_disconnect(reply: Stream, receive: Receive, send: Send) -> None:
    async def send_all() -> None:
        async for chunk in reply.chunks:
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(send_all()), asyncio.create_task(wait_for_disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await reply.chunks.aclose()
    if not tasks[0].cancelled():
        tasks[0].result()


async def _lifespan(application: Application, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    for db in application.dbs:
        await db.close()
    await send({"type": "lifespan.shutdown.complete"})


# --- Starlette and FastAPI --------------------------------------------------------------------------------------------


def _response(reply: Reply | Stream) -> Response:
    background = None if reply.background is None else BackgroundTask(reply.background)
    if isinstance(reply, Stream):
        return StreamingResponse(reply.chunks, reply.status, background=background)
    return PlainTextResponse(reply.body, reply.status, dict(reply.headers), background=background)


async def _respond(application: Application, path: str) -> Response:
    try:
        return _response(await application.routes[path]())
    except Refusal as refusal:
        raise HTTPException(refusal.status) from None


def _exception_handlers(application: Application) -> dict[Any, Any]:
    def handler(status: int) -> Callable[[Request, Exception], Response]:
        return lambda request, exc: PlainTextResponse(f"handled {type(exc).__name__}", status)

    return {kind: handler(status) for kind, status in application.exception_statuses.items()}


METHODS = ["GET", "POST"]


def build_starlette(application: Application) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        return await _respond(application, request.url.path)

    app = Starlette(
        routes=[Route(path, endpoint, methods=METHODS) for path in application.routes],
        exception_handlers=_exception_handlers(application),
        lifespan=close_on_shutdown(*application.dbs),
    )
    app.add_middleware(
        DBSessionMiddleware, before_commit=application.before_commit, commit_policy=application.commit_policy
    )
    return app


def build_fastapi(application: Application) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        return await _respond(application, request.url.path)

    app = FastAPI(exception_handlers=_exception_handlers(application), lifespan=close_on_shutdown(*application.dbs))
    for path in application.routes:
        app.add_api_route(path, endpoint, methods=METHODS, response_model=None)
    app.add_middleware(
        DBSessionMiddleware, before_commit=application.before_commit, commit_policy=application.commit_policy
    )
    return app


ADAPTERS = (
    Adapter("asgi", build_asgi, has_exception_handlers=False),
    Adapter("starlette", build_starlette),
    Adapter("fastapi", build_fastapi),
)
