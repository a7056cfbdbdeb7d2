"""`ReadRule`, and readers with limits of their own, that prefer near replicas, or never read from the master."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, insert
from tests.support.followers import Engines, following, server_of, until
from tests.support.hosts import FakeSource
from tests.support.monitors import HOUR, monitor_of
from tests.support.sidecar import serve_monitor

from ctxdb_core import db_session, new_db_ctx
from ctxdb_pgstatus import (
    HostMonitor,
    HostStatus,
    Locality,
    NoReplicaError,
    OptionError,
    PgStatusClient,
    ReadRule,
    follow_master,
    follow_replica,
)
from ctxdb_pgstatus.testing import PostgresCluster

NOW = datetime(2024, 1, 1, tzinfo=UTC)
numbers = Table("number", MetaData(), Column("number", Integer, primary_key=True))


def replica(name: str, lag_ms: int | None = 0, lag_bytes: int | None = 0, **options: Any) -> HostStatus:
    return HostStatus(name, alive=True, role="replica", since=NOW, lag_ms=lag_ms, lag_bytes=lag_bytes, **options)


# --- rules ------------------------------------------------------------------------------------------------------------


def test_a_rule_without_conditions_admits_every_replica() -> None:
    assert ReadRule().best([replica("n2", None, None), replica("n3")]) == ["n2", "n3"]


def test_limits_of_a_rule_replace_the_limits_of_the_source() -> None:
    hosts = [replica("n2", 50), replica("n3", 500, in_sync_by_time=True), replica("n4", None)]
    assert ReadRule("time").best(hosts) == ["n3"]
    assert ReadRule("time", max_lag_ms=100).best(hosts) == ["n2"]
    assert ReadRule(max_lag_ms=500).best(hosts) == ["n2", "n3"]
    assert ReadRule(max_lag_ms=500, max_lag_bytes=0).best([replica("n2", 1, 1), replica("n3", 1, 0)]) == ["n3"]


def test_the_nearest_replicas_within_the_limits_are_read_from() -> None:
    near = Locality({"n2": "a", "n3": "b", "n4": "b"}, {"n2": "e", "n3": "e", "n4": "w"}, "a", "e").distance
    hosts = [replica("n4"), replica("n3"), replica("n2", 5)]
    assert ReadRule(near=near).best(hosts) == ["n2"]
    assert ReadRule(near=near, max_lag_ms=1).best(hosts) == ["n3"]
    assert ReadRule(near=near).best(hosts[:1]) == ["n4"]


def test_a_replica_that_may_be_dead_is_read_from_only_if_all_replicas_may_be_dead() -> None:
    hosts = [replica("n2", possible_dead=True), replica("n3")]
    assert ReadRule().best(hosts) == ["n3"]
    assert ReadRule().best(hosts[:1]) == ["n2"]


# --- following --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engines(cluster: PostgresCluster) -> Engines:
    return Engines(cluster)


@pytest.fixture(params=["monitor", "client"])
async def source(
    request: pytest.FixtureRequest, cluster: PostgresCluster
) -> AsyncIterator[HostMonitor | PgStatusClient]:
    """A monitor, or a client of a sidecar. Both find replicas by a `ReadRule`."""
    await cluster.wait_for_replay()
    async with monitor_of(cluster, poll_interval=0.3) as monitor:
        if request.param == "monitor":
            yield monitor
            return
        async with serve_monitor(monitor) as url, PgStatusClient(url, max_age=0.0) as client:
            yield client


async def test_readers_go_to_the_nearest_replica(
    cluster: PostgresCluster, engines: Engines, source: HostMonitor | PgStatusClient
) -> None:
    near, far = cluster.standbys
    handler = follow_replica(source, near=lambda host: int(host != near.host))
    async with following(engines, handler) as db:
        assert {await server_of(db) for _ in range(4)} == {near.host}
        await near.kill()
        source.report_failure(near.host)
        await until(lambda: _is_gone(source, near.host))
        assert await server_of(db) == far.host


async def test_readers_with_different_limits_read_from_different_replicas(
    cluster: PostgresCluster, engines: Engines, source: HostMonitor | PgStatusClient
) -> None:
    behind, other = cluster.standbys
    await behind.pause_replay()
    await other.wait_for_replay(await cluster.primary.write_wal(100_000))
    await until(lambda: _lags(source, behind.host))
    async with (
        following(engines, follow_replica(source, max_lag_bytes=10_000)) as strict,
        following(engines, follow_replica(source, max_lag_bytes=10_000_000)) as patient,
    ):
        assert {await server_of(strict) for _ in range(4)} == {other.host}
        assert {await server_of(patient) for _ in range(4)} == {behind.host, other.host}


async def _is_gone(source: HostMonitor | PgStatusClient, host: str) -> bool:
    return host not in await source.find_replicas()


async def _lags(source: HostMonitor | PgStatusClient, host: str) -> bool:
    if isinstance(source, HostMonitor):
        await source.poll()
        hosts = source.hosts()
    else:
        source.report_failure(host)
        hosts = await source.hosts()
    return any(each.host == host and (each.lag_bytes or 0) > 50_000 for each in hosts)


async def test_readers_without_fallback_never_read_from_the_master(
    cluster: PostgresCluster, engines: Engines, source: HostMonitor | PgStatusClient
) -> None:
    async with (
        following(engines, follow_replica(source, fallback=False)) as db,
        following(engines, follow_replica(source)) as falling_back,
    ):
        assert await server_of(db) in {node.host for node in cluster.standbys}
        for node in cluster.standbys:
            await node.kill()
            source.report_failure(node.host)
        for node in cluster.standbys:
            await until(lambda node=node: _is_gone(source, node.host))  # type: ignore[misc]  # a default, not a parameter
        assert await server_of(falling_back) == cluster.primary.host
        with pytest.raises(NoReplicaError, match="a replica that will do"):
            await server_of(db)


async def test_a_reader_without_fallback_that_has_written_waits_for_a_replica(
    cluster: PostgresCluster, engines: Engines
) -> None:
    await cluster.primary.execute("CREATE TABLE IF NOT EXISTS number (number integer PRIMARY KEY)")
    await cluster.primary.execute("TRUNCATE number")
    await cluster.wait_for_replay()
    for node in cluster.standbys:
        await node.pause_replay()
    async with (
        monitor_of(cluster) as monitor,
        following(engines, follow_master(monitor)) as master,
        following(engines, follow_replica(monitor, fallback=False, wait=0.05)) as impatient,
        following(engines, follow_replica(monitor, fallback=False, wait=HOUR)) as patient,
        new_db_ctx(),
    ):
        session = await db_session(master)
        await session.execute(insert(numbers).values(number=1))
        await session.commit()
        with pytest.raises(NoReplicaError):
            await server_of(impatient)
        await cluster.standbys[1].resume_replay()
        assert await server_of(patient) == cluster.standbys[1].host


def test_a_rule_that_the_source_cannot_follow_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="find_reader"):
        follow_replica(FakeSource(), fallback=False)
    with pytest.raises(OptionError, match="`max_lag_ms` is -1"):
        follow_replica(FakeSource(), max_lag_ms=-1)
