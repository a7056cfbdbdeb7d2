"""A real server on a loopback port, in the test's own event loop, and clients that use its socket as they like."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import httpx
import uvicorn


@asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncIterator[str]:
    """Serve `app` with uvicorn, and yield the server's base URL."""
    # Without the protocol's number, asyncio leaves Nagle's algorithm on, and most responses take 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        # A client that has much to do meanwhile finds its connection open.
        options = {"timeout_keep_alive": 60, **options}
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
            server.leave()
            await serving


class _Server(uvicorn.Server):
    """A server that ends as soon as it can, where uvicorn looks ten times a second whether it shall, and may."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        self.should_exit = True
        self._leaving.set()

    def capture_signals(self) -> Any:
        """Leave the signal handlers of the test run alone."""
        return nullcontext()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._leaving.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, wait for what is under way, and shut the application down."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(0.001)
        for server in self.servers:
            await server.wait_closed()
        await self.lifespan.shutdown()


# Without certificates, as reading them takes longer than most tests, and shared, as each takes longer than its client.
_TLS_OF_CLIENTS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def http_client(base_url: str) -> httpx.AsyncClient:
    """Return a client, which trusts no certificate."""
    # A machine with much to do answers late.
    return httpx.AsyncClient(base_url=base_url, verify=_TLS_OF_CLIENTS, timeout=60)


class RawClient:
    """One HTTP connection, byte by byte: for clients that read slowly, or leave."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._headers: dict[str, str] = {}

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

    async def send(self, path: str, method: str = "GET", *, body: bytes = b"", length: int | None = None) -> None:
        """Send a request, with as much of its body as is given, and the announced `length` of it."""
        length = len(body) if length is None else length
        self.writer.write(f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n".encode() + body)
        await self.writer.drain()

    async def read_head(self) -> int:
        """Return the status, having read no more than the head of the response."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        start, *lines = head.decode().split("\r\n")
        self._headers = dict(line.lower().split(": ", 1) for line in lines if line)
        return int(start.split(" ", 2)[1])

    async def read_body(self) -> bytes:
        """Return the body behind the head; raise `asyncio.IncompleteReadError` if it breaks off."""
        if "content-length" in self._headers:
            return await self.reader.readexactly(int(self._headers["content-length"]))
        chunks: list[bytes] = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            chunks.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return b"".join(chunks)

    @property
    def keeps_alive(self) -> bool:
        """Whether another request can follow the one whose head was read."""
        return self._headers.get("connection") != "close"

    def abort(self) -> None:
        """Leave at once."""
        self.writer.transport.abort()
