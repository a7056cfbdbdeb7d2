"""Litestar, called as a server calls it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any, ClassVar

import litestar

from benchmarks.asgi import PATH
from benchmarks.asgi import Caller as ASGICaller
from benchmarks.frameworks._framework import Framework, Handle, Running
from ctxdb_litestar import CtxDBPlugin


class Litestar(Framework):
    """An application with one route, and `CtxDBPlugin`."""

    name: ClassVar[str] = "Litestar"

    @asynccontextmanager
    async def run(self, handle: Handle, *, adapter: bool) -> Running:
        @litestar.get(PATH, media_type=litestar.MediaType.TEXT)
        async def answer() -> str:
            await handle()
            return "ok"

        app = litestar.Litestar([answer], openapi_config=None, plugins=[CtxDBPlugin()] if adapter else [])
        async with app.lifespan():
            application: Any = app  # its types are Litestar's own
            yield ASGICaller(application)
