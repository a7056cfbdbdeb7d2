"""`TLSFront`: TLS before a PostgreSQL server that has none, with a certificate that is made for the test."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from pathlib import Path
from typing import Self

from ctxdb_pgstatus.testing import PostgresNode

_SSL_REQUEST = 80877103


async def make_certificate(directory: Path) -> Path:
    """Make a key and a certificate for 127.0.0.1 that signs itself; return the file that holds both."""
    file = directory / "server.pem"
    process = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", str(file), "-out", str(directory / "certificate.pem")),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    file.write_text(file.read_text() + (directory / "certificate.pem").read_text())
    return file


class TLSFront:
    """Answers the SSLRequest of PostgreSQL's protocol, and passes on what comes through TLS.

    Attributes:
        host: its address.
        port: its port.
        handshakes: how many connections have come by TLS.
    """

    def __init__(self, node: PostgresNode, certificate: Path) -> None:
        self._node = node
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate)
        self.handshakes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.host, self.port = self._server.sockets[0].getsockname()
        return self

    async def __aexit__(self, *args: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            size, code = struct.unpack("!ii", await reader.readexactly(8))
            assert (size, code) == (8, _SSL_REQUEST)
            writer.write(b"S")
            await writer.start_tls(self._context)
            self.handshakes += 1
            upstream, up = await asyncio.open_connection(self._node.host, self._node.port)
            await asyncio.gather(_pump(reader, up), _pump(upstream, writer))
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
    writer.transport.abort()
