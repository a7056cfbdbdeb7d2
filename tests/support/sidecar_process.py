"""The sidecar in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import make_url
from tests.support.database import eventually
from tests.support.server import http_client

from ctxdb_pgstatus.testing import EmbeddedPostgres


@dataclass
class Process:
    """The process of a sidecar, and the lines that it has logged."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode().rstrip("\n"))

    def logged(self, message: str) -> dict[str, object] | None:
        for line in self.lines:
            content: dict[str, object] = json.loads(line)
            if content["message"] == message:
                return content
        return None

    async def url(self) -> str:
        await eventually(lambda: self.logged("server started") is not None, lambda: "\n".join(self.lines))
        started = self.logged("server started")
        assert started is not None
        address = str(started["address"])
        # A sidecar that listens on all addresses is asked by the loopback address.
        host = "127.0.0.1" if address in {"::", "0.0.0.0"} else f"[{address}]" if ":" in address else address
        return f"http://{host}:{started['port']}"

    async def ready(self) -> str:
        """Wait until the sidecar has asked each host once, and return its URL."""
        url = await self.url()
        async with asyncio.timeout(30), http_client(url) as client:
            while (await client.get("/ready")).status_code == 503:
                await asyncio.sleep(0.01)
        return url

    async def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(20):
            return await self.process.wait()


COMMANDS = {
    "script": [str(Path(sys.executable).with_name("ctxdb-pgstatus"))],
    "module": [sys.executable, "-m", "ctxdb_pgstatus"],
}


def variables_of(server: EmbeddedPostgres) -> dict[str, str]:
    """Return the variables, without their prefix, that lead a sidecar to a server."""
    url = make_url(server.url())
    return {
        "hosts": f"{url.host}:{url.port}",
        "pg_user": url.username or "",
        "pg_password": url.password or "",
        "pg_database": url.database or "",
    }


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("pg_status__")}
    return inherited | {f"pg_status__{name}": value for name, value in variables.items()}


@asynccontextmanager
async def running(command: str = "module", **variables: str) -> AsyncIterator[Process]:
    variables = {"http_port": "0", "log_format": "json"} | variables
    process = await asyncio.create_subprocess_exec(
        *COMMANDS[command],
        env=environment(**variables),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    sidecar = Process(process)
    reading = asyncio.create_task(sidecar.read())
    try:
        yield sidecar
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


async def fails(**variables: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMANDS["module"], env=environment(**variables), stderr=asyncio.subprocess.PIPE
    )
    _, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, error.decode()
