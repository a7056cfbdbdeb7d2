"""`PgBouncer`: the pooler itself, from the system's package, in front of a test's server."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import Self

from tests.support.proxy import Place

COMMAND = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
"""The command; ``None`` where it is not installed."""

_NOBODY = 65534


class PgBouncer:
    """PgBouncer on a port of its own, as an async context manager.

    Args:
        server: where it leads to.
        directory: where its settings are put.
        mode: what it pools: ``transaction`` or ``session``.
        settings: others of its settings.
    """

    def __init__(self, server: Place, directory: Path, mode: str = "transaction", **settings: str) -> None:
        self._directory = directory
        self._server = server
        self._settings = {
            "listen_addr": "127.0.0.1",
            "auth_type": "any",
            "pool_mode": mode,
            "unix_socket_dir": "",
            "ignore_startup_parameters": "extra_float_digits",
            **settings,
        }

    async def __aenter__(self) -> Self:
        assert COMMAND is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        lines = [
            "[databases]",
            f"* = host={self._server.host} port={self._server.port} user=postgres",
            "[pgbouncer]",
            f"listen_port = {self.port}",
            *(f"{name} = {value}" for name, value in self._settings.items()),
        ]
        file = self._directory / "pgbouncer.ini"
        file.write_text("\n".join(lines))
        command = [COMMAND, str(file)]
        if os.getuid() == 0:
            # PgBouncer refuses to run as root.
            for folder in (self._directory, *self._directory.parents):
                if folder.stat().st_uid == 0 and folder != Path("/") and folder != Path("/tmp"):
                    folder.chmod(folder.stat().st_mode | 0o055)
            command = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *command]
        self._process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        await self._wait_until_it_listens()
        return self

    async def __aexit__(self, *args: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _wait_until_it_listens(self) -> None:
        async with asyncio.timeout(20):
            while True:
                assert self._process.returncode is None, "PgBouncer has ended"
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    return
