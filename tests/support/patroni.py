"""`PatroniCluster`: PostgreSQL servers under Patroni, which agree by etcd on which of them is the leader."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import asyncpg
import httpx

from ctxdb_core.testing.postgres import find_binaries, find_free_port

PATRONI = shutil.which("patroni")
"""The command of the package from PyPI; ``None`` where it is not installed."""
ETCD = shutil.which("etcd")
"""The command; ``None`` where it is not installed."""

_SCOPE = "payments"
_SETTINGS: dict[str, str | int] = {
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": 100,
    "unix_socket_directories": "",
    "dynamic_shared_memory_type": "mmap",
    "wal_keep_size": "64MB",
    "min_wal_size": "8MB",
    "wal_retrieve_retry_interval": "50ms",
}


@dataclass(eq=False)
class PatroniMember:
    """One server, and the Patroni that looks after it."""

    name: str
    host: str
    port: int
    api: str
    directory: Path
    process: asyncio.subprocess.Process | None = field(default=None)

    @property
    def address(self) -> str:
        """The host, as `PatroniDiscovery` names it."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """SQLAlchemy's, as the superuser."""
        return f"postgresql+asyncpg://postgres@{self.host}:{self.port}/postgres"

    async def fetch(self, statement: str) -> list[asyncpg.Record]:
        """Execute a statement as the superuser, and return its rows."""
        connection = await asyncpg.connect(host=self.host, port=self.port, user="postgres", database="postgres")
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    def kill_server(self) -> None:
        """End all processes of the server by SIGKILL; its Patroni goes on."""
        file = self.directory / "data" / "postmaster.pid"
        with suppress(FileNotFoundError, ProcessLookupError):
            pid = int(file.read_text().split()[0])
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (pid, *map(int, children)):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)

    async def kill(self) -> None:
        """End Patroni and the server by SIGKILL at once, as if the machine had died."""
        self.end()
        if self.process is not None:
            await self.process.wait()

    def end(self) -> None:
        """Send the signals of `kill`, and do not wait."""
        # Patroni first: it would start the server again.
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
        self.kill_server()


