"""The sidecar's HTTP server: how it reads requests, limits clients, and ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from random import Random
from urllib.parse import urlsplit

import httpx
import pytest
from tests.support.database import eventually
from tests.support.server import http_client
from tests.support.sidecar import serve_sidecar

from ctxdb_pgstatus.sidecar.server import ClientLimits, Request, Response, Server

BRIEF = ClientLimits(request_seconds=0.1, idle_seconds=0.1, write_seconds=0.1)


class Desk:
    """Answers by the path: ``/wait`` once `may_answer` is set, ``/large`` a megabyte, ``/fail`` an error."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.may_answer = asyncio.Event()
        self.is_waiting = asyncio.Event()
        self.cancelled = 0

    def __call__(self, request: Request) -> Response | Awaitable[Response]:
        self.requests.append(request)
        if request.path == "/fail":
            raise ValueError("no answer to this")
        if request.path in ("/wait", "/fail-later"):
            return self._later(request)
        content = b"x" * (1 << 20) if request.path == "/large" else request.path.encode()
        return Response(200, content, b"text/plain")

    async def _later(self, request: Request) -> Response:
        self.is_waiting.set()
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if request.path == "/fail-later":
            raise ValueError("no answer to this")
        return Response(200, b"waited", b"text/plain")


class Client:
    """A connection to the server, over which a test sends bytes and reads responses."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *pieces: bytes) -> None:
        self.writer.write(b"".join(pieces))

    def get(self, path: str, *fields: str, version: str = "1.1") -> None:
        self.send("\r\n".join((f"GET {path} HTTP/{version}", *fields, "", "")).encode())

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the header fields and the body of the next response."""
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            start, *lines = head.strip().split("\r\n")
            fields = dict(line.split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(fields["content-length"]))
        return int(start.split()[1]), fields, body

    async def bodies(self, count: int) -> list[bytes]:
        return [(await self.response())[2] for _ in range(count)]

    async def rest(self) -> bytes:
        """Return all bytes that come until the server closes the connection."""
        async with asyncio.timeout(10):
            return await self.reader.read()

    async def status_at_the_end(self) -> int:
        """Return the status of the one response after which the server closes the connection."""
        return int((await self.rest()).split()[1])


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Client]:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
async def url(desk: Desk) -> AsyncIterator[str]:
    async with serve_sidecar(desk) as url:
        yield url


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_a_request_that_arrives_byte_by_byte_is_read(url: str, desk: Desk) -> None:
    fields = b"Host: x\r\nACCEPT: text/html, application/json\r\nCache-control: max-age=0, No-Cache\r\n"
    request = b"GET /a%20b?lag=1 HTTP/1.1\r\n" + fields + b"\r\n"
    async with connect(url) as client:
        for piece in (request[index : index + 1] for index in range(len(request))):
            client.send(piece)
            await client.writer.drain()
            await asyncio.sleep(0)
        assert await client.bodies(1) == [b"/a b"]
    assert desk.requests == [Request(b"GET", "/a b", b"lag=1", accepts_json=True, bypasses_memory=True)]


async def test_headers_of_a_request_do_not_apply_to_the_next_one(url: str, desk: Desk) -> None:
    async with connect(url) as client:
        client.get("/a", "Accept: application/json", "Cache-Control: no-cache")
        client.get("/b")
        assert await client.bodies(2) == [b"/a", b"/b"]
    assert [(each.accepts_json, each.bypasses_memory) for each in desk.requests] == [(True, True), (False, False)]


@pytest.mark.parametrize(
    ("accept", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("text/plain;q=0.9,application/json ; q=0.001", True),
        ("application/json;q=0", False),
        ("text/html, application/json; Q = 0.000", False),
        ("application/json-seq", False),
        ("*/*", False),
        ("text/plain", False),
    ],
)
async def test_json_is_accepted_where_it_is_named_with_a_quality_above_0(
    url: str, desk: Desk, accept: str, is_json: bool
) -> None:
    async with connect(url) as client:
        client.get("/a", f"Accept: {accept}")
        await client.bodies(1)
    assert [each.accepts_json for each in desk.requests] == [is_json]


