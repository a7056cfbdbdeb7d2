"""The sidecar's HTTP server: HTTP/1.1 for small answers out of memory, within limits that no client can go past.

httptools, which is llhttp, reads the requests. What is here is what a server around it has to decide: how long a client
may take for a request, how much it may send, in which order its requests are answered, and what becomes of an answer
that is waited for when its client leaves.
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
    """What a client may take.

    Attributes:
        head: how many bytes a request's line and header fields may have together.
        fields: how many header fields a request may have.
        body: how many bytes of a body are read, and thrown away: no request needs one.
        request_seconds: how long a request may take to arrive, from its first byte to its last, or from the connection
            on.
        idle_seconds: how long a connection is kept between two requests.
        write_seconds: how long a client may leave answers unread.
        connections: how many connections may be open.
        queue: how many requests of a connection may wait for the answer to another one.
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
    """What a client asks.

    Attributes:
        method: ``GET``, for instance.
        path: without the query, decoded.
        query: what follows the question mark, as it was sent.
        accepts_json: whether it prefers JSON.
        bypasses_memory: whether the answer shall not come out of memory (``Cache-Control: no-cache``).
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
        content_type: what the body is.
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
        """Return what is sent.

        Args:
            date: the value of the date field.
            connection: the field that says what becomes of the connection, with its end of line; or nothing.
            with_content: whether the body is sent, which ``HEAD`` does not ask for.
        """
        content = self.content if with_content else b""
        return b"%b%b\r\n%b%b\r\n\r\n%b" % (self.start, date, connection, self.fields, content)


def error(status: int, text: str) -> Response:
    """Return a response that says in plain text what is wrong."""
    return Response(status, text.encode(), b"text/plain; charset=utf-8")


Answer: TypeAlias = Callable[[Request], Response | Awaitable[Response]]
"""Answers a request: at once, or by an awaitable, which is cancelled if the client leaves."""

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
            # Python is in the C locale unless a program says otherwise.
            self._text = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now)).encode()
        return self._text


class Server:
    """Serves answers on a socket.

    Args:
        answer: what answers requests; it may be called on the server's event loop only.
        limits: what a client may take.
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
            grace: for how many seconds to wait for them.
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
    """One client. Its requests are read by httptools, which calls the methods whose names begin with ``on_``."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._parser: Any = None
        # Requests that came while an answer was waited for, each with the field that its answer says of the connection.
        self._queue: deque[tuple[Request, bytes]] = deque()
        self._waiting: asyncio.Task[None] | None = None
        self._is_paused = False
        self._reads = True
        # One timer serves all limits of time. It is not set anew at each request: when it rings, it looks whether the
        # deadline has moved.
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # Whether a request has arrived in part, and whether its deadline is set: the first one's is, by the connection.
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
            # Nobody is there any more for whom it would be found out.
            self._waiting.cancel()
        self._queue.clear()
        self._parser = None

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._transport.is_closing():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request was answered as if it had not asked for another protocol.
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
            # What httptools holds of a field that has not ended; the callbacks count the others.
            self._unread_size += size
            if self._unread_size > self._limits.head:
                self._refuse(_TOO_MANY_FIELDS)
                return
        if not self._is_timed:
            self._is_timed = True
            self._deadline = self._loop.time() + self._limits.request_seconds
            self._hurry()

    def pause_writing(self) -> None:
        # The client does not read its answers: until it does, no further request of it is read or answered.
        self._is_paused = True
        self._pause_reading()
        self._deadline = self._loop.time() + self._limits.write_seconds
        self._hurry()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._deadline = self._loop.time() + self._limits.idle_seconds
        self._go_on()

    def _hurry(self) -> None:
        """Have the timer ring in time for a deadline that was brought forward."""
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        now = self._loop.time()
        if self._waiting is not None and not self._is_paused:
            # An answer that is waited for has its own limit.
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
            self._bypasses_memory = self._bypasses_memory or b"no-cache" in value

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
            # The absolute form, as it is sent to proxies. The others (RFC 9112, section 3.2) name no path.
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
            # Such a client waits to be told that its connection is kept.
            connection = _KEEP_ALIVE
        else:
            connection = b""
        if self._waiting is not None or self._is_paused or self._queue:
            # While an answer is waited for, what the client sends is read on: else its leaving would not be noticed.
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
        """Answer what came while an answer was waited for, or could not be sent."""
        while self._queue and self._waiting is None and not self._is_paused:
            self._answer(*self._queue.popleft())
        is_idle = not self._queue and self._waiting is None and not self._is_paused
        if is_idle and not self._reads and not self._transport.is_closing():
            self._reads = True
            self._transport.resume_reading()

    def _refuse(self, status: int) -> None:
        """Say what is wrong with a request, and read no further: where the next one begins is not known."""
        if self._waiting is None and not self._queue and not self._transport.is_closing():
            response = error(status, HTTPStatus(status).phrase)
            self._transport.write(response.encode(self._server.clock.date(), _CLOSE, with_content=True))
        self._queue.clear()
        self._transport.close()

    def finish(self) -> None:
        """Close as soon as what is under way is answered."""
        if self._waiting is None and not self._queue:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()


def _accepts_json(value: bytes) -> bool:
    """Return whether an Accept field names JSON, with a quality that is not 0 (RFC 9110, 12.4.2)."""
    if value == b"application/json":
        return True
    for accepted in value.lower().split(b","):
        media_type, *parameters = (part.strip() for part in accepted.split(b";"))
        if media_type == b"application/json":
            return not any(_QUALITY_OF_ZERO.fullmatch(parameter) for parameter in parameters)
    return False


class _RefusedError(Exception):
    """A request is not answered: it is longer than it may be, for instance."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_QUALITY_OF_ZERO = re.compile(rb"q\s*=\s*0(\.0*)?")
_CLOSE = b"connection: close\r\n"
_KEEP_ALIVE = b"connection: keep-alive\r\n"
_LENGTH_OF_ACCEPT = len("accept")
_LENGTH_OF_CACHE_CONTROL = len("cache-control")