class PatroniCluster:
    """Three members with synchronous replication, as an async context manager."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="ctxdb-patroni-", dir="/tmp"))
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._etcd: asyncio.subprocess.Process | None = None
        self._etcd_url = ""
        self._http = httpx.AsyncClient(timeout=30)
        self.members: list[PatroniMember] = []

    async def __aenter__(self) -> Self:
        try:
            if self._account is not None:
                # PostgreSQL refuses to run as root.
                os.chown(self._directory, self._account.pw_uid, self._account.pw_gid)
            await self._start_etcd()
            hosts = [f"127.0.0.{number}" for number in (2, 3, 4)]
            port, api_port = find_free_port(hosts), find_free_port(hosts)
            for number, host in enumerate(hosts, start=1):
                directory = self._directory / f"n{number}"
                self.members.append(PatroniMember(f"n{number}", host, port, f"http://{host}:{api_port}", directory))
            # The first one makes the cluster, the others copy it.
            await self.start(self.members[0])
            await self.find("primary")
            for member in self.members[1:]:
                await self.start(member)
            for member in self.members[1:]:
                await _until(partial(self.is_ready, member, "replica"))
            await self.find("synchronous")
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *args: object) -> None:
        await self._stop()

    async def start(self, member: PatroniMember) -> None:
        """Start the Patroni of a member, which starts the server."""
        member.directory.mkdir(exist_ok=True)
        file = member.directory / "patroni.json"
        # JSON is YAML.
        file.write_text(json.dumps(self._configuration(member)))
        if self._account is not None:
            for path in (member.directory, file):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)
        assert PATRONI is not None
        with (member.directory / "log").open("ab") as log:
            member.process = await asyncio.create_subprocess_exec(
                *self._launcher(), PATRONI, str(file), stdout=log, stderr=log, cwd=self._directory
            )

    async def switch_over(self, leader: PatroniMember, candidate: PatroniMember) -> None:
        """Have the leader hand its role to another member: returns when that is done."""
        content = {"leader": leader.name, "candidate": candidate.name}
        response = await self._http.post(f"{leader.api}/switchover", json=content)
        assert response.status_code == 200, response.text

    async def expire_leader(self) -> None:
        """End the lease of a leader that has died, for which its time to live would have to pass: 20 s at the least."""
        key = base64.b64encode(f"/service/{_SCOPE}/leader".encode()).decode()
        found = (await self._http.post(f"{self._etcd_url}/v3/kv/range", json={"key": key})).json()["kvs"]
        for each in found:
            response = await self._http.post(f"{self._etcd_url}/v3/lease/revoke", json={"ID": each["lease"]})
            response.raise_for_status()

    async def find(self, role: str, *, other_than: PatroniMember | None = None) -> PatroniMember:
        """Wait until a member says that it has a role, and return it.

        Args:
            role: ``primary``, ``replica`` or ``synchronous``.
            other_than: a member that does not count.
        """
        found: list[PatroniMember] = []

        async def is_there() -> bool:
            for member in self.members:
                if member is not other_than and await self.is_ready(member, role):
                    found.append(member)
            return bool(found)

        await _until(is_there)
        return found[0]

    async def is_ready(self, member: PatroniMember, role: str) -> bool:
        """Return whether a member says that it has a role."""
        with suppress(httpx.HTTPError):
            return (await self._http.get(f"{member.api}/{role}")).status_code == 200
        return False

    def logs(self) -> str:
        """Return what all members have logged last."""
        return "\n".join(
            f"--- {member.name}\n{(member.directory / 'log').read_text()[-3000:]}"
            for member in self.members
            if (member.directory / "log").exists()
        )

    def _launcher(self) -> list[str]:
        if self._account is None:
            return []
        # The account of the servers, which may read the interpreter wherever it is. It ends with the tests.
        return [
            "setpriv",
            f"--reuid={self._account.pw_uid}",
            f"--regid={self._account.pw_gid}",
            "--clear-groups",
            "--inh-caps=+dac_override",
            "--ambient-caps=+dac_override",
            "--pdeathsig=TERM",
        ]

    async def _start_etcd(self) -> None:
        client_port, peer_port = find_free_port(["127.0.0.1"]), find_free_port(["127.0.0.1"])
        self._etcd_url, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
        assert ETCD is not None
        options = {
            "name": "e1",
            "data-dir": str(self._directory / "etcd"),
            "listen-client-urls": self._etcd_url,
            "advertise-client-urls": self._etcd_url,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"e1={peer}",
            "unsafe-no-fsync": "true",
        }
        with (self._directory / "etcd.log").open("wb") as log:
            self._etcd = await asyncio.create_subprocess_exec(
                *self._launcher(),
                ETCD,
                *(f"--{name}={value}" for name, value in options.items()),
                stdout=log,
                stderr=log,
            )

        async def is_healthy() -> bool:
            with suppress(httpx.HTTPError):
                return (await self._http.get(f"{self._etcd_url}/health")).is_success
            return False

        await _until(is_healthy)

    def _configuration(self, member: PatroniMember) -> dict[str, Any]:
        address = f"{member.host}:{member.port}"
        access = ["local all all trust", "host all all 127.0.0.0/8 trust", "host replication all 127.0.0.0/8 trust"]
        api = member.api.removeprefix("http://")
        return {
            "scope": _SCOPE,
            "name": member.name,
            "restapi": {"listen": api, "connect_address": api},
            "etcd3": {"hosts": self._etcd_url.removeprefix("http://")},
            "bootstrap": {
                "dcs": {
                    # The shortest times that Patroni takes.
                    "ttl": 20,
                    "loop_wait": 1,
                    "retry_timeout": 3,
                    # A leader whose server has died is succeeded at once, instead of being started again.
                    "primary_start_timeout": 0,
                    "synchronous_mode": True,
                    "synchronous_mode_strict": True,
                    "postgresql": {"use_pg_rewind": True, "parameters": _SETTINGS},
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, {"wal-segsize": "1"}, "no-sync"],
            },
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(member.directory / "data"),
                "bin_dir": str(find_binaries()),
                "pgpass": str(member.directory / "pgpass"),
                "pg_hba": access,
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "postgres"},
                    "rewind": {"username": "postgres"},
                },
                "basebackup": {"checkpoint": "fast", "no-sync": None},
            },
        }

    async def _stop(self) -> None:
        # pytest shows it with a failure.
        print(self.logs())  # noqa: T201 - see above
        for member in self.members:
            member.end()
        if self._etcd is not None and self._etcd.returncode is None:
            self._etcd.kill()
        for process in (self._etcd, *(member.process for member in self.members)):
            if process is not None:
                await process.wait()
        await self._http.aclose()
        shutil.rmtree(self._directory, ignore_errors=True)


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until `condition` holds, and leave the processor to the members meanwhile."""
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.1)
