"""The server of ASGI applications: uvicorn, in the demo's own event loop, stopped gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from ctxdb_demo.cleanup import see_through
from ctxdb_demo.errors import DemoError
from ctxdb_demo.server import STOP_TIMEOUT_SECONDS


@asynccontextmanager
async def serve(app: Any, listener: socket.socket) -> AsyncIterator[None]:
    """Serve an ASGI application for the length of a block; closes `listener`.

    Raises:
        DemoError: the application does not start.
    """
    config = uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=STOP_TIMEOUT_SECONDS)
    server = _Server(config)
    serving = asyncio.create_task(server.run_quietly(listener))
    try:
        await server.ready.wait()
        if not server.started:
            raise DemoError("The application did not start.")
        yield
    finally:
        server.should_exit = True
        try:
            await see_through(serving)
        finally:
            listener.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def run_quietly(self, listener: socket.socket) -> None:
        try:
            # Where the application does not start, uvicorn would end the whole process.
            with contextlib.suppress(SystemExit):
                await self.serve(sockets=[listener])
        finally:
            self.ready.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The demo has a database to stop after the server: signals are its own.
        yield
