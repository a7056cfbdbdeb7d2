"""The application of a scenario in Starlette and in FastAPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.support.application import Application, Refusal, Reply, Stream
from tests.support.frameworks.asgi import recording

from ctxdb_core.asgi import ASGIApp
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown


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
    return recording(app, application)


def build_fastapi(application: Application) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        return await _respond(application, request.url.path)

    app = FastAPI(exception_handlers=_exception_handlers(application), lifespan=close_on_shutdown(*application.dbs))
    for path in application.routes:
        app.add_api_route(path, endpoint, methods=METHODS, response_model=None)
    app.add_middleware(
        DBSessionMiddleware, before_commit=application.before_commit, commit_policy=application.commit_policy
    )
    return recording(app, application)
