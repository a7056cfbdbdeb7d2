"""`HostMonitor` with names that come to lead to other servers, shared names, and clusters that are made anew."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from tests.support.monitors import (
    HOUR,
    PATIENCE,
    address,
    changes_of,
    monitor_of,
    status_by_name,
    status_of,
    until,
    until_server,
)
from tests.support.proxy import Proxy

from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode

STARTED_AT = "SELECT pg_postmaster_start_time()"


@pytest.fixture(scope="module")
def module_stranger() -> Iterator[PostgresCluster]:
    cluster = PostgresCluster(hosts=["127.0.0.12"])
    asyncio.run(cluster.start())
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture
async def stranger(module_stranger: PostgresCluster) -> AsyncIterator[PostgresNode]:
    """The primary of another cluster, which was made by an ``initdb`` of its own."""
    yield module_stranger.primary
    await module_stranger.restore()


# --- names that move --------------------------------------------------------------------------------------------------


async def test_a_name_whose_address_stays_is_followed_to_another_server(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old, new, _ = cluster.nodes
    async with (
        Proxy(old) as proxy,
        monitor_of(cluster, hosts=[proxy.host], poll_interval=0.2, conn_max_age=0.1) as monitor,
    ):
        assert monitor.server_of(proxy.host) == await old.fetch_value(STARTED_AT)
        await new.promote()
        # The old primary goes on, and so does the connection to it.
        proxy.nodes = (new,)
        await until_server(monitor, proxy.host, new)
        assert monitor.master() == proxy.host
        assert monitor.hosts()[0].timeline == (await new.fetch_value(TIMELINE))
    assert f"The name {proxy.host} leads to another server now" in caplog.text


async def test_the_only_name_of_a_cluster_is_followed_to_another_server_long_before_its_connection_is_old(
    cluster: PostgresCluster,
) -> None:
    old, new, _ = cluster.nodes
    async with (
        Proxy(old) as proxy,
        monitor_of(cluster, hosts=[proxy.host], poll_interval=0.2, conn_max_age=HOUR) as monitor,
    ):
        assert monitor.server_of(proxy.host) == await old.fetch_value(STARTED_AT)
        await new.promote()
        # The old primary goes on, and so does the connection to it.
        proxy.nodes = (new,)
        await until_server(monitor, proxy.host, new)
        assert await monitor.confirm_master(proxy.host)


async def test_a_promotion_is_known_with_the_position_that_the_host_had_replayed(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    timeline = await old.fetch_value(TIMELINE)
    async with monitor_of(cluster, poll_interval=0.3) as monitor:
        assert await monitor.promotion_of(new.host) is None
        position = await old.write_wal(1)
        await old.kill()
        await until(monitor, lambda: monitor.master() is None)
        await monitor.poll()
        await new.promote()
        await until(monitor, lambda: monitor.master() == new.host)
        promotion = await monitor.promotion_of(new.host)
        assert promotion is not None
        assert promotion.timeline == timeline
        assert promotion.position >= position
        assert await monitor.promotion_of("unknown") is None


async def test_a_name_that_has_left_a_standby_for_a_primary_tells_of_no_promotion(cluster: PostgresCluster) -> None:
    _, new, other = cluster.nodes
    async with (
        Proxy(other) as proxy,
        monitor_of(cluster, hosts=[proxy.host], poll_interval=0.2, conn_max_age=0.1) as monitor,
    ):
        await new.promote()
        proxy.nodes = (new,)
        await until_server(monitor, proxy.host, new)
        await until(monitor, lambda: monitor.hosts()[0].role == "master")
        assert await monitor.promotion_of(proxy.host) is None


TIMELINE = "SELECT ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int"


async def test_a_name_that_is_resolved_to_another_address_is_followed_at_the_next_poll(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, other = cluster.nodes
    leads_to = old
    resolve = socket.getaddrinfo

    def moving(host: str, *args: Any, **options: Any) -> Any:
        return resolve(leads_to.host if host == "moving" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    hosts = ["moving", other.host]
    async with monitor_of(cluster, hosts=hosts, poll_interval=0.2, conn_max_age=HOUR) as monitor:
        await until_server(monitor, "moving", old)
        leads_to = new
        await until_server(monitor, "moving", new)
        assert monitor.hosts()[0].role == "replica"
        assert monitor.master() is None


async def test_a_connection_that_cannot_be_renewed_is_kept(cluster: PostgresCluster) -> None:
    async with (
        Proxy(cluster.primary) as proxy,
        monitor_of(cluster, hosts=[proxy.host], conn_max_age=0.0) as monitor,
    ):
        changes = changes_of(monitor)
        proxy.refusals = 1000
        for _ in range(3):
            await monitor.poll()
        async with asyncio.timeout(PATIENCE):
            while proxy.refusals == 1000:
                monitor._cluster.members[proxy.host].watch._upkeep_at = 0.0
                await monitor.poll()
        await monitor.poll()
        assert changes == []
        assert monitor.master() == proxy.host
        assert monitor.hosts()[0].error is None


async def test_a_restart_of_a_server_is_not_taken_for_another_server(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with monitor_of(cluster, poll_interval=0.5) as monitor:
        await cluster.primary.restart()
        await until_server(monitor, cluster.primary.host, cluster.primary)
        await until(monitor, lambda: monitor.master() == cluster.primary.host)
    assert f"The server of host {cluster.primary.host} has restarted" in caplog.text
    assert "leads to another server" not in caplog.text


# --- names that are shared --------------------------------------------------------------------------------------------


async def test_a_name_behind_which_replicas_take_turns_is_logged_and_found_for_no_position(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.wait_for_replay()
    primary = cluster.primary
    async with Proxy(*cluster.standbys) as shared:
        hosts = [address(primary), shared.host]
        async with monitor_of(cluster, hosts=hosts, poll_interval=0.2, conn_max_age=0.1) as monitor:
            await until(monitor, lambda: status_by_name(monitor, shared.host).fault == "shared_name")
            # Any of these servers will do for a reader that has written nothing.
            assert monitor.replica() == shared.host
            position = await primary.position()
            for _ in range(5):
                assert await monitor.find_replica(min_position=position) == address(primary)
    warnings = [record for record in caplog.records if "take turns behind the name" in record.getMessage()]
    assert warnings
    assert warnings[0].__dict__["host"] == shared.host
    assert all(node.host in warnings[0].getMessage() for node in cluster.standbys)


async def test_a_name_behind_which_a_primary_takes_turns_is_never_the_master(cluster: PostgresCluster) -> None:
    async with (
        Proxy(cluster.primary, cluster.standbys[0]) as shared,
        monitor_of(cluster, hosts=[shared.host], poll_interval=0.2, conn_max_age=0.1) as monitor,
    ):
        await until(monitor, lambda: monitor.hosts()[0].fault == "shared_name")
        assert monitor.master() is None
        assert not await monitor.confirm_master(shared.host)
        shared.nodes = (cluster.primary,)
        await until(monitor, lambda: monitor.master() == shared.host)
        assert monitor.hosts()[0].fault is None


# --- other clusters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
async def test_the_primary_of_another_cluster_is_never_the_master_and_is_logged(
    cluster: PostgresCluster, stranger: PostgresNode, caplog: pytest.LogCaptureFixture, *, first: bool
) -> None:
    await stranger.execute("SELECT 1")
    own = [address(node) for node in cluster.nodes]
    hosts = [address(stranger), *own] if first else [*own, address(stranger)]
    async with monitor_of(cluster, hosts=hosts, poll_interval=0.5) as monitor:
        assert monitor.master() == address(cluster.primary)
        host = status_by_name(monitor, address(stranger))
        assert (host.role, host.fault) == ("master", "stranger")
        assert {monitor.replica() for _ in range(6)} == {address(node) for node in cluster.standbys}
        # The stranger is not the master either when it is the only host that says so.
        await cluster.primary.kill()
        await until(monitor, lambda: monitor.master() is None)
        for node in cluster.standbys:
            await node.kill()
        await until(monitor, lambda: sum(host.alive for host in monitor.hosts()) == 1)
        await monitor.poll()
        assert monitor.master() is None
    warnings = [record for record in caplog.records if "is of another cluster" in record.getMessage()]
    assert [record.__dict__["host"] for record in warnings] == [address(stranger)]


@pytest.mark.parametrize("first", [True, False])
async def test_of_two_clusters_with_equally_many_hosts_the_first_of_the_list_is_followed(
    cluster: PostgresCluster, stranger: PostgresNode, *, first: bool
) -> None:
    hosts = [address(cluster.primary), address(stranger)]
    async with monitor_of(cluster, hosts=hosts if first else hosts[::-1]) as monitor:
        assert monitor.master() == (address(cluster.primary) if first else address(stranger))


async def test_no_commit_waits_for_a_host_of_another_cluster(cluster: PostgresCluster, stranger: PostgresNode) -> None:
    async with Proxy(stranger) as slow:
        hosts = [*(address(node) for node in cluster.nodes), slow.host]
        async with monitor_of(cluster, hosts=hosts, connect_timeout=HOUR) as monitor:
            assert status_by_name(monitor, slow.host).fault == "stranger"
            slow.delay = HOUR
            async with asyncio.timeout(PATIENCE):
                assert await monitor.confirm_master(address(cluster.primary))


async def test_the_standby_of_another_cluster_gets_no_reads(cluster: PostgresCluster) -> None:
    other = PostgresCluster(hosts=["127.0.0.22", "127.0.0.23"])
    async with other:
        hosts = [*(address(node) for node in cluster.nodes), address(other.standbys[0])]
        async with monitor_of(cluster, hosts=hosts) as monitor:
            assert {monitor.replica() for _ in range(6)} == {address(node) for node in cluster.standbys}


# --- clusters that are made anew, and promotions that are undone ------------------------------------------------------


async def test_a_cluster_that_is_made_anew_is_followed_although_its_timeline_is_lower(
    cluster: PostgresCluster, stranger: PostgresNode, caplog: pytest.LogCaptureFixture
) -> None:
    old = cluster.primary
    await cluster.standbys[0].promote()
    upgraded = cluster.primary
    assert await upgraded.fetch_value(TIMELINE) > await stranger.fetch_value(TIMELINE)
    async with (
        Proxy(upgraded) as proxy,
        monitor_of(cluster, hosts=[address(old), proxy.host], poll_interval=0.3) as monitor,
    ):
        assert monitor.master() == proxy.host
        # A cluster that `pg_upgrade` has made at the same place has another system identifier, and timeline 1.
        proxy.nodes = (stranger,)
        proxy.drop()
        await old.kill()
        timeline = await stranger.fetch_value(TIMELINE)
        await until(monitor, lambda: monitor.hosts()[1].timeline == timeline and monitor.master() == proxy.host)
        assert monitor.hosts()[1].fault is None
    assert "The cluster was made anew" in caplog.text


async def test_an_operator_has_a_lower_timeline_accepted_after_a_promotion_was_undone(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster, poll_interval=0.5) as monitor:
        await new.promote()
        await until(monitor, lambda: monitor.master() == new.host)
        # The operator goes back: the promoted host is rewound, and follows the old primary.
        await new.kill()
        await until(monitor, lambda: monitor.master() is None)
        assert status_of(monitor, old).fault == "stale"
        status = await monitor.accept_lower_timeline()
        assert status.master == monitor.master() == old.host
        assert await monitor.confirm_master(old.host)
        warnings = [record for record in caplog.records if "An operator has had" in record.getMessage()]
        assert len(warnings) == 1
        assert warnings[0].__dict__["timeline"] < warnings[0].__dict__["timeline_before"]
        # Later promotions count as ever.
        await cluster.nodes[2].promote()
        await until(monitor, lambda: monitor.master() == cluster.nodes[2].host)
        assert status_of(monitor, old).fault == "stale"


async def test_an_undone_timeline_does_not_count_and_a_later_one_of_a_replica_does(
    cluster: PostgresCluster,
) -> None:
    old, new, other = cluster.nodes
    hosts = [old.host, new.host]
    async with monitor_of(cluster, hosts=[*hosts, other.host], poll_interval=0.5) as monitor:
        await new.promote()
        await other.follow(new)
        await until(monitor, lambda: monitor.master() == new.host)
        await new.kill()
        await until(monitor, lambda: monitor.master() is None)
        # The other standby has the history of the undone timeline, and keeps it.
        await monitor.accept_lower_timeline()
        for _ in range(3):
            await monitor.poll()
        assert monitor.master() == old.host
        undone = monitor._cluster.membership._undone_timeline
    async with monitor_of(cluster, hosts=hosts, poll_interval=0.5) as monitor:
        monitor._cluster.membership._undone_timeline = undone
        assert monitor.master() == old.host
        # A host that this monitor does not watch is promoted, and the watched standby follows it.
        await other.promote()
        await new.rewind(other)
        await until(monitor, lambda: monitor.master() is None)
        assert status_of(monitor, old).fault == "stale"
