"""Servers that run in the demo's own event loop, on loopback, and stop gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from aiohttp import web

from ctxdb_demo.cleanup import see_through
from ctxdb_demo.errors import DemoError

HOST = "127.0.0.1"
STOP_TIMEOUT_SECONDS = 3


def listen(port: int | None) -> socket.socket:
    """Return a socket that listens on loopback: on `port`, or on a free one.

    Raises:
        DemoError: the port cannot be had.
    """
    # With the protocol's number, as asyncio sets TCP_NODELAY on connections of such a socket only.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # A port whose last connections are still in TIME_WAIT is free; on Windows, this would steal used ones.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port or 0))
        listener.listen()
    except OSError as exc:
        listener.close()
        raise DemoError(f"Port {port} of {HOST} cannot be had: {exc.strerror or exc}.") from exc
    return listener


@asynccontextmanager
async def serve_asgi(app: Any, listener: socket.socket) -> AsyncIterator[None]:
    """Serve an ASGI application by uvicorn, for the length of a block; closes `listener`.

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


@asynccontextmanager
async def serve_aiohttp(app: web.Application, listener: socket.socket) -> AsyncIterator[None]:
    """Serve an aiohttp application, for the length of a block; closes `listener`."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_TIMEOUT_SECONDS)
    try:
        await runner.setup()
        await web.SockSite(runner, listener).start()
        yield
    finally:
        try:
            await see_through(runner.cleanup())
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
