"""The example application under traffic while its cluster fails: acknowledged writes stay, and no read is stale."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.database import eventually
from tests.support.followers import Engines, monitoring, until
from tests.support.sidecar import serve_monitor
from tests.support.traffic import Traffic, payments_on

from ctxdb_demo.cluster_app import Base, create_app
from ctxdb_pgstatus import HostMonitor, PgStatusClient
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode


class Service:
    """The application on a cluster, the traffic of its clients, and the monitor by which it knows the hosts."""

    def __init__(self, cluster: PostgresCluster, monitor: HostMonitor, engines: Engines, traffic: Traffic) -> None:
        self.cluster = cluster
        self.monitor = monitor
        self.engines = engines
        self.traffic = traffic

    async def until_master(self, node: PostgresNode | None) -> None:
        host = None if node is None else node.host
        await eventually(lambda: self.monitor.master() == host, lambda: f"the master is {self.monitor.master()}")

    async def assert_left(self, node: PostgresNode) -> None:
        """Assert that no connection of the application is open on a host any more."""

        async def is_left() -> bool:
            return await self.engines.left_on(node) == 0

        await until(is_left)


@pytest.fixture(params=["monitor", "sidecar"])
async def service(cluster: PostgresCluster, request: pytest.FixtureRequest) -> AsyncIterator[Service]:
    """The application on a cluster with synchronous replication, by a monitor in process or over HTTP."""
    engine = create_async_engine(cluster.primary.url())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    await wait_for_standbys(cluster, "ANY 1 (*)")
    await cluster.wait_for_replay()
    engines = Engines(cluster, pool_size=5)
    async with AsyncExitStack() as stack:
        monitor = await stack.enter_async_context(monitoring(cluster))
        source: HostMonitor | PgStatusClient = monitor
        if request.param == "sidecar":
            url = await stack.enter_async_context(serve_monitor(monitor))
            source = await stack.enter_async_context(PgStatusClient(url, max_age=0.1))
        app = create_app(source, engines, secrets.token_hex(16))
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield Service(cluster, monitor, engines, Traffic(app))


@pytest.fixture(autouse=True)
def report(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Report a figure, which ``pytest -s`` shows and a JUnit file holds."""

    def say(figure: str) -> None:
        record_property("figure", figure)
        print(f"{request.node.name}: {figure}")  # noqa: T201 - seen with `pytest -s` only

    return say


async def wait_for_standbys(cluster: PostgresCluster, standbys: str) -> None:
    """Have commits wait for standbys, on the present primary and on any node that is promoted later."""
    for node in cluster.nodes:
        await node.set("synchronous_standby_names", standbys)
    # The setting is in force after a checkpoint (see `PostgresCluster.set_synchronous`).
    await cluster.primary.execute("CHECKPOINT")


async def fail_over(service: Service) -> tuple[PostgresNode, float]:
    """Promote the standby that has received the most WAL, and have the other one follow it; return it, and the time."""
    new, other = service.cluster.standbys
    received = {node: await node.fetch_value("SELECT pg_last_wal_receive_lsn()") for node in (new, other)}
    if received[other] > received[new]:
        new, other = other, new
    await new.promote()
    promoted = time.monotonic()
    await other.follow(new)
    return new, promoted


async def test_no_acknowledged_write_is_lost_when_the_primary_is_killed(
    service: Service, report: Callable[[str], None]
) -> None:
    traffic, old = service.traffic, service.cluster.primary
    async with traffic.flowing():
        await traffic.some_writes()
        await old.kill()
        await traffic.some_refusals()
        new, promoted = await fail_over(service)
        await traffic.some_writes()
        await traffic.some_reads()
    first = min(moment for moment in traffic.acknowledged.values() if moment > promoted)
    report(f"{first - promoted:.2f} s from the promotion to the first write; {traffic}")
    assert await traffic.lost_on(new) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_no_acknowledged_write_is_lost_when_a_frozen_primary_thaws(
    service: Service, report: Callable[[str], None]
) -> None:
    traffic, old = service.traffic, service.cluster.primary
    async with traffic.flowing():
        await traffic.some_writes()
        frozen = time.monotonic()
        await old.freeze()
        await service.until_master(None)
        noticed = time.monotonic()
        new, _ = await fail_over(service)
        await traffic.some_writes()
        # The old primary still is a primary, and goes on with the commits that were under way.
        await old.thaw()
        await traffic.some_writes(60)
        await service.assert_left(old)
    report(f"noticed after {noticed - frozen:.2f} s; {traffic}")
    assert await traffic.lost_on(new) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_without_synchronous_replication_only_writes_before_the_freeze_was_noticed_may_be_lost(
    service: Service,
) -> None:
    traffic, old = service.traffic, service.cluster.primary
    await wait_for_standbys(service.cluster, "")
    async with traffic.flowing():
        await traffic.some_writes()
        await old.freeze()
        await service.until_master(None)
        # An answer that the old primary gave before may arrive until now.
        noticed = time.monotonic()
        new, _ = await fail_over(service)
        await traffic.some_writes()
        # Without synchronous replication, the commits that were under way return at once.
        await old.thaw()
        await traffic.some_writes(60)
    lost = await traffic.lost_on(new)
    assert {payment for payment in lost if traffic.acknowledged[payment] > noticed} == set()


