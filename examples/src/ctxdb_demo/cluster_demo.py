"""``ctxdb-demo --cluster``: a failover under load, live; what was acknowledged, what was lost, how long it took."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

import httpx
from rich.console import Console
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ctxdb_demo.asgi_server import serve
from ctxdb_demo.cleanup import see_through
from ctxdb_demo.cluster_app import Base, Payment, create_app
from ctxdb_demo.errors import DemoError
from ctxdb_demo.kept_log import keep_log
from ctxdb_demo.options import Options
from ctxdb_demo.progress import Progress
from ctxdb_demo.server import HOST, listen
from ctxdb_pgstatus import ClusterStatus, HostMonitor
from ctxdb_pgstatus.testing import EmbeddedPostgresError, PostgresCluster, PostgresNode

__all__ = ["create_tables", "engines_of", "fail_over", "monitor_of", "run_cluster", "started"]

CLIENTS = 20
POLL_SECONDS = 1.0
CALM_SECONDS = 1.5
PAUSE_AFTER_ERROR_SECONDS = 0.05
TIMEOUT_SECONDS = 30.0


async def run_cluster(options: Options) -> bool:
    """Let clients write and read while the primary dies, a replica takes over, and the old primary comes back.

    Returns:
        Whether no acknowledged write was lost, and no client missed its own write.

    Raises:
        DemoError: the demo cannot go on.
    """
    progress = Progress()
    with listen(options.port) as listener, keep_log() as log:
        kept = await _run(listener, progress)
        if not kept:
            log.show()
    return kept


async def _run(listener: socket.socket, progress: Progress) -> bool:
    async with started(progress) as cluster:
        await create_tables(cluster)
        monitor = monitor_of(cluster)
        app = create_app(monitor, engines_of(cluster, pool_size=CLIENTS), secrets.token_hex(16))
        async with monitor, serve(app, listener):
            show = _Show(cluster, monitor, f"http://{HOST}:{listener.getsockname()[1]}")
            await show.play()
        return await show.report()


@asynccontextmanager
async def started(progress: Progress) -> AsyncIterator[PostgresCluster]:
    """Start a primary with two replicas, for the length of a block.

    Raises:
        DemoError: it does not start.
    """
    cluster = PostgresCluster(standbys=2, password=secrets.token_hex(16))
    try:
        with progress.step("Starting a primary and two replicas ..."):
            try:
                await cluster.start()
                # A write is acknowledged once it is on another host, too: the death of one loses nothing.
                for node in cluster.nodes:
                    await node.set("synchronous_standby_names", "ANY 1 (*)")
            except EmbeddedPostgresError as exc:
                raise DemoError(str(exc)) from exc
        yield cluster
    finally:
        with progress.step("Stopping the cluster ..."):
            await see_through(cluster.stop())


def monitor_of(cluster: PostgresCluster) -> HostMonitor:
    """Return a monitor of the cluster's hosts; the caller enters it."""
    return HostMonitor(
        cluster.hosts,
        port=cluster.port,
        user="postgres",
        password=cluster.password,
        database="postgres",
        poll_interval=POLL_SECONDS,
    )


def engines_of(cluster: PostgresCluster, *, pool_size: int) -> Callable[[str], AsyncEngine]:
    """Return a function that makes the engine of a host of the cluster.

    Args:
        cluster: the cluster.
        pool_size: how many connections each engine has at most.
    """

    def create_engine(host: str) -> AsyncEngine:
        url = next(node for node in cluster.nodes if node.host == host).url()
        return create_async_engine(url, pool_size=pool_size, max_overflow=0, pool_timeout=5)

    return create_engine


async def create_tables(cluster: PostgresCluster) -> None:
    """Make the tables of the payments, on every host."""
    engine = create_async_engine(cluster.primary.url())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    await cluster.wait_for_replay()


async def _promote(cluster: PostgresCluster) -> tuple[PostgresNode, list[PostgresNode]]:
    """Do what an operator does, or a tool like Patroni: the standby that has received most takes over.

    Returns:
        The new primary, and the other standbys.
    """
    received = {node: await node.fetch_value("SELECT pg_last_wal_receive_lsn()") for node in cluster.standbys}
    new, *others = sorted(received, key=lambda node: -received[node])
    await new.promote()
    return new, others


async def fail_over(cluster: PostgresCluster) -> None:
    """Kill the primary, promote a replica, and have the old primary come back as a replica."""
    old = cluster.primary
    await old.kill()
    new, others = await _promote(cluster)
    for node in others:
        if node is not old:
            await node.follow(new)
    await old.start()
    await old.rewind(new)


@dataclass
class _Ledger:
    """What the clients were told."""

    acknowledged: dict[str, float] = field(default_factory=dict)
    """When each payment was, in seconds of `perf_counter`."""
    refused: int = 0
    unanswered: int = 0
    stale: int = 0
    reads: Counter[int] = field(default_factory=Counter)

    def first_since(self, moment: float) -> float | None:
        """When the first payment was acknowledged that came after `moment`."""
        return min((at for at in self.acknowledged.values() if at > moment), default=None)


