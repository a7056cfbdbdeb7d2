"""Every way in which an aiohttp handler can respond."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from aiohttp import web


@dataclass(frozen=True)
class Kind:
    """A kind of response."""

    name: str
    make: Callable[[web.Request, Path], Awaitable[web.StreamResponse]]
    """Makes the response, and starts it if it is of a kind that the handler starts; the path is a file's to send."""
    status: int = 200
    body: str = "success"


async def _plain(request: web.Request, path: Path) -> web.StreamResponse:
    return web.Response(text="success")


async def _json(request: web.Request, path: Path) -> web.StreamResponse:
    return web.json_response("success")


async def _empty(request: web.Request, path: Path) -> web.StreamResponse:
    return web.Response(status=204)


async def _with_cookie(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.Response(text="success")
    response.set_cookie("name", "value")
    return response


async def _compressed(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.Response(text="success")
    response.enable_compression(web.ContentCoding.deflate)
    return response


async def _in_chunks(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.Response(text="success")
    response.enable_chunked_encoding()
    return response


async def _raised(request: web.Request, path: Path) -> web.StreamResponse:
    raise web.HTTPSeeOther("/elsewhere", text="success")


async def _prepared(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.Response(text="success")
    await response.prepare(request)
    return response


async def _generated(request: web.Request, path: Path) -> web.StreamResponse:
    async def body() -> AsyncGenerator[bytes, None]:
        yield b"succ"
        yield b"ess"

    return web.Response(body=body())


async def _buffer(request: web.Request, path: Path) -> web.StreamResponse:
    return web.Response(body=BytesIO(b"success"))


async def _stream(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"succ")
    await response.write(b"ess")
    return response


async def _stream_to_its_end(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write_eof(b"success")
    return response


async def _stream_of_known_length(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_length = 7
    await response.prepare(request)
    await response.write(b"success")
    return response


async def _compressed_stream(request: web.Request, path: Path) -> web.StreamResponse:
    response = web.StreamResponse()
    response.enable_compression(web.ContentCoding.deflate)
    await response.prepare(request)
    await response.write(b"success")
    return response


async def _file(request: web.Request, path: Path) -> web.StreamResponse:
    path.write_text("success")
    return web.FileResponse(path)


async def _prepared_file(request: web.Request, path: Path) -> web.StreamResponse:
    path.write_text("success")
    response = web.FileResponse(path)
    await response.prepare(request)
    return response


STARTED_BY_AIOHTTP = (
    Kind("plain", _plain),
    Kind("json", _json, body='"success"'),
    Kind("empty", _empty, status=204, body=""),
    Kind("with_cookie", _with_cookie),
    Kind("compressed", _compressed),
    Kind("in_chunks", _in_chunks),
    Kind("raised", _raised, status=303),
    Kind("generated", _generated),
    Kind("buffer", _buffer),
    Kind("file", _file),
)
"""Responses that are sent when all middlewares have returned."""

STARTED_BY_HANDLER = (
    Kind("prepared", _prepared),
    Kind("stream", _stream),
    Kind("stream_to_its_end", _stream_to_its_end),
    Kind("stream_of_known_length", _stream_of_known_length),
    Kind("compressed_stream", _compressed_stream),
    Kind("prepared_file", _prepared_file),
)
"""Responses that start inside of the handler."""

KINDS = STARTED_BY_AIOHTTP + STARTED_BY_HANDLER
