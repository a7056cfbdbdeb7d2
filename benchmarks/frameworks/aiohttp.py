"""aiohttp, called as its event loop calls it: bytes into the protocol of a connection, bytes out of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from aiohttp import web

from benchmarks.asgi import PATH
from benchmarks.frameworks._framework import Framework, Handle, Running
from ctxdb_aiohttp import setup

_REQUEST = f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: */*\r\n\r\n".encode()
_BODY = b"ok"


class Aiohttp(Framework):
    """An application with one route, and `setup`."""

    name: ClassVar[str] = "aiohttp"

    @asynccontextmanager
    async def run(self, handle: Handle, *, adapter: bool) -> Running:
        async def answer(request: web.Request) -> web.Response:
            await handle()
            return web.Response(body=_BODY)

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
        self._connections: list[_Connection] = []

    async def sequence(self, requests: int) -> int:
        return await self.crowd(requests, 1)

    async def crowd(self, requests: int, workers: int) -> int:
        server = self._runner.server
        assert server is not None
        while len(self._connections) < workers:
            self._connections.append(_Connection(server()))
        each = requests // workers
        await asyncio.gather(*(connection.request(each) for connection in self._connections[:workers]))
        return each * workers

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


class _Connection(asyncio.Transport):
    """One client, and the transport that the server writes to."""

    def __init__(self, protocol: Any) -> None:
        super().__init__()
        self._protocol = protocol
        self._closing = False
        self._answered: asyncio.Future[bytes] | None = None
        protocol.connection_made(self)

    async def request(self, times: int) -> None:
        """Send `times` requests, one after the other.

        Raises:
            RuntimeError: one of them was not answered by a 200.
        """
        loop = asyncio.get_running_loop()
        for _ in range(times):
            self._answered = loop.create_future()
            self._protocol.data_received(_REQUEST)
            response = await self._answered
            if not (response.startswith(b"HTTP/1.1 200 ") and response.endswith(_BODY)):
                raise RuntimeError(f"A request was answered by {response!r}.")

    def write(self, data: Any) -> None:
        # The head and so short a body are written at once.
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._protocol.connection_lost(None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self._closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default
