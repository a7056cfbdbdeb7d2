"""`FaultyNetwork`: a way to PostgreSQL, or to MariaDB, that fails at a named point of its protocol.

It reads the messages of both sides (PostgreSQL, "Frontend/Backend Protocol"), so a test can say: the network fails when
the client sends BEGIN, or when the server answers COMMIT.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import Enum, auto

from tests.support.middleman import Middleman, read_message, read_startup


class Point(Enum):
    """The message that is on the way when the network fails: it does not arrive."""

    STARTUP = auto()
    """The client's first message."""
    BEGIN = auto()
    """The client's BEGIN."""
    STATEMENT = auto()
    """The first statement of the client's in a transaction."""
    ANSWER = auto()
    """The server's answer to the first statement."""
    COMMIT = auto()
    """The client's COMMIT."""
    SAVEPOINT = auto()
    """The client's SAVEPOINT."""
    RELEASE = auto()
    """The client's RELEASE of a savepoint."""
    RELEASED = auto()
    """The server's answer to RELEASE."""
    ROLLBACK = auto()
    """The client's ROLLBACK, or ROLLBACK TO a savepoint."""
    PREPARE = auto()
    """The client's PREPARE TRANSACTION."""
    PREPARED = auto()
    """The server's answer to PREPARE TRANSACTION: the transaction waits for COMMIT PREPARED."""
    COMMIT_PREPARED = auto()
    """The client's COMMIT PREPARED."""
    COMMITTED_PREPARED = auto()
    """The server's answer to COMMIT PREPARED."""
    COMMITTED = auto()
    """The server's answer to COMMIT: the transaction has been committed."""


# By how a statement begins.
_POINTS_OF_CLIENT = {
    b"SAVEPOINT": Point.SAVEPOINT,
    b"RELEASE": Point.RELEASE,
    b"ROLLBACK": Point.ROLLBACK,
    b"PREPARE TRANSACTION": Point.PREPARE,
    b"COMMIT PREPARED": Point.COMMIT_PREPARED,
}

# By the tag of CommandComplete.
_POINTS_OF_SERVER = {
    b"COMMIT\0": Point.COMMITTED,
    b"RELEASE\0": Point.RELEASED,
    b"PREPARE TRANSACTION\0": Point.PREPARED,
    b"COMMIT PREPARED\0": Point.COMMITTED_PREPARED,
}


class Fault(Enum):
    """How the network fails."""

    DROP = auto()
    """Both sides are told that the connection has ended."""
    RESET = auto()
    """Both sides get a reset instead of an orderly end, as from a firewall."""
    HALF_CLOSE = auto()
    """The client is told that the server sends no more; what the client sends arrives nowhere."""
    NOTICE = auto()
    """The client gets the server's message that the connection is ended, and the end itself when it says goodbye."""
    PANIC = auto()
    """The client gets the message of a server that cannot write to its disk any more, and the connection ends."""
    BLACK_HOLE = auto()
    """Nothing arrives any more, and no side is told."""


_CANCEL_REQUEST = struct.pack("!i", 80877102)


