"""`WatchedWriter`: calls the `Delivery` of a response before its head and its end are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from aiohttp import web

__all__ = ["Delivery", "WatchedWriter", "start_over", "status_in", "write_server_error"]

_METHODS = ("write_headers", "write", "write_eof")


class Delivery(ABC):
    """How a response is written while code of the application may run; each kind of response has one of its own."""

    @abstractmethod
    async def start(self, watched: WatchedWriter, status_line: str, headers: Any) -> None:
        """Write the head of the response, after what has to be done before that."""

    @abstractmethod
    async def progress(self) -> None:
        """Do what has to be done before a part of the body is written."""

    @abstractmethod
    async def end(self, watched: WatchedWriter, chunk: bytes) -> None:
        """Write the end of the body, after what has to be done before that."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the request: its unit of work has ended."""


class WatchedWriter:
    """The writer of a request, some methods of which are replaced on this one object: it serves this one request.

    Each response to a request goes through the request's writer, no matter which code prepares it, and with which copy
    of the request. So this is where transactions can be ended in time: before the head of a response is written, before
    a part of its body is, and before the end of that.

    Args:
        writer: the request's; untyped, as no type knows of methods that are replaced.
        delivery: what is told first.
    """

    def __init__(self, writer: Any, delivery: Delivery) -> None:
        self.writer = writer
        self.delivery = delivery
        methods = vars(writer)
        # Code further out may have replaced them, too; then its methods are what the writer is told by.
        self._replaced = {name: methods[name] for name in _METHODS if name in methods}
        self.forward_head: Any = writer.write_headers
        self.forward_part: Any = writer.write
        self.forward_eof: Any = writer.write_eof
        writer.write_headers, writer.write, writer.write_eof = self.write_headers, self.write, self.write_eof

    async def write_headers(self, status_line: str, headers: Any) -> None:
        """Stand in for ``AbstractStreamWriter.write_headers``."""
        await self.delivery.start(self, status_line, headers)

    async def write(self, *args: Any, **options: Any) -> None:
        """Stand in for ``AbstractStreamWriter.write``."""
        await self.delivery.progress()
        await self.forward_part(*args, **options)

    async def write_eof(self, chunk: bytes = b"") -> None:
        """Stand in for ``AbstractStreamWriter.write_eof``."""
        await self.delivery.end(self, chunk)

    def restore(self) -> None:
        """Give the writer back the methods that it had before."""
        methods = vars(self.writer)
        for name in _METHODS:
            methods.pop(name, None)
        methods.update(self._replaced)
        self.delivery.release()


def status_in(status_line: str) -> int:
    """Return the status in the first line of a response, ``HTTP/1.1 200 OK``."""
    return int(status_line.split(" ", 2)[1])


def start_over(writer: Any) -> None:
    """Make `writer` forget a response of which nothing has been written.

    It would send the next response as that one was to be sent: in chunks, cut off at its length, or compressed. There
    is no public name for the last.
    """
    writer.chunked = False
    writer.length = None
    writer._compress = None  # noqa: SLF001


async def write_server_error(request: web.BaseRequest, watched: WatchedWriter) -> None:
    """Write a 500, past the delivery of a response that cannot be sent; the connection ends after it."""
    response = web.Response(status=500, text="500 Internal Server Error\n\nServer got itself in trouble")
    assert isinstance(response.body, bytes)
    response.headers["Content-Length"] = str(len(response.body))
    response.headers["Connection"] = "close"
    major, minor = request.version
    await watched.forward_head(f"HTTP/{major}.{minor} {response.status} {response.reason}", response.headers)
    await watched.forward_eof(b"" if request.method == "HEAD" else response.body)
