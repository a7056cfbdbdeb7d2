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
from tests.support.sidecar import serve_sidecar
from tests.support.traffic import Traffic, payments_on

from ctxdb_demo.cluster_app import Base, create_app
from ctxdb_pgstatus import HostMonitor, PgStatusClient
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode


class Service:
    """The application on a cluster, its clients, and what it knows the hosts by."""

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
            sidecar = SidecarApp(History())
            sidecar.monitor = monitor
            url = await stack.enter_async_context(serve_sidecar(sidecar))
            source = await stack.enter_async_context(PgStatusClient(url, max_age=0.1))
        app = create_app(source, engines, secrets.token_hex(16))
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield Service(cluster, monitor, engines, Traffic(app))


@pytest.fixture(autouse=True)
def report(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Report a figure: with ``pytest -s``, and in a JUnit file."""

    def say(figure: str) -> None:
        record_property("figure", figure)
        print(f"{request.node.name}: {figure}")  # noqa: T201 - seen with `pytest -s` only

    return say


async def wait_for_standbys(cluster: PostgresCluster, standbys: str) -> None:
    """Have the commits of whichever node is the primary wait for standbys."""
    for node in cluster.nodes:
        await node.set("synchronous_standby_names", standbys)
    # As `set_synchronous` does, for the primary.
    await cluster.primary.execute("CHECKPOINT")


async def fail_over(service: Service) -> tuple[PostgresNode, float]:
    """Promote the standby that has received most, and have the other one follow it: return it, and when it was."""
    new, other = service.cluster.standbys
    received = {node: await node.fetch_value("SELECT pg_last_wal_receive_lsn()") for node in (new, other)}
    if received[other] > received[new]:
        new, other = other, new
    await new.promote()
    promoted = time.monotonic()
    await other.follow(new)
    return new, promoted


async def test_a_killed_primary_loses_no_acknowledged_write(service: Service, report: Callable[[str], None]) -> None:
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


async def test_a_frozen_primary_that_thaws_loses_no_acknowledged_write(
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
        # It takes itself for the primary, and goes on with the commits that it was at.
        await old.thaw()
        await traffic.some_writes(100)
        await service.assert_left(old)
    report(f"noticed after {noticed - frozen:.2f} s; {traffic}")
    assert await traffic.lost_on(new) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_without_synchronous_replication_a_frozen_primary_loses_at_most_what_it_had_not_sent(
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
        # Nothing holds back the commits that it was at.
        await old.thaw()
        await traffic.some_writes(100)
    lost = await traffic.lost_on(new)
    assert {payment for payment in lost if traffic.acknowledged[payment] > noticed} == set()


async def test_a_promotion_over_a_living_primary_takes_its_writes_away_at_once(service: Service) -> None:
    traffic = service.traffic
    await wait_for_standbys(service.cluster, "")
    async with traffic.flowing():
        await traffic.some_writes()
        # Nobody tells the application; the old primary takes whatever comes, and the other standby follows it still.
        new, _ = service.cluster.standbys
        await new.promote()
        promoted = time.monotonic()
        await traffic.some_writes(100)
    lost = await traffic.lost_on(new)
    assert {payment for payment in lost if traffic.acknowledged[payment] > promoted} == set()


async def test_no_write_follows_an_old_primary_that_returns_as_one(service: Service) -> None:
    traffic, old = service.traffic, service.cluster.primary
    async with traffic.flowing():
        await traffic.some_writes()
        await old.kill()
        new, _ = await fail_over(service)
        await traffic.some_writes()
        # It is named first, and would take writes without a standby.
        await old.set("synchronous_standby_names", "")
        await old.start()
        before = await payments_on(old)
        await eventually(
            lambda: service.monitor.hosts()[0].role == "master", "the monitor has not seen the old primary"
        )
        await traffic.some_writes(100)
        assert await payments_on(old) == before
        assert service.monitor.master() == new.host
        await service.assert_left(old)
        # As a standby it is one of the replicas again.
        await old.rewind(new)
        await eventually(
            lambda: old.host in {host.host for host in service.monitor.status.replicas("time_or_bytes")},
            lambda: f"it does not come back: {service.monitor.hosts()}",
        )
        opened = service.engines.connections[old.host]
        await eventually(lambda: service.engines.connections[old.host] > opened, "nobody reads there")
        await traffic.some_reads()
    assert await traffic.lost_on(new) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_replicas_that_die_and_return_are_left_and_used_again(service: Service) -> None:
    traffic, (replica, _) = service.traffic, service.cluster.standbys
    async with traffic.flowing():
        await traffic.some_reads()
        await replica.kill()
        await eventually(lambda: len(service.monitor.status.replicas()) == 1, "its death is not noticed")
        failed = traffic.failed_reads
        await traffic.some_reads(100)
        # Requests that had begun there may have failed; those after the monitor has noticed go elsewhere.
        assert traffic.failed_reads <= failed + 8
        opened = service.engines.connections[replica.host]
        await replica.start()
        await eventually(lambda: service.engines.connections[replica.host] > opened, "nobody reads there")
        await traffic.some_reads()
    assert await traffic.lost_on(service.cluster.primary) == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_replicas_that_lag_give_way_to_the_master(service: Service) -> None:
    traffic, master = service.traffic, service.cluster.primary
    async with traffic.flowing():
        await traffic.some_reads()
        for standby in service.cluster.standbys:
            await standby.pause_replay()
        await master.write_wal(2_000_000)
        await eventually(
            lambda: not service.monitor.status.replicas("time_or_bytes"),
            lambda: f"they count as in sync: {service.monitor.hosts()}",
        )
        await traffic.some_reads()
        for standby in service.cluster.standbys:
            await standby.resume_replay()
        await eventually(lambda: len(service.monitor.status.replicas("bytes")) == 2, "they do not come back")
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
