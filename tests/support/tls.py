"""`TLSFront`: TLS before a PostgreSQL server that has none, with a certificate that is made for the test."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

from tests.support.middleman import Middleman, answer_ssl_request

from ctxdb_pgstatus.testing import PostgresNode


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


class TLSFront(Middleman):
    """Answers the SSLRequest of PostgreSQL's protocol, and passes on what comes through TLS.

    Attributes:
        host: its address.
        handshakes: how many connections have come by TLS.
    """

    host = "127.0.0.1"

    def __init__(self, node: PostgresNode, certificate: Path) -> None:
        super().__init__()
        self._node = node
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate)
        self.handshakes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_ssl_request(reader, writer)
        await writer.start_tls(self._context)
        self.handshakes += 1
        upstream, up = await asyncio.open_connection(self._node.host, self._node.port)
        await asyncio.gather(_pump(reader, up), _pump(upstream, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
    writer.transport.abort()