async def test_requests_that_come_at_once_are_answered_in_their_order(url: str, desk: Desk) -> None:
    async with connect(url) as client:
        for path in ("/a", "/wait", "/b", "/wait", "/c"):
            client.get(path)
        assert await client.bodies(1) == [b"/a"]
        await desk.is_waiting.wait()
        assert [each.path for each in desk.requests] == ["/a", "/wait"]
        desk.may_answer.set()
        assert await client.bodies(4) == [b"waited", b"/b", b"waited", b"/c"]


async def test_a_head_request_gets_no_body(url: str) -> None:
    async with connect(url) as client:
        client.send(b"HEAD /abc HTTP/1.1\r\n\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 4\r\n" in head
        client.get("/next")
        assert await client.bodies(1) == [b"/next"]


async def test_an_answer_has_a_date(url: str) -> None:
    async with connect(url) as client:
        client.get("/")
        _, fields, _ = await client.response()
    assert parsedate_to_datetime(fields["date"]).tzinfo is not None
    assert fields["date"].endswith("GMT")


@pytest.mark.parametrize(
    ("version", "fields", "answered", "stays"),
    [
        ("1.1", [], None, True),
        ("1.1", ["Connection: close"], "close", False),
        ("1.0", [], "close", False),
        ("1.0", ["Connection: keep-alive"], "keep-alive", True),
        ("1.1", ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"], "close", False),
    ],
)
async def test_a_connection_is_kept_or_closed_as_the_client_asks(
    url: str, version: str, fields: list[str], answered: str | None, stays: bool
) -> None:
    async with connect(url) as client:
        client.get("/a", *fields, version=version)
        status, given, body = await client.response()
        assert (status, given.get("connection"), body) == (200, answered, b"/a")
        if stays:
            client.get("/b")
            assert await client.bodies(1) == [b"/b"]
        else:
            assert await client.rest() == b""


@pytest.mark.parametrize(
    ("target", "path"),
    [("http://sidecar/a?b", "/a"), ("http://sidecar", "*"), ("*", "*")],
    ids=["absolute", "no path", "all"],
)
async def test_a_target_in_absolute_or_asterisk_form_is_understood(
    url: str, desk: Desk, target: str, path: str
) -> None:
    async with connect(url) as client:
        client.send(f"OPTIONS {target} HTTP/1.1\r\n\r\n".encode())
        assert await client.bodies(1) == [path.encode()]


@pytest.mark.parametrize(
    "sent",
    [
        b"BREW / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"CONNECT h:1 HTTP/1.1\r\n\r\n",
    ],
)
async def test_malformed_request_is_refused(url: str, sent: bytes) -> None:
    async with connect(url) as client:
        client.send(sent)
        assert await client.status_at_the_end() == 400


@pytest.mark.parametrize("path", ["/fail", "/fail-later"])
async def test_an_answer_that_fails_is_a_500_and_the_connection_goes_on(
    url: str, desk: Desk, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    desk.may_answer.set()
    async with connect(url) as client:
        with caplog.at_level(logging.ERROR, "ctxdb_pgstatus.http"):
            client.get(path)
            assert (await client.response())[0] == 500
        client.get("/next")
        assert await client.bodies(1) == [b"/next"]
    assert "no answer to this" in caplog.text


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks cannot be started eagerly")
async def test_a_connection_goes_on_behind_an_answer_whose_task_is_started_eagerly(url: str, desk: Desk) -> None:
    asyncio.get_running_loop().set_task_factory(vars(asyncio)["eager_task_factory"])
    desk.may_answer.set()
    async with connect(url) as client:
        for path in ("/wait", "/next"):
            client.get(path)
        assert await client.bodies(2) == [b"waited", b"/next"]


async def test_the_server_survives_malformed_input(url: str, caplog: pytest.LogCaptureFixture) -> None:
    random = Random(4711)
    request = b"POST http://h:1/a?b HTTP/1.1\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
    request += b"1\r\na\r\n0\r\n\r\n"
    for _ in range(300):
        sent = bytearray(request)
        for _ in range(random.randrange(1, 6)):
            place = random.randrange(len(sent))
            if random.random() < 0.5:
                sent[place] = random.randrange(256)
            else:
                del sent[place : place + random.randrange(8)]
        async with connect(url) as client:
            client.send(bytes(sent))
            client.writer.write_eof()
            with suppress(ConnectionError):
                await client.rest()
    async with connect(url) as client:
        client.get("/a")
        assert await client.bodies(1) == [b"/a"]
    assert caplog.text == ""


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: bbbbbbbbbbbbbbbbbbbb\r\n" * 1000 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"a" * 70_000, 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n%b\r\n" % (b"a" * 4096) * 20, 413),
    ],
    ids=["an address", "a field", "many fields", "many long fields", "a body", "a body in chunks"],
)
async def test_oversized_request_is_refused(url: str, desk: Desk, sent: bytes, status: int) -> None:
    async with connect(url) as client:
        client.send(sent)
        assert await client.status_at_the_end() == status
    assert desk.requests == []


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\na", b"GET / HTTP/1.1\r\na: b"])
async def test_a_header_field_without_an_end_is_cut_off(url: str, start: bytes) -> None:
    async with connect(url) as client:
        client.send(start)
        sent = 0
        # The server closes the connection while this sends.
        with suppress(ConnectionError):
            while not client.reader.at_eof() and sent < 100:
                client.send(b"a" * 10_000)
                await client.writer.drain()
                sent += 1
                await asyncio.sleep(0)
    assert sent < 100