class FaultyNetwork(Middleman):
    """Listens on a port of its own, and passes on to a server what comes there.

    Args:
        host: the server's address.
        port: its port.

    Attributes:
        port: where it listens.
        connections: how many connections there have been.
        cancel_requests: how many requests to cancel a query.
        answered_cancel_requests: how many of them the server has dealt with, by the end of their connections.
        delay: how many seconds each message of the server takes.
        lets_execute: while it is not set, the client's statements are held back (its Query and Bind messages).
        holds_back: whether one has been held back.
        lets_in: whether new connections are accepted; else they are closed at once.
        on_statement: called with the text of each statement that the client sends.
        failed: whether the fault has happened.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._target = host, port
        self.connections = 0
        self.cancel_requests = self.answered_cancel_requests = 0
        self.delay = 0.0
        self.on_statement: Callable[[str], object] = lambda statement: None
        self.failed = asyncio.Event()
        self.lets_in = True
        self.lets_execute, self.holds_back = asyncio.Event(), asyncio.Event()
        self.lets_execute.set()
        self._fault: tuple[Point, Fault] | None = None
        self._is_dark = False
        self._links: set[_Link] = set()

    def fail(self, point: Point, fault: Fault) -> None:
        """Fail in this way when `point` is reached next, on that one connection."""
        self._fault = point, fault
        self.failed.clear()

    def heal(self) -> None:
        """Let nothing fail any more that has not failed yet."""
        self._fault = None

    def break_all(self, fault: Fault) -> None:
        """Fail now, on each connection that there is."""
        for link in list(self._links):
            link.break_(fault)

    def go_dark(self) -> None:
        """Let nothing through any more, on new connections neither; they are accepted."""
        self._is_dark = True
        self.break_all(Fault.BLACK_HOLE)

    def _reached(self, point: Point, link: _Link) -> bool:
        if self._fault is None or self._fault[0] is not point:
            return False
        fault, self._fault = self._fault[1], None
        link.break_(fault)
        self.failed.set()
        return True

    @property
    def _link_class(self) -> type[_Link]:
        return _Link

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link: _Link | None = None
        try:
            if not self.lets_in:
                return
            startup = await self._read_startup(reader, writer)
            if self._is_dark:
                await asyncio.Event().wait()
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            link = self._link_class(reader, writer, server_reader, server_writer)
            self._links.add(link)
            if startup[4:8] == _CANCEL_REQUEST or not self._reached(Point.STARTUP, link):
                server_writer.write(startup)
            await link.run(self, self._reached)
            if startup[4:8] == _CANCEL_REQUEST:
                self.answered_cancel_requests += 1
        finally:
            if link is not None:
                self._links.discard(link)
                link.server_writer.transport.abort()

    async def _read_startup(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Read the client's first message, and count what it begins."""
        startup = await read_startup(reader, writer)
        if startup[4:8] == _CANCEL_REQUEST:
            self.cancel_requests += 1
        else:
            self.connections += 1
        return startup


