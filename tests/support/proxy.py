"""`Proxy`: a way to a PostgreSQL server that a test can close, block, delay, and lead to another server."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Protocol

from tests.support.middleman import Middleman, read_startup


class Place(Protocol):
    """Where a server is: a `PostgresNode`, for instance."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


class Proxy(Middleman):
    """A way to a node that a test can close, block, delay, and lead to another node.

    Args:
        node: the node that it leads to. Several nodes take turns.
        delay: how many seconds it takes to pass on what was sent, in each direction.

    Attributes:
        nodes: the nodes that new connections lead to. Open connections stay with their nodes.
        delay: how many seconds it takes to pass on what was sent, also over open connections.
        refusals: how many of the next connections are closed at once.
        attempts: how many connections were opened to the proxy.
        blocked: whether new connections are accepted, and nothing is passed on.
        error: the SQLSTATE and the message by which connections are refused, as by a server that is starting up;
            ``None`` if they are not.
        host: the address of the proxy, as a monitor takes it.
    """

    def __init__(self, *nodes: Place, delay: float = 0.0) -> None:
        super().__init__()
        self.nodes: tuple[Place, ...] = nodes
        self.delay = delay
        self.refusals = 0
        self.attempts = 0
        self.blocked = False
        self.error: tuple[str, str] | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aexit__(self, *args: object) -> None:
        self.drop()
        await super().__aexit__(*args)

    @contextlib.asynccontextmanager
    async def listening_at(self, path: str) -> AsyncIterator[None]:
        """Serve connections by a Unix socket as well."""
        server = await asyncio.start_unix_server(self._run, path)
        try:
            yield
        finally:
            server.close()

    def drop(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attempts += 1
        self._writers.add(writer)
        if self.refusals:
            self.refusals -= 1
            return
        if self.error is not None:
            await _refuse(reader, writer, *self.error)
            return
        if self.blocked:
            await reader.read(-1)
            return
        node = self.nodes[self.attempts % len(self.nodes)]
        upstream, up = await asyncio.open_connection(node.host, node.port)
        self._writers.add(up)
        await asyncio.gather(self._pump(reader, up), self._pump(upstream, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
        finally:
            writer.transport.abort()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sqlstate: str, message: str) -> None:
    """Answer the first message of a connection with an error (PostgreSQL's "Message Formats")."""
    await read_startup(reader, writer)
    fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": message}
    body = b"".join(name.encode() + value.encode() + b"\0" for name, value in fields.items()) + b"\0"
    writer.write(b"E" + struct.pack("!i", len(body) + 4) + body)
    with contextlib.suppress(OSError):
        await writer.drain()
    writer.close()