async def test_the_small_body_of_a_request_is_ignored(url: str) -> None:
    async with connect(url) as client:
        client.send(b"GET /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello")
        client.get("/b")
        assert await client.bodies(2) == [b"/a", b"/b"]


@pytest.mark.parametrize(
    "sent", [b"G", b"GET / HTTP/1.1\r\nhost: ", b"GET / HTTP/1.1\r\nContent-Length: 10\r\n\r\nhello"]
)
async def test_an_incomplete_request_is_answered_by_408(desk: Desk, sent: bytes) -> None:
    async with serve_sidecar(desk, BRIEF) as url, connect(url) as client:
        client.send(sent)
        assert await client.status_at_the_end() == 408


async def test_an_incomplete_request_behind_a_whole_one_is_answered_by_408(desk: Desk) -> None:
    async with serve_sidecar(desk, ClientLimits(request_seconds=0.1)) as url, connect(url) as client:
        client.get("/a")
        client.send(b"GET /b HTT")
        assert await client.bodies(1) == [b"/a"]
        assert await client.status_at_the_end() == 408


async def test_a_request_that_trickles_in_gets_no_extra_time(desk: Desk) -> None:
    async with serve_sidecar(desk, BRIEF) as url, connect(url) as client:
        client.send(b"GET /")
        ended = asyncio.create_task(client.status_at_the_end())
        with suppress(ConnectionError):
            while not ended.done():
                client.send(b"a")
                await client.writer.drain()
                await asyncio.sleep(0.001)
        with suppress(ConnectionError):
            assert await ended == 408


@pytest.mark.parametrize("first", [False, True], ids=["from the beginning", "after a request"])
async def test_an_idle_connection_is_closed(desk: Desk, first: bool) -> None:
    async with serve_sidecar(desk, BRIEF) as url, connect(url) as client:
        if first:
            client.get("/a")
            assert await client.bodies(1) == [b"/a"]
        assert await client.rest() == b""


