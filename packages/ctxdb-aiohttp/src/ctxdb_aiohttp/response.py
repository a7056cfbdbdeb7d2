"""What becomes of a response: the status that it will have, how it is taken back, and the one that replaces it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import NoneType
from typing import Any, NoReturn

from aiohttp import web

__all__ = ["is_complete", "start_over", "status_of", "take_back", "write_server_error"]


def is_complete(response: object) -> bool:
    """Return whether `response` has all of its body: no code of the application runs while it is sent."""
    kind: Any = type(response)
    return (
        getattr(kind, "write_eof", None) is web.Response.write_eof
        and kind.prepare is web.Response.prepare
        and isinstance(getattr(response, "body", None), (bytes, bytearray, NoneType))
    )


async def status_of(response: web.StreamResponse | web.HTTPException, request: web.Request) -> int:
    """Return the status that `response` will be sent with.

    A `FileResponse` finds out while it is prepared: it may become a 206, a 304 or, where there is no file, a 404.
    """
    if not isinstance(response, web.FileResponse) or response.prepared:
        return response.status
    trial = _Trial(response)
    with suppress(_Prepared):
        await trial.prepare(request)
    return trial.status


class _Prepared(Exception):  # noqa: N818 - not an error
    """A trial has found its status."""


class _Trial(web.FileResponse):
    """A file's response that is prepared up to the point where it would start."""

    def __init__(self, response: web.FileResponse) -> None:
        # There is no public name for the path.
        super().__init__(response._path, status=response.status, headers=response.headers)  # noqa: SLF001

    async def _start(self, request: web.BaseRequest) -> NoReturn:
        raise _Prepared


def take_back(response: web.StreamResponse) -> None:
    """Make it as if `response`, which was refused while it was prepared, had not been: it cannot be written to.

    aiohttp takes a response for started before it asks the signal handlers. There are no public names for this.
    """
    response._payload_writer = None  # noqa: SLF001
    response._req = None  # noqa: SLF001


def start_over(writer: Any) -> None:
    """Make `writer` forget a response of which nothing has been written.

    It would send the next one as that one was to be sent: in chunks, cut off at its length, or compressed. There is no
    public name for the last.
    """
    writer.chunked = False
    writer.length = None
    writer._compress = None  # noqa: SLF001


async def write_server_error(
    request: web.Request, write_headers: Callable[[str, Any], Awaitable[None]], write_eof: Callable[[bytes], Any]
) -> None:
    """Write a 500 by the methods of a request's writer, and past those who watch it; its connection ends then."""
    response = web.Response(status=500, text="500 Internal Server Error\n\nServer got itself in trouble")
    assert isinstance(response.body, bytes)
    response.headers["Content-Length"] = str(len(response.body))
    response.headers["Connection"] = "close"
    major, minor = request.version
    await write_headers(f"HTTP/{major}.{minor} {response.status} {response.reason}", response.headers)
    await write_eof(b"" if request.method == "HEAD" else response.body)
