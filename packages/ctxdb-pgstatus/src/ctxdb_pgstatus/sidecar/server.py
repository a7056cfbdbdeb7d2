"""The sidecar's HTTP server: HTTP/1.1 for small answers out of memory, within limits that no client can exceed.

httptools, which wraps llhttp, parses the requests. This module decides what a server has to decide beside that: how
long a client may take for a request, how much it may send, in which order its requests are answered, and what happens
to an answer under way when its client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias
from urllib.parse import unquote

import httptools

__all__ = ["Answer", "ClientLimits", "Request", "Response", "Server", "error"]

_logger = logging.getLogger("ctxdb_pgstatus.http")

_BAD_REQUEST, _REQUEST_TIMEOUT, _TOO_LONG_A_BODY, _TOO_LONG_AN_ADDRESS = 400, 408, 413, 414
_TOO_MANY_REQUESTS, _TOO_MANY_FIELDS, _INTERNAL_ERROR = 429, 431, 500


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """How much a client may send, how long it may take, and how many clients there may be.

    Attributes:
        head: how many bytes a request's line and header fields may have together.
        fields: how many header fields a request may have.
        body: how many bytes of a body are read, and thrown away, as no endpoint needs a body.
        request_seconds: how long a request may take to arrive, from its first byte to its last; for the first request,
            from the opening of the connection.
        idle_seconds: how long a connection is kept between two requests.
        write_seconds: how long a client may leave answers unread.
        connections: how many connections may be open.
        queue: how many requests of a connection may wait for the answer to an earlier one.
    """

    head: int = 16 * 1024
    fields: int = 100
    body: int = 64 * 1024
    request_seconds: float = 10.0
    # Clients that ask every few seconds keep their connection.
    idle_seconds: float = 75.0
    write_seconds: float = 10.0
    connections: int = 1000
    queue: int = 100


@dataclass(slots=True)
class Request:
    """A request.

    Attributes:
        method: the method, such as ``GET``.
        path: the path of the target, decoded.
        query: the query of the target (the part after the question mark) as it was sent.
        accepts_json: whether the client accepts JSON.
        bypasses_memory: whether the answer must not come out of memory (``Cache-Control: no-cache``; RFC 9111, section
            5.2.1.4).
    """

    method: bytes
    path: str
    query: bytes
    accepts_json: bool
    bypasses_memory: bool


class Response:
    """An answer, encoded once, however often it is sent.

    Args:
        status: the status code.
        content: the body.
        content_type: the media type of the body.
        fields: further header fields.
    """

    __slots__ = ("content", "fields", "start", "status")

    def __init__(
        self, status: int, content: bytes, content_type: bytes, fields: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        self.status: int = status
        self.content: bytes = content
        self.start: bytes = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ndate: ".encode()
        lines = [b"content-length: %d" % len(content), b"cache-control: no-store"]
        lines += [b"%b: %b" % field for field in fields]
        if content:
            lines.append(b"content-type: " + content_type)
        self.fields: bytes = b"\r\n".join(lines)

    def encode(self, date: bytes, connection: bytes, *, with_content: bool) -> bytes:
        """Return the bytes of the response.

        Args:
            date: the value of the ``Date`` field.
            connection: a ``Connection`` field with its end of line; or nothing.
            with_content: whether the body is sent. It is not in the answer to ``HEAD``.
        """
        content = self.content if with_content else b""
        return b"%b%b\r\n%b%b\r\n\r\n%b" % (self.start, date, connection, self.fields, content)


def error(status: int, text: str) -> Response:
    """Return a response that says in plain text why a request failed."""
    return Response(status, text.encode(), b"text/plain; charset=utf-8")


Answer: TypeAlias = Callable[[Request], Response | Awaitable[Response]]
"""Returns the response to a request, or an awaitable of it, which is cancelled if the client leaves."""

_FAILED = error(_INTERNAL_ERROR, "Internal Server Error")


class _Clock:
    """The date for header fields (RFC 9110, section 6.6.1), formatted once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def date(self) -> bytes:
        now = int(time.time())
        if now != self._second:
            self._second = now
            # The names of days and months are English: Python is in the C locale, unless a program sets another one.
            self._text = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now)).encode()
        return self._text


