"""aiohttp, called as its event loop calls it: bytes into the protocol of a connection, bytes out of it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import ClassVar

from aiohttp import web

from benchmarks.asgi import PATH
from benchmarks.client_connection import BODY, ClientConnection
from benchmarks.frameworks._framework import Framework, Handle, Running
from ctxdb_aiohttp import setup


class Aiohttp(Framework):
    """An application with one route, and `setup`."""

    name: ClassVar[str] = "aiohttp"

    @asynccontextmanager
    async def run(self, handle: Handle, *, adapter: bool) -> Running:
        async def answer(request: web.Request) -> web.Response:
            await handle()
            return web.Response(body=BODY)

        app = web.Application()
        app.router.add_get(PATH, answer)
        if adapter:
            setup(app)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        caller = _Caller(runner)
        try:
            yield caller
        finally:
            caller.close()
            await runner.cleanup()


class _Caller:
    """Sends GET requests for `PATH` over connections that are kept alive, one for each worker."""

    def __init__(self, runner: web.AppRunner) -> None:
        self._runner = runner
        self._connections: list[ClientConnection] = []

    async def sequence(self, requests: int) -> int:
        return await self.crowd(requests, 1)

    async def crowd(self, requests: int, workers: int) -> int:
        server = self._runner.server
        assert server is not None
        while len(self._connections) < workers:
            self._connections.append(ClientConnection(server()))
        each = requests // workers
        await asyncio.gather(*(connection.request(each) for connection in self._connections[:workers]))
        return each * workers

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
