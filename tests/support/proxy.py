"""`Proxy`: a way to a PostgreSQL server that a test can close, block, make long, and lead elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from ctxdb_pgstatus.testing import PostgresNode


class Proxy:
    """A way to a node that can be closed, blocked, made long, and led elsewhere.

    Args:
        node: where it leads to; several take turns.
        delay: how many seconds what is sent takes in each direction.

    Attributes:
        nodes: where it leads to. Connections that are open stay where they are.
        delay: see above; also that of open connections.
        refusals: how many connections to close at once.
        attempts: how many connections there have been.
        blocked: whether connections are accepted, and nothing is passed on.
        host: its address, as a monitor takes it.
    """

    def __init__(self, *nodes: PostgresNode, delay: float = 0.0) -> None:
        self.nodes = nodes
        self.delay = delay
        self.refusals = 0
        self.attempts = 0
        self.blocked = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.host = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *args: object) -> None:
        self._server.close()
        self.drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drop(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.attempts += 1
        self._writers.add(writer)
        try:
            if self.refusals:
                self.refusals -= 1
                return
            if self.blocked:
                await reader.read(-1)
                return
            node = self.nodes[self.attempts % len(self.nodes)]
            upstream, up = await asyncio.open_connection(node.host, node.port)
            self._writers.add(up)
            with contextlib.suppress(OSError):
                await asyncio.gather(self._pump(reader, up), self._pump(upstream, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
        finally:
            writer.transport.abort()