class _Show:
    """The play: what happens to the cluster while clients pay."""

    def __init__(self, cluster: PostgresCluster, monitor: HostMonitor, base_url: str) -> None:
        self._cluster = cluster
        self._monitor = monitor
        self._base_url = base_url
        self._ledger = _Ledger()
        self._console = Console(highlight=False, soft_wrap=True)
        self._start = perf_counter()
        self._names = {node.host: node.name for node in cluster.nodes}
        self._master: str | None = None

    async def play(self) -> None:
        """Play all of it, and stop the clients."""
        self._master = self._monitor.master()
        stop_telling = self._monitor.on_change(self._tell_change)
        self._start = perf_counter()
        clients = [asyncio.create_task(self._pay(number)) for number in range(CLIENTS)]
        try:
            self._tell(f"{CLIENTS} clients pay, and read what they paid; {self._name(self._master)} is the master")
            await asyncio.sleep(CALM_SECONDS)
            old = self._cluster.primary
            new = await self._fail_over(old)
            await self._return_as_primary(old, new)
            await self._return_as_replica(old, new)
            await asyncio.sleep(CALM_SECONDS)
        finally:
            stop_telling()
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
        for client in clients:
            if not client.cancelled() and (error := client.exception()) is not None:
                raise error

    async def _fail_over(self, old: PostgresNode) -> PostgresNode:
        killed = perf_counter()
        await old.kill()
        self._tell(f"{old.name} is killed (SIGKILL)")
        await self._until(lambda: self._monitor.master() is None, "the death of the master was not noticed")
        self._tell(f"... which is noticed after {perf_counter() - killed:.2f} s; requests are refused at once")
        new, others = await _promote(self._cluster)
        promoted = perf_counter()
        self._tell(f"{new.name} is promoted")
        # Its commits wait until another host follows.
        for node in others:
            if node is not old:
                await node.follow(new)
                self._tell(f"{node.name} follows {new.name}")
        await self._until(lambda: self._ledger.first_since(promoted) is not None, "there was no write after that")
        first = self._ledger.first_since(promoted)
        assert first is not None
        self._tell(f"the first payment is acknowledged {first - promoted:.2f} s after the promotion")
        await asyncio.sleep(CALM_SECONDS)
        return new

    async def _return_as_primary(self, old: PostgresNode, new: PostgresNode) -> None:
        await old.start()
        self._tell(f"{old.name} comes back, and takes itself for the primary still")
        before = await self._count(old)
        await asyncio.sleep(2 * POLL_SECONDS)
        after = await self._count(old)
        self._tell(f"... {after - before} payments followed it; the master is {self._name(self._monitor.master())}")

    async def _return_as_replica(self, old: PostgresNode, new: PostgresNode) -> None:
        await old.rewind(new)
        self._tell(f"{old.name} is rewound, and follows {new.name}")
        await self._until(
            lambda: old.host in {host.host for host in self._monitor.status.replicas()},
            f"{old.name} did not become a replica",
        )

    async def report(self) -> bool:
        """Compare what was acknowledged with what is there; return whether nothing is missing."""
        ledger = self._ledger
        engine = create_async_engine(self._cluster.primary.url())
        async with engine.connect() as connection:
            there = set(await connection.scalars(select(Payment.id)))
        await engine.dispose()
        lost = ledger.acknowledged.keys() - there
        acknowledged = len(ledger.acknowledged)
        self._tell(f"acknowledged {acknowledged}, of these in the database {acknowledged - len(lost)}")
        self._tell(f"lost {len(lost)}; answered as an error {ledger.refused}, not at all {ledger.unanswered}")
        self._tell(f"read after one's own write {ledger.reads.total()}, stale {ledger.stale}")
        return not lost and not ledger.stale

    async def _pay(self, client: int) -> None:
        """Pay, and read the payment, again and again."""
        async with httpx.AsyncClient(base_url=self._base_url, timeout=TIMEOUT_SECONDS) as http:
            number = 0
            while True:
                number += 1
                payment_id = f"{client}-{number}"
                try:
                    response = await http.post("/payments", json={"id": payment_id, "amount": number})
                except httpx.HTTPError:
                    self._ledger.unanswered += 1
                    continue
                if response.status_code != 201:
                    self._ledger.refused += 1
                    await asyncio.sleep(PAUSE_AFTER_ERROR_SECONDS)
                    continue
                self._ledger.acknowledged[payment_id] = perf_counter()
                await self._read(http, payment_id)

    async def _read(self, http: httpx.AsyncClient, payment_id: str) -> None:
        response = await http.get(f"/payments/{payment_id}")
        self._ledger.reads[response.status_code] += 1
        self._ledger.stale += response.status_code == 404

    async def _count(self, node: PostgresNode) -> int:
        count: int = await node.fetch_value(f'SELECT count(*) FROM "{Payment.__tablename__}"')
        return count

    async def _until(self, condition: Callable[[], bool], problem: str) -> None:
        deadline = perf_counter() + TIMEOUT_SECONDS
        while not condition():
            if perf_counter() > deadline:
                raise DemoError(f"After {TIMEOUT_SECONDS:.0f} s, {problem}.")
            await asyncio.sleep(0.005)

    def _tell_change(self, before: ClusterStatus, after: ClusterStatus) -> None:
        if after.master != self._master:
            self._tell(f"the monitor's master: {self._name(self._master)} -> {self._name(after.master)}")
            self._master = after.master

    def _tell(self, line: str) -> None:
        self._console.print(f"{perf_counter() - self._start:7.2f} s  {line}", markup=False)

    def _name(self, host: str | None) -> str:
        return "none" if host is None else self._names[host]