async def test_no_write_is_acknowledged_by_a_living_old_primary_after_a_promotion(service: Service) -> None:
    traffic = service.traffic
    await wait_for_standbys(service.cluster, "")
    async with traffic.flowing():
        await traffic.some_writes()
        # The application is not told. The old primary takes all writes that come, and the other standby still follows
        # it.
        new, _ = service.cluster.standbys
        await new.promote()
        promoted = time.monotonic()
        await traffic.some_writes(60)
    lost = await traffic.lost_on(new)
    assert {payment for payment in lost if traffic.acknowledged[payment] > promoted} == set()


async def test_no_write_goes_to_an_old_primary_that_returns_as_a_primary(service: Service) -> None:
    traffic, old = service.traffic, service.cluster.primary
    async with traffic.flowing():
        await traffic.some_writes()
        await old.kill()
        new, _ = await fail_over(service)
        await traffic.some_writes()
        # The old primary is the first of the list, and would take writes without a standby.
        await old.set("synchronous_standby_names", "")
        await old.start()
        before = await payments_on(old)
        await eventually(
            lambda: service.monitor.hosts()[0].role == "master", "the monitor has not seen the old primary"
        )
        await traffic.some_writes(60)
        assert await payments_on(old) == before
        assert service.monitor.master() == new.host
        await service.assert_left(old)
        # Rewound into a standby, the old primary is one of the replicas again.
        await old.rewind(new)
        await eventually(
            lambda: old.host in {host.host for host in service.monitor.status.replicas("time_or_bytes")},
            lambda: f"the old primary does not come back: {service.monitor.hosts()}",
        )
        opened = service.engines.connections[old.host]
        await eventually(lambda: service.engines.connections[old.host] > opened, "no reader connects to it")
        await traffic.some_reads()
    assert await traffic.lost_on(new) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_readers_leave_a_replica_that_dies_and_return_to_it(service: Service) -> None:
    traffic, (replica, _) = service.traffic, service.cluster.standbys
    async with traffic.flowing():
        await traffic.some_reads()
        await replica.kill()
        await eventually(lambda: len(service.monitor.status.replicas()) == 1, "the death is not noticed")
        failed = traffic.failed_reads
        await traffic.some_reads(60)
        # Requests that had begun on the replica may have failed. Requests after the monitor has noticed go elsewhere.
        assert traffic.failed_reads <= failed + 8
        opened = service.engines.connections[replica.host]
        await replica.start()
        await eventually(lambda: service.engines.connections[replica.host] > opened, "no reader connects to it")
        await traffic.some_reads()
    assert await traffic.lost_on(service.cluster.primary) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_readers_go_to_the_master_while_all_replicas_lag(service: Service) -> None:
    traffic, master = service.traffic, service.cluster.primary
    async with traffic.flowing():
        await traffic.some_reads()
        for standby in service.cluster.standbys:
            await standby.pause_replay()
        await master.write_wal(2_000_000)
        await eventually(
            lambda: not service.monitor.status.replicas("time_or_bytes"),
            lambda: f"replicas count as in sync: {service.monitor.hosts()}",
        )
        await traffic.some_reads()
        for standby in service.cluster.standbys:
            await standby.resume_replay()
        await eventually(lambda: len(service.monitor.status.replicas("bytes")) == 2, "the replicas do not come back")
        await traffic.some_reads()
    assert traffic.stale == []
    assert traffic.errors <= {503}
    assert traffic.refused == traffic.failed_reads == 0, traffic


async def test_traffic_goes_on_after_all_hosts_were_down(service: Service) -> None:
    traffic, cluster = service.traffic, service.cluster
    async with traffic.flowing():
        await traffic.some_writes()
        for node in cluster.nodes:
            await node.kill()
        await service.until_master(None)
        await traffic.some_refusals(50)
        for node in cluster.nodes:
            await node.start()
        await traffic.some_writes()
        await traffic.some_reads()
    assert await traffic.lost_on(cluster.primary) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}
