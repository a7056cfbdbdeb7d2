"""`Pooler`: does what PgBouncer does in transaction mode, as far as a driver can tell.

Each client has two connections to the server. The next transaction gets the other one: so what a client has prepared
outside of the transaction that uses it is not there.
"""

from __future__ import annotations

import asyncio

from tests.support.middleman import Middleman, read_message, read_startup

from ctxdb_pgstatus.testing import PostgresNode


class Pooler(Middleman):
    """Listens on a port of its own, and passes transactions on to a server that asks for no password.

    Attributes:
        host: its address, as a monitor takes it.
        transactions: how many have been passed on.
        halted: set when a transaction was halted by `halt`.
    """

    def __init__(self, node: PostgresNode) -> None:
        super().__init__()
        self._node = node
        self.transactions = 0
        self.halted = asyncio.Event()
        self._halts = False

    def halt(self) -> None:
        """Pass on nothing more of the next transaction when it has begun."""
        self._halts = True

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        relays: list[asyncio.Task[None]] = []
        try:
            startup = await read_startup(reader, writer)
            servers = []
            for number in range(2):
                server_reader, server_writer = await asyncio.open_connection(self._node.host, self._node.port)
                writers.append(server_writer)
                server_writer.write(startup)
                while (message := await read_message(server_reader))[:1] != b"Z":
                    if number == 0:
                        writer.write(message)
                if number == 0:
                    writer.write(message)
                ready: asyncio.Queue[bytes] = asyncio.Queue()
                relays.append(asyncio.create_task(_relay(server_reader, writer, ready)))
                servers.append((server_writer, ready))
            await self._pass_on(reader, servers)
        finally:
            # The server is closed first, as the wait for the relays may be cancelled.
            for each in writers:
                each.transport.abort()
            for relay in relays:
                relay.cancel()
            await asyncio.gather(*relays, return_exceptions=True)

    async def _pass_on(
        self, reader: asyncio.StreamReader, servers: list[tuple[asyncio.StreamWriter, asyncio.Queue[bytes]]]
    ) -> None:
        while True:
            message = await read_message(reader)
            server, ready = servers[0]
            server.write(message)
            if message[:1] not in (b"S", b"Q"):
                continue
            if await ready.get() == b"I":
                # Outside of a transaction, the connection goes back to the pool.
                self.transactions += 1
                servers.reverse()
            elif self._halts:
                await reader.readexactly(1)
                self.halted.set()
                await reader.read(-1)


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ready: asyncio.Queue[bytes]) -> None:
    while True:
        message = await read_message(reader)
        writer.write(message)
        if message[:1] == b"Z":
            ready.put_nowait(message[5:6])
