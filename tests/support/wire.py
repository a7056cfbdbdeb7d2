"""HTTP/1.1 byte by byte: what is on the wire is exactly one well-formed response for each request, or the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def summary(self) -> tuple[int, str]:
        return self.status, self.text


class Wire:
    """One connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def connect(cls, base_url: str) -> AsyncIterator[Wire]:
        host, port = base_url.removeprefix("http://").rstrip("/").split(":")
        # A small receive buffer: a client that does not read must soon stop the server's writing.
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def ask(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Send a request, and return the whole response."""
        await self.send(path, method, headers, body)
        return await self.read(method)

    async def send(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        lines = {"Host": "test", "Content-Length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await self.writer.drain()

    async def read(self, method: str = "GET") -> Answer:
        """Return the response to a request with `method`, which must be whole."""
        status, headers = await self.read_head()
        if method == "HEAD" or status < 200 or status in (204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            body = await self._read_chunks()
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(status, headers, body)

    async def read_head(self) -> tuple[int, dict[str, str]]:
        """Return status and headers, having read no more than the head of the response."""
        start, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().removesuffix("\r\n\r\n").split("\r\n")
        assert start.startswith("HTTP/1.1 "), start
        names = [line.partition(":")[0].lower() for line in lines]
        repeated = {name for name in names if names.count(name) > 1} - {"set-cookie"}
        assert not repeated, f"more than once: {repeated}"
        return int(start.split(" ", 2)[1]), {
            name: line.partition(":")[2].strip() for name, line in zip(names, lines, strict=True)
        }

    async def _read_chunks(self) -> bytes:
        chunks: list[bytes] = []
        while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
            chunks.append(await self.reader.readexactly(size))
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return b"".join(chunks)

    async def assert_nothing_follows(self) -> None:
        """Assert that the last response was the last thing on the wire: another one can follow it, or the end."""
        rest = await self.read_to_end()
        # The server's own answer to bytes that are no request.
        assert rest.startswith(b"HTTP/1.0 400 ") or not rest, rest

    async def read_to_end(self) -> bytes:
        """Return what is still to come, having asked for nothing more."""
        with suppress(OSError):
            # The server itself answers, and hangs up then: the application is not called.
            self.writer.write(b"no request\r\n\r\n")
            await self.writer.drain()
            return await self.reader.read()
        return b""

    def abort(self) -> None:
        """Leave at once."""
        self.writer.transport.abort()


async def ask(
    base_url: str, path: str = "/", method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
) -> Answer:
    """Request `path` on a connection of its own, where exactly one response must come."""
    async with asyncio.timeout(30), Wire.connect(base_url) as wire:
        answer = await wire.ask(path, method, headers, body)
        await wire.assert_nothing_follows()
        return answer