async def test_a_connection_that_waits_for_an_answer_does_not_count_as_idle(desk: Desk) -> None:
    async with serve_sidecar(desk, BRIEF) as url, connect(url) as client:
        client.get("/wait")
        async with connect(url) as other:
            # The other connection is idle until the server closes it, as it would have closed the first one by then.
            other.get("/a")
            await other.rest()
        desk.may_answer.set()
        assert await client.bodies(1) == [b"waited"]


async def test_a_client_that_does_not_read_its_answers_is_cut_off(desk: Desk) -> None:
    async with serve_sidecar(desk, ClientLimits(write_seconds=0.1)) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname or "", address.port or 0)) as client:
            client.sendall(b"GET /large HTTP/1.1\r\n\r\n" * 200)
            client.setblocking(False)
            # The server answers no further request of a client that does not read its answers.
            await eventually(lambda: bool(desk.requests), "no request")
            await eventually(lambda: _is_reset(client), "the connection stays")
            assert len(desk.requests) < 20


def _is_reset(client: socket.socket) -> bool:
    try:
        client.send(b"a")
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


async def test_a_client_that_reads_slowly_gets_all_of_its_answers(url: str) -> None:
    async with connect(url) as client:
        for _ in range(20):
            client.get("/large")
        client.get("/end")
        assert [len(body) for body in await client.bodies(21)] == [1 << 20] * 20 + [4]


async def test_pending_answer_is_cancelled_when_the_client_has_left(url: str, desk: Desk) -> None:
    async with connect(url) as client:
        client.get("/wait")
        client.get("/a")
        await desk.is_waiting.wait()
    await eventually(lambda: desk.cancelled == 1, "it is still waited for")
    assert [each.path for each in desk.requests] == ["/wait"]


async def test_a_client_with_too_many_waiting_requests_is_cut_off(url: str, desk: Desk) -> None:
    async with connect(url) as client:
        client.get("/wait")
        await desk.is_waiting.wait()
        for _ in range(200):
            client.get("/a")
        with suppress(ConnectionError):
            assert await client.rest() == b""
    await eventually(lambda: desk.cancelled == 1, "it is still waited for")


async def _answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/c")).text == "/c"
    except httpx.TransportError:
        return False


async def test_connections_beyond_the_limit_are_refused(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_sidecar(desk, ClientLimits(connections=2)) as url:
        async with connect(url) as first, connect(url) as second:
            for client in (first, second):
                client.get("/a")
                await client.bodies(1)
            with caplog.at_level(logging.WARNING, "ctxdb_pgstatus.http"):
                for _ in range(3):
                    with suppress(ConnectionError):
                        async with connect(url) as third:
                            assert await third.rest() == b""
            first.get("/b")
            assert await first.bodies(1) == [b"/b"]
        async with http_client(url) as http:
            async with asyncio.timeout(10):
                while not await _answers(http):
                    await asyncio.sleep(0)
    assert caplog.text.count("too many connections") == 1


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_a_stopping_server_answers_requests_under_way(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(desk)
        await server.start(listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with connect(url) as busy, connect(url) as idle:
            busy.get("/wait")
            idle.get("/a")
            await idle.bodies(1)
            await desk.is_waiting.wait()
            ending = asyncio.create_task(server.stop(60))
            assert await idle.rest() == b""
            assert not ending.done()
            desk.may_answer.set()
            status, fields, body = await busy.response()
            assert (status, fields["connection"], body) == (200, "close", b"waited")
            await ending


async def test_a_stopping_server_waits_for_answers_no_longer_than_its_grace(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(desk)
        await server.start(listener)
        async with connect(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            client.get("/wait")
            await desk.is_waiting.wait()
            await server.stop(0.01)
            with suppress(ConnectionError):
                assert await client.rest() == b""
    await eventually(lambda: desk.cancelled == 1, "it is still waited for")
