"""HTTP clients on the loopback interface: quick ones that ask as fast as they are answered, and slow readers."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

HOST = "127.0.0.1"

_SLOW_BYTES = 512
_SLOW_PAUSE_SECONDS = 0.1
_RECEIVE_BUFFER = 4096


@dataclass
class Count:
    """How many requests were answered by a 200, and how many otherwise."""

    answered: int = 0
    failed: int = 0


class _QuickClient(asyncio.Protocol):
    """One keep-alive connection: the next request leaves when the last one is answered."""

    def __init__(self, path: str, count: Count) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode()
        self._count = count
        self._received = b""
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        _, _, length = head.lower().partition(b"content-length:")
        if len(body) < int(length.partition(b"\r\n")[0]):
            return
        if head.startswith(b"HTTP/1.1 200"):
            self._count.answered += 1
        else:
            self._count.failed += 1
        self._received = b""
        self.transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


async def requests_per_second(port: int, path: str, clients: int, seconds: float) -> float:
    """Let `clients` ask for `path` for `seconds`; return how many were answered by a 200, a second.

    A server closes the connection after some errors: it is opened again.
    """
    count = Count()

    async def ask() -> None:
        while True:
            _, client = await asyncio.get_running_loop().create_connection(
                lambda: _QuickClient(path, count), HOST, port
            )
            try:
                await client.lost
            finally:
                client.transport.abort()

    start = time.perf_counter()
    tasks = [asyncio.create_task(ask()) for _ in range(clients)]
    try:
        await asyncio.sleep(seconds)
        elapsed = time.perf_counter() - start
        answered = count.answered
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return answered / elapsed


@asynccontextmanager
async def slow_readers(port: int, path: str, readers: int) -> AsyncIterator[None]:
    """Keep `readers` busy with a response each, of which they read a few bytes now and then, during the block."""
    tasks = [asyncio.create_task(_read_slowly(port, path)) for _ in range(readers)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_slowly(port: int, path: str) -> None:
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode()
    while True:
        # A small buffer, as on a line that is as slow as its reader.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.settimeout(0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            await loop.sock_connect(connection, (HOST, port))
            await loop.sock_sendall(connection, request)
            # A reader that was refused asks again.
            while (received := await loop.sock_recv(connection, _SLOW_BYTES)) and b" 500 " not in received[:16]:
                await asyncio.sleep(_SLOW_PAUSE_SECONDS)
