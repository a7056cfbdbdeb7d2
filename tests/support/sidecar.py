"""The sidecar in the process of the tests, with a monitor that knows what a test sets, and a stand-in for pg-status."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

from ctxdb_pgstatus import ClusterStatus, HostStatus, SyncCondition
from ctxdb_pgstatus.sidecar.app import Monitor, SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.sidecar.server import Answer, ClientLimits, Server

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def master(name: str, **values: Any) -> HostStatus:
    host = HostStatus(
        name,
        alive=True,
        role="master",
        since=START,
        timeline=1,
        position=0x3000060,
        lag_ms=0,
        lag_bytes=0,
        in_sync_by_time=True,
        in_sync_by_bytes=True,
    )
    return replace(host, **values)


def replica(name: str, *, by_time: bool = True, by_bytes: bool = True, **values: Any) -> HostStatus:
    host = HostStatus(
        name,
        alive=True,
        role="replica",
        since=START,
        timeline=1,
        position=0x3000000 if by_bytes else 0x2000000,
        lag_ms=5 if by_time else 6193,
        lag_bytes=0x60 if by_bytes else 0x1000060,
        in_sync_by_time=by_time,
        in_sync_by_bytes=by_bytes,
    )
    return replace(host, **values)


def dead(name: str, error: str = "connection refused") -> HostStatus:
    return HostStatus(name, alive=False, role=None, since=START, error=error)


def cluster(*hosts: HostStatus, master: str | None = "n1", at: datetime = START) -> ClusterStatus:
    return ClusterStatus(hosts, master, at)


@dataclass
class FakeMonitor:
    """A monitor whose status a test sets. A poll or a confirmation makes the first status of `next` its status."""

    status: ClusterStatus
    next: list[ClusterStatus] = field(default_factory=list)
    polls: int = 0
    confirmations: int = 0
    error: Exception | None = None
    """The error that confirmations raise; ``None`` if they succeed."""
    servers_asked: list[str] = field(default_factory=list)
    waited_for: list[tuple[SyncCondition | None, int | None, float]] = field(default_factory=list)

    async def poll(self) -> None:
        self.polls += 1
        if self.next:
            self.status = self.next.pop(0)

    async def confirm_master(self, host: str) -> bool:
        self.confirmations += 1
        if self.error is not None:
            raise self.error
        if self.next:
            self.status = self.next.pop(0)
        return self.status.master == host

    async def ask_server_of(self, host: str) -> None:
        self.servers_asked.append(host)

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        self.waited_for.append((sync, min_position, max_wait))
        await self.poll()
        return None

    def replayed(self, position: int) -> set[str]:
        return {host.host for host in self.status.hosts if host.position is not None and host.position >= position}


def app_of_hosts(*hosts: HostStatus, master: str | None = "n1", **options: Any) -> tuple[SidecarApp, FakeMonitor]:
    """Return the application of a sidecar, and its monitor, which knows these hosts."""
    app = SidecarApp(History(), **options)
    app.monitor = monitor = FakeMonitor(cluster(*hosts, master=master))
    return app, monitor


def lagging_history(*names: str, minutes: int = 5, lag_ms: int = 20) -> History:
    """Return a history in which the lag of each of `names` rises and falls, and is not known for a while."""
    history = History()
    for second in range(minutes * 60):
        unknown = 100 <= second < 120
        lag = None if unknown else lag_ms * (1 + second % 60)
        hosts = [replica(name, lag_ms=lag) for name in names]
        history.add(cluster(*hosts, at=START + timedelta(seconds=second)))
    return history


@dataclass
class Asked:
    """One request that reached an `OriginalSidecar`."""

    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]


class OriginalSidecar:
    """A server that answers with the fields that pg-status documents alone, or with an answer that a test sets."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.master: str | None = "n1"
        self.hosts: Sequence[dict[str, Any]] = (
            self.entry("n1", master=True),
            self.entry("n2"),
            self.entry("n3"),
            self.entry("n4", alive=False),
        )
        self.replayed: str | None = "n2"
        self.status = 200
        self.raw: bytes | None = None
        self.fields: Sequence[tuple[bytes, bytes]] = ()
        """Header fields of the responses."""
        self.open = asyncio.Event()
        """Requests are answered only while this is set."""
        self.open.set()
        self.arrived = asyncio.Event()

    def tell_timelines(self) -> None:
        """Answer as the sidecar of this package does, which tells timelines and finds replicas by position."""
        self.hosts = [{**entry, "timeline": 1} for entry in self.hosts]

    @staticmethod
    def entry(name: str, *, master: bool = False, alive: bool = True, **values: Any) -> dict[str, Any]:
        return {
            "host": name,
            "dc": None,
            "geo": None,
            "master": master,
            "alive": alive,
            "possible_dead": not alive,
            "lag_ms": 0 if alive else None,
            "sync_by_time": alive,
            "lag_bytes": 0 if alive else None,
            "sync_by_bytes": alive,
            "lsn": "0/3000060" if alive else None,
        } | values

    def paths(self) -> list[str]:
        return [each.path for each in self.asked]

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        asked = Asked(scope["path"], parse_qs(scope["query_string"].decode()), headers)
        self.asked.append(asked)
        self.arrived.set()
        await self.open.wait()
        status = self.status
        content: Any
        if asked.path == "/hosts":
            content = list(self.hosts)
        elif asked.path == "/master":
            content = {"host": self.master}
        else:
            content = {"host": self.replayed}
        if status == 200 and content == {"host": None}:
            status = 404
        body = json.dumps(content).encode() if self.raw is None else self.raw
        await send({"type": "http.response.start", "status": status, "headers": list(self.fields)})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serve_sidecar(app: Answer, limits: ClientLimits | None = None) -> AsyncIterator[str]:
    """Serve `app` with the sidecar's own server, and yield its URL."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(app, limits)
        await server.start(listener)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            await server.stop(10)


@asynccontextmanager
async def serve_monitor(monitor: Monitor) -> AsyncIterator[str]:
    """Serve what a monitor knows by a sidecar, and yield the URL of the sidecar."""
    app = SidecarApp(History())
    app.monitor = monitor
    async with serve_sidecar(app) as url:
        yield url


@asynccontextmanager
async def unused_url() -> AsyncIterator[str]:
    """Yield a URL at which no server listens while the block runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