class FaultyMariaDBNetwork(FaultyNetwork):
    """The same for MariaDB, whose transactions begin without a BEGIN: with `STATEMENT`, `COMMIT` and `COMMITTED`."""

    @property
    def _link_class(self) -> type[_Link]:
        return _MariaDBLink

    async def _read_startup(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        # The server sends the first message of a connection.
        self.connections += 1
        return b""


class _Link:
    """One connection, seen from both sides."""

    def __init__(
        self,
        client_reader: asyncio.StreamReader,
        client_writer: asyncio.StreamWriter,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
    ) -> None:
        self.client_reader, self.client_writer = client_reader, client_writer
        self.server_reader, self.server_writer = server_reader, server_writer
        self._is_broken = self._gives_notice = False
        self._is_in_transaction = False
        self._awaits_answer = False
        self._relays: list[asyncio.Task[None]] = []

    async def run(self, network: FaultyNetwork, reached: Callable[[Point, _Link], bool]) -> None:
        self._relays = [
            asyncio.create_task(self._relay_client(network, reached)),
            asyncio.create_task(self._relay_server(network, reached)),
        ]
        try:
            await asyncio.wait(self._relays, return_when=asyncio.FIRST_COMPLETED)
            if self.is_broken() and not self._gives_notice:
                # The fault goes on until the test ends the network, or the client leaves. The relay of the client may
                # wait for its next message: only one task can read a stream.
                await self._end_relays()
                await self.client_reader.read(-1)
        finally:
            await self._end_relays()

    async def _end_relays(self) -> None:
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    def is_broken(self) -> bool:
        """Return whether the network has stopped to pass anything on."""
        return self._is_broken

    def break_(self, fault: Fault) -> None:
        self._is_broken = True
        if fault is Fault.DROP:
            self.client_writer.close()
            self.server_writer.close()
        elif fault is Fault.RESET:
            for writer in (self.client_writer, self.server_writer):
                # With a linger time of none, a socket is reset when it is closed (socket(7)).
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        elif fault is Fault.HALF_CLOSE:
            self.client_writer.write_eof()
        elif fault is Fault.NOTICE:
            self._gives_notice = True
            self.client_writer.write(_error("FATAL", "57P01", "terminating connection due to administrator command"))
        elif fault is Fault.PANIC:
            self.client_writer.write(_error("PANIC", "53100", "could not write to file: No space left on device"))
            self.client_writer.close()
            self.server_writer.close()

    async def _relay_client(self, network: FaultyNetwork, reached: Callable[[Point, _Link], bool]) -> None:
        while not self.is_broken():
            message = await read_message(self.client_reader)
            point = self._point_of(message, network)
            if self.is_broken() or (point is not None and reached(point, self)):
                return
            if message[:1] in (b"Q", b"B") and not network.lets_execute.is_set():
                network.holds_back.set()
                await network.lets_execute.wait()
            self.server_writer.write(message)

    def _point_of(self, message: bytes, network: FaultyNetwork) -> Point | None:
        if message[:1] not in (b"Q", b"P"):
            return None
        # A query's text, or a statement's name and its text.
        text = message[5:].split(b"\0", 2)[1 if message[:1] == b"P" else 0].strip()
        network.on_statement(text.decode())
        text = text.upper()
        if text.startswith(b"BEGIN"):
            self._is_in_transaction = True
            return Point.BEGIN
        for word, named in _POINTS_OF_CLIENT.items():
            if text.startswith(word):
                return named
        if text.startswith(b"COMMIT"):
            self._is_in_transaction = False
            return Point.COMMIT
        if self._is_in_transaction:
            self._is_in_transaction = False
            self._awaits_answer = True
            return Point.STATEMENT
        return None

    async def _relay_server(self, network: FaultyNetwork, reached: Callable[[Point, _Link], bool]) -> None:
        while not self.is_broken():
            message = await read_message(self.server_reader)
            if network.delay:
                await asyncio.sleep(network.delay)
            point = _POINTS_OF_SERVER.get(message[5:]) if message[:1] == b"C" else None
            if point is None and self._awaits_answer:
                self._awaits_answer = False
                point = Point.ANSWER
            if self.is_broken() or (point is not None and reached(point, self)):
                return
            self.client_writer.write(message)


def _error(severity: str, sqlstate: str, message: str) -> bytes:
    """Return the message "ErrorResponse" of PostgreSQL's protocol."""
    fields = f"S{severity}\0V{severity}\0C{sqlstate}\0M{message}\0\0".encode()
    return b"E" + struct.pack("!i", len(fields) + 4) + fields


class _MariaDBLink(_Link):
    """One connection to MariaDB (MariaDB, "Client/Server Protocol")."""

    _awaits_commit = False

    async def _relay_client(self, network: FaultyNetwork, reached: Callable[[Point, _Link], bool]) -> None:
        while not self.is_broken():
            packet = await _read_packet(self.client_reader)
            point = None
            # The first packet of a command; COM_QUERY is 3.
            if packet[3:5] == b"\0\3":
                statement = packet[5:].decode()
                network.on_statement(statement)
                is_commit = statement.upper() == "COMMIT"
                point = Point.COMMIT if is_commit else Point.STATEMENT
            if self.is_broken() or (point is not None and reached(point, self)):
                return
            self._awaits_commit = point is Point.COMMIT
            self.server_writer.write(packet)

    async def _relay_server(self, network: FaultyNetwork, reached: Callable[[Point, _Link], bool]) -> None:
        while not self.is_broken():
            packet = await _read_packet(self.server_reader)
            if self.is_broken() or (self._awaits_commit and reached(Point.COMMITTED, self)):
                return
            self.client_writer.write(packet)


async def _read_packet(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(4)
    return head + await reader.readexactly(int.from_bytes(head[:3], "little"))