class Server:
    """Serves HTTP on a socket.

    Args:
        answer: answers requests; called on the server's event loop.
        limits: the limits for clients.
    """

    def __init__(self, answer: Answer, limits: ClientLimits | None = None) -> None:
        self.answer = answer
        self.limits: ClientLimits = limits or ClientLimits()
        self.clock: _Clock = _Clock()
        self.is_closing: bool = False
        self._connections: set[_Connection] = set()
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._server: asyncio.Server | None = None
        self._is_full = False

    async def start(self, listener: socket.socket) -> None:
        """Accept connections from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), sock=listener)

    async def stop(self, grace: float) -> None:
        """Accept no more connections, and let requests that are under way be answered.

        Args:
            grace: for how many seconds to wait for these answers, before their connections are cut off.
        """
        self.is_closing = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.finish()
        try:
            async with asyncio.timeout(grace):
                await self._all_closed.wait()
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """Cut off all connections."""
        for connection in list(self._connections):
            connection.abort()

    def opened(self, connection: _Connection) -> bool:
        """Count a connection; return whether it may stay."""
        is_full = len(self._connections) >= self.limits.connections
        if is_full and not self._is_full:
            _logger.warning("too many connections: further ones are refused", extra={"limit": self.limits.connections})
        self._is_full = is_full
        if is_full or self.is_closing:
            return False
        self._connections.add(connection)
        self._all_closed.clear()
        return True

    def closed(self, connection: _Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        if not self._connections:
            self._all_closed.set()


class _Connection(asyncio.Protocol):
    """The connection of a client. httptools parses requests, and calls the methods whose names begin with ``on_``."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._parser: Any = None
        # Requests that came while an earlier one was not answered yet, each with the `Connection` field of its answer.
        self._queue: deque[tuple[Request, bytes]] = deque()
        # The task of the answer that is waited for.
        self._waiting: asyncio.Task[None] | None = None
        # Whether the client leaves answers unread, so that no further answer can be sent.
        self._is_paused = False
        # Whether the transport reads what the client sends.
        self._reads = True
        # One timer serves all limits of time. It is not set anew at each request: when it rings, `_on_time` looks
        # whether the deadline has moved.
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # Whether a part of a request has arrived, and whether its deadline is set. The deadline of the first request is
        # set when the connection is opened.
        self._is_receiving = False
        self._is_timed = True
        self._begin()

    def _begin(self) -> None:
        self._url = b""
        self._fields = self._head_size = self._body_size = self._unread_size = 0
        self._has_head = False
        self._accepts_json = self._bypasses_memory = False

    # --- the transport ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if not self._server.opened(self):
            self._transport.abort()
            return
        self._parser = httptools.HttpRequestParser(self)
        self._deadline = self._loop.time() + self._limits.request_seconds
        self._timer = self._loop.call_at(self._deadline, self._on_time)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting is not None:
            # The client has left before it was answered.
            self._waiting.cancel()
        self._queue.clear()
        self._parser = None

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._transport.is_closing():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request asks for another protocol, and was answered in HTTP/1.1. httptools parses nothing after it.
            self.finish()
        except httptools.HttpParserCallbackError as exc:
            reason = exc.__context__
            if not isinstance(reason, _RefusedError):
                raise
            self._refuse(reason.status)
        except httptools.HttpParserError:
            self._refuse(_BAD_REQUEST)
        else:
            if self._is_receiving:
                self._received_in_part(len(data))

    def _received_in_part(self, size: int) -> None:
        if not self._has_head:
            # httptools keeps a header field until it is complete, and only then calls `on_header`, which counts it.
            self._unread_size += size
            if self._unread_size > self._limits.head:
                self._refuse(_TOO_MANY_FIELDS)
                return
        if not self._is_timed:
            self._is_timed = True
            self._deadline = self._loop.time() + self._limits.request_seconds
            self._hurry()

    def pause_writing(self) -> None:
        # The client does not read its answers. Until it does, none of its requests is read or answered.
        self._is_paused = True
        self._pause_reading()
        self._deadline = self._loop.time() + self._limits.write_seconds
        self._hurry()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._deadline = self._loop.time() + self._limits.idle_seconds
        self._go_on()

    def _hurry(self) -> None:
        """Set the timer, if it would ring after the deadline."""
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        now = self._loop.time()
        if self._waiting is not None and not self._is_paused:
            # The time of a client does not run while it waits for an answer of the server.
            self._deadline = max(self._deadline, now + self._limits.idle_seconds)
        if self._deadline > now:
            self._hurry()
        elif self._is_paused:
            self._transport.abort()
        elif self._is_receiving:
            self._refuse(_REQUEST_TIMEOUT)
        else:
            self._transport.close()

    def _pause_reading(self) -> None:
        if self._reads and not self._transport.is_closing():
            self._reads = False
            self._transport.pause_reading()

    # --- the parser ---------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begin()
        self._is_receiving = True

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url), _TOO_LONG_AN_ADDRESS)

    def on_header(self, name: bytes, value: bytes) -> None:
        size = len(name)
        self._fields += 1
        self._count(size + len(value), _TOO_MANY_FIELDS)
        if size == _LENGTH_OF_ACCEPT and name.lower() == b"accept":
            self._accepts_json = self._accepts_json or _accepts_json(value)
        elif size == _LENGTH_OF_CACHE_CONTROL and name.lower() == b"cache-control":
            self._bypasses_memory = self._bypasses_memory or b"no-cache" in value.lower()

    def _count(self, size: int, status: int) -> None:
        self._head_size += size
        if self._head_size > self._limits.head or self._fields > self._limits.fields:
            raise _RefusedError(status)

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._limits.body:
            raise _RefusedError(_TOO_LONG_A_BODY)

    def on_message_complete(self) -> None:
        parser = self._parser
        self._is_receiving = self._is_timed = False
        if not self._is_paused:
            self._deadline = self._loop.time() + self._limits.idle_seconds
        url = self._url
        if not url.startswith(b"/"):
            # The target is in absolute form, as clients send it to proxies. The other forms (RFC 9112, section 3.2), of
            # CONNECT and OPTIONS, name no path.
            try:
                parsed = httptools.parse_url(url)
            except httptools.HttpParserError:
                raise _RefusedError(_BAD_REQUEST) from None
            url = (parsed.path or b"*") + (b"?" + parsed.query if parsed.query else b"")
        raw_path, _, query = url.partition(b"?")
        path = raw_path.decode("latin-1")
        if "%" in path:
            path = unquote(path)
        request = Request(parser.get_method(), path, query, self._accepts_json, self._bypasses_memory)
        if not parser.should_keep_alive() or parser.should_upgrade():
            connection = _CLOSE
        elif parser.get_http_version() == "1.0":
            # A client of HTTP/1.0 that has asked for it relies on being told that its connection is kept.
            connection = _KEEP_ALIVE
        else:
            connection = b""
        if self._waiting is not None or self._is_paused or self._queue:
            # The client is read from also while an answer is waited for, as it would not be noticed else that it
            # leaves. So the number of its requests that wait is limited.
            if self._waiting is not None and len(self._queue) >= self._limits.queue:
                raise _RefusedError(_TOO_MANY_REQUESTS)
            self._queue.append((request, connection))
        else:
            self._answer(request, connection)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, request: Request, connection: bytes) -> None:
        try:
            answer = self._server.answer(request)
        except Exception:
            _logger.exception("a request could not be answered", extra={"path": request.path})
            answer = _FAILED
        if isinstance(answer, Response):
            self._send(answer, request, connection)
        else:
            self._waiting = self._loop.create_task(self._answer_later(answer, request, connection))

    async def _answer_later(self, answer: Awaitable[Response], request: Request, connection: bytes) -> None:
        # An eager task (Python 3.12) takes its first step before it is what the connection waits for.
        await asyncio.sleep(0)
        try:
            response = await answer
        except Exception:
            _logger.exception("a request could not be answered", extra={"path": request.path})
            response = _FAILED
        self._waiting = None
        self._deadline = self._loop.time() + self._limits.idle_seconds
        self._send(response, request, connection)
        self._go_on()

    def _send(self, response: Response, request: Request, connection: bytes) -> None:
        if self._server.is_closing:
            connection = _CLOSE
        date = self._server.clock.date()
        self._transport.write(response.encode(date, connection, with_content=request.method != b"HEAD"))
        if connection is _CLOSE:
            self._queue.clear()
            self._transport.close()

    def _go_on(self) -> None:
        """Answer the requests that had to wait."""
        while self._queue and self._waiting is None and not self._is_paused:
            self._answer(*self._queue.popleft())
        is_idle = not self._queue and self._waiting is None and not self._is_paused
        if is_idle and not self._reads and not self._transport.is_closing():
            self._reads = True
            self._transport.resume_reading()

    def _refuse(self, status: int) -> None:
        """Answer a request by an error and close the connection, as the beginning of the next request is not known.

        If an earlier request is not answered yet, nothing is sent: the client would take it for that answer.
        """
        if self._waiting is None and not self._queue and not self._transport.is_closing():
            response = error(status, HTTPStatus(status).phrase)
            self._transport.write(response.encode(self._server.clock.date(), _CLOSE, with_content=True))
        self._queue.clear()
        self._transport.close()

    def finish(self) -> None:
        """Close the connection, unless a request is under way: then its answer closes it."""
        if self._waiting is None and not self._queue:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection off."""
        self._transport.abort()


def _accepts_json(value: bytes) -> bool:
    """Return whether an Accept field names JSON, with a quality that is not 0 (RFC 9110, section 12.4.2)."""
    if value == b"application/json":
        return True
    for accepted in value.lower().split(b","):
        media_type, *parameters = (part.strip() for part in accepted.split(b";"))
        if media_type == b"application/json":
            return not any(_QUALITY_OF_ZERO.fullmatch(parameter) for parameter in parameters)
    return False


class _RefusedError(Exception):
    """A request breaks a limit or a rule, and is answered by an error. Raised in callbacks of the parser."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_QUALITY_OF_ZERO = re.compile(rb"q\s*=\s*0(\.0*)?")
_CLOSE = b"connection: close\r\n"
_KEEP_ALIVE = b"connection: keep-alive\r\n"
_LENGTH_OF_ACCEPT = len("accept")
_LENGTH_OF_CACHE_CONTROL = len("cache-control")
