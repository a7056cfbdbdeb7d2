"""A real server on a loopback port, in the test's own event loop, and clients that use its socket as they like."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import uvicorn


@asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncIterator[str]:
    """Serve `app` with uvicorn, and yield the server's base URL."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="on", ws="websockets-sansio", **options)
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:
                if serving.done():
                    await serving
                    raise RuntimeError("the server ended before it had started")
                await asyncio.sleep(0.001)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        """Leave the signal handlers of the test run alone."""
        return nullcontext()


class RawClient:
    """One HTTP connection, byte by byte: for clients that read slowly, or leave."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def connect(cls, base_url: str) -> AsyncIterator[RawClient]:
        host, port = base_url.removeprefix("http://").split(":")
        # A small receive buffer: a client that does not read must soon stop the server's writing.
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def send(self, path: str, method: str = "GET") -> None:
        self.writer.write(f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n".encode())
        await self.writer.drain()

    async def read_head(self) -> int:
        """Return the status, having read no more than the head of the response."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1])

    def abort(self) -> None:
        """Leave at once."""
        self.writer.transport.abort()
