"""Starlette, called as a server calls it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import ClassVar

from starlette.applications import Starlette as Application
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.asgi import PATH, Caller
from benchmarks.frameworks._framework import Framework, Handle, Running
from ctxdb_starlette import DBSessionMiddleware


class Starlette(Framework):
    """An application with one route, and `DBSessionMiddleware`."""

    name: ClassVar[str] = "Starlette"

    @asynccontextmanager
    async def run(self, handle: Handle, *, adapter: bool) -> Running:
        async def answer(request: Request) -> Response:
            await handle()
            return Response(b"ok")

        middleware = [Middleware(DBSessionMiddleware)] if adapter else []
        yield Caller(Application(routes=[Route(PATH, answer)], middleware=middleware))
