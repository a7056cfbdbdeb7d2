"""`Middleman`: the base of proxies between a client and a server; and functions that read PostgreSQL's messages."""

from __future__ import annotations

import asyncio
import struct
from typing import Self

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104


class Middleman:
    """Listens on a port of its own at 127.0.0.1. Leaving it ends all connections.

    Attributes:
        port: its port.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._run, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *args: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of a client. The connection is over when this returns."""
        raise NotImplementedError

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self.serve(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)


async def read_startup(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Return the client's first message; a client that asks for encryption before is told that there is none."""
    while True:
        head = await reader.readexactly(8)
        size, code = struct.unpack("!ii", head)
        if code not in (_SSL_REQUEST, _GSS_REQUEST):
            return head + await reader.readexactly(size - 8)
        writer.write(b"N")


async def answer_ssl_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Tell a client that asks for TLS, and must do so, to go on with the handshake."""
    size, code = struct.unpack("!ii", await reader.readexactly(8))
    assert (size, code) == (8, _SSL_REQUEST)
    writer.write(b"S")


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Return a message that is not the first of a client."""
    head = await reader.readexactly(5)
    return head + await reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)
