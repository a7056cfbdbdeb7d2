"""The server of aiohttp, in the demo's own event loop, stopped gracefully."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from ctxdb_demo.cleanup import see_through
from ctxdb_demo.server import STOP_TIMEOUT_SECONDS


@asynccontextmanager
async def serve(app: web.Application, listener: socket.socket) -> AsyncIterator[None]:
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
