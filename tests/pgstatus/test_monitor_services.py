"""`HostMonitor` with servers behind poolers, with privileges revoked, run as a service, or with a wrong clock."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.monitors import CONNECTIONS, HOUR, PATIENCE, monitor_of, status_of, until, until_received
from tests.support.pgbouncer import COMMAND as PGBOUNCER
from tests.support.pgbouncer import PgBouncer
from tests.support.pooler import Pooler

from ctxdb_pgstatus import HostMonitor
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode


@pytest.fixture
async def watcher(cluster: PostgresCluster) -> AsyncIterator[str]:
    """The name of a role without privileges, whose search path has a schema of its own before PostgreSQL's."""
    primary = cluster.primary
    await primary.execute("CREATE ROLE watcher LOGIN")
    await primary.execute("CREATE SCHEMA watcher AUTHORIZATION watcher")
    await primary.execute("ALTER ROLE watcher SET search_path = watcher, pg_catalog")
    yield "watcher"
    await cluster.primary.execute("DROP OWNED BY watcher CASCADE")
    await cluster.primary.execute("DROP ROLE watcher")


async def replace_function(node: PostgresNode, signature: str, body: str) -> None:
    """Let the role `watcher` find another function in the place of one of PostgreSQL."""
    await node.execute(f"CREATE FUNCTION watcher.{signature} AS $$ {body} $$")
    await node.execute(f"GRANT EXECUTE ON FUNCTION watcher.{signature.partition(' ')[0]} TO watcher")


# --- poolers ----------------------------------------------------------------------------------------------------------


async def test_a_pooler_in_transaction_mode_may_be_between_the_monitor_and_its_hosts(cluster: PostgresCluster) -> None:
    async with Pooler(cluster.primary) as pooler, monitor_of(cluster, hosts=[pooler.host]) as monitor:
        assert monitor.master() == pooler.host
        assert await monitor.confirm_master(pooler.host)
        for _ in range(5):
            await monitor.poll()
        [host] = monitor.hosts()
        assert host.alive
        assert host.error is None
        assert host.position == await cluster.primary.position()
        assert pooler.transactions > 5


async def test_a_monitor_closes_in_the_middle_of_a_question_behind_a_pooler(cluster: PostgresCluster) -> None:
    async with Pooler(cluster.primary) as pooler:
        monitor = await monitor_of(cluster, hosts=[pooler.host], connect_timeout=HOUR).__aenter__()
        pooler.halt()
        question = asyncio.create_task(monitor.poll())
        await pooler.halted.wait()
        async with asyncio.timeout(PATIENCE):
            await monitor.__aexit__(None, None, None)
        await question


@pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")
async def test_monitors_behind_pgbouncer_share_a_pool_of_one_connection(
    cluster: PostgresCluster, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        bouncer = await stack.enter_async_context(PgBouncer(cluster.primary, tmp_path, default_pool_size="1"))
        name = f"127.0.0.1:{bouncer.port}"
        # The pool has one connection: a monitor that kept it to itself would keep the other monitors waiting.
        monitors = [
            await stack.enter_async_context(monitor_of(cluster, hosts=[name], connect_timeout=PATIENCE))
            for _ in range(3)
        ]
        for monitor in monitors * 2:
            assert await monitor.confirm_master(name)
        assert await cluster.primary.fetch_value(CONNECTIONS) == 1


# --- rights -----------------------------------------------------------------------------------------------------------

CONTROL_FUNCTIONS = ("pg_control_checkpoint()", "pg_control_recovery()", "pg_control_system()")


@pytest.fixture
async def revoked(cluster: PostgresCluster, watcher: str) -> AsyncIterator[str]:
    """The name of a role that may not read the control data."""
    for function in CONTROL_FUNCTIONS:
        await cluster.primary.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    await cluster.wait_for_replay()
    yield watcher
    for function in CONTROL_FUNCTIONS:
        await cluster.primary.execute(f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")


async def test_a_role_that_may_not_read_the_control_data_knows_the_roles_and_what_to_grant(
    cluster: PostgresCluster, revoked: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with monitor_of(cluster, user=revoked) as monitor:
        assert monitor.master() == cluster.primary.host
        assert await monitor.confirm_master(cluster.primary.host)
        assert {monitor.replica() for _ in range(4)} == {node.host for node in cluster.standbys}
        # The role cannot read whether the standbys are on the timeline of the master.
        assert monitor.sync_by_time_or_bytes() == cluster.primary.host
        await monitor.poll()
    warnings = [record for record in caplog.records if "GRANT pg_monitor" in record.getMessage()]
    assert {record.__dict__["host"] for record in warnings} == {node.host for node in cluster.standbys}
    assert len(warnings) == 2


async def test_a_nofailover_primary_is_logged_also_if_its_missing_timeline_was_logged_before(
    cluster: PostgresCluster, revoked: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster, user=revoked, nofailover=[new.host]) as monitor:
        await new.promote()
        await monitor.poll()
    # The fixtures put the privileges back on the first server, of which the others are made standbys again.
    cluster.primary = old
    warned = [
        record.__dict__["host"] for record in caplog.records if "is one of the `nofailover`" in record.getMessage()
    ]
    assert warned == [new.host]


async def test_a_role_with_pg_monitor_needs_no_control_data(cluster: PostgresCluster, revoked: str) -> None:
    await cluster.primary.execute("GRANT pg_monitor TO watcher")
    await cluster.wait_for_replay()
    async with monitor_of(cluster, user=revoked) as monitor:
        assert all(host.in_sync("time_and_bytes") for host in monitor.hosts())


# --- Amazon Aurora ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def aurora(cluster: PostgresCluster, watcher: str) -> str:
    """The name of a role that finds functions of Aurora, and functions about WAL that raise an error as Aurora's do."""
    for name, kind in (
        ("pg_last_wal_replay_lsn", "pg_lsn"),
        ("pg_last_wal_receive_lsn", "pg_lsn"),
        ("pg_current_wal_insert_lsn", "pg_lsn"),
        ("pg_last_xact_replay_timestamp", "timestamptz"),
    ):
        message = f"Function {name}() is currently not supported for Aurora"
        body = f"BEGIN RAISE EXCEPTION '{message}' USING ERRCODE = 'feature_not_supported'; END"
        await replace_function(cluster.primary, f"{name}() RETURNS {kind} LANGUAGE plpgsql", body)
    await replace_function(
        cluster.primary, "aurora_db_instance_identifier() RETURNS text LANGUAGE sql", "SELECT 'reader'"
    )
    await replace_function(
        cluster.primary,
        "aurora_replica_status() RETURNS TABLE (server_id text, replica_lag_in_msec float8) LANGUAGE sql",
        "VALUES ('writer', NULL::float8), ('reader', 12.5)",
    )
    await cluster.wait_for_replay()
    return watcher


async def test_the_readers_of_aurora_are_in_sync_by_the_lag_that_aurora_tells(
    cluster: PostgresCluster, aurora: str
) -> None:
    async with monitor_of(cluster, user=aurora, sync_max_lag_ms=13) as monitor:
        assert monitor.master() == cluster.primary.host
        assert await monitor.confirm_master(cluster.primary.host)
        assert [host.error for host in monitor.hosts()] == [None, None, None]
        for node in cluster.standbys:
            host = status_of(monitor, node)
            assert (host.role, host.lag_ms, host.lag_bytes) == ("replica", 13, None)
            assert (host.in_sync("time"), host.in_sync("bytes")) == (True, False)
        # Aurora's readers do not tell what they have replayed: code that has written reads from the writer.
        assert await monitor.find_replica(min_position=1) == cluster.primary.host
    async with monitor_of(cluster, user=aurora, sync_max_lag_ms=12) as monitor:
        assert monitor.sync_by_time() == cluster.primary.host


# --- standbys alone ---------------------------------------------------------------------------------------------------


async def test_standbys_without_a_listed_primary_are_compared_with_the_most_advanced_one(
    cluster: PostgresCluster,
) -> None:
    paused, other = cluster.standbys
    await cluster.wait_for_replay()
    hosts = [node.host for node in cluster.standbys]
    async with monitor_of(cluster, hosts=hosts, sync_max_lag_ms=0, sync_max_lag_bytes=0) as monitor:
        assert {await monitor.find_replica("time_and_bytes") for _ in range(4)} == set(hosts)
        await paused.pause_replay()
        position = await cluster.primary.write_wal(10)
        await other.wait_for_replay(position)
        # What a standby has not even received yet, it does not tell of: to the monitor, it may be in sync.
        await until_received(paused, position)
        await monitor.poll()
        assert {await monitor.find_replica("time_and_bytes") for _ in range(4)} == {other.host}
        assert {await monitor.find_replica("time_or_bytes") for _ in range(4)} == {other.host}
        # A position is found on a standby as well.
        assert await monitor.find_replica(min_position=position) == other.host
        await paused.resume_replay()
        await paused.wait_for_replay(position)
        await monitor.poll()
        assert {await monitor.find_replica("time_and_bytes") for _ in range(4)} == set(hosts)


# --- cascades ---------------------------------------------------------------------------------------------------------


async def test_a_replica_of_a_replica_follows_it_through_its_promotion(cluster: PostgresCluster) -> None:
    first, second, third = cluster.nodes
    await third.follow(second)
    async with monitor_of(cluster, poll_interval=0.5) as monitor:
        await third.wait_for_replay(await first.write_wal(10))
        await monitor.poll()
        assert status_of(monitor, third).in_sync("time_and_bytes")
        await first.kill()
        await second.promote()
        await until(monitor, lambda: monitor.master() == second.host)
        position = await second.write_wal(10)
        async with asyncio.timeout(PATIENCE):
            assert await monitor.find_replica(min_position=position, max_wait=HOUR) == third.host
        await until(monitor, lambda: status_of(monitor, third).in_sync("time_or_bytes"))
        # The old primary does not know of the promotion, and comes back as a primary.
        await first.start()
        await until(monitor, lambda: status_of(monitor, first).fault == "stale")
        assert await monitor.confirm_master(second.host)


# --- clocks -----------------------------------------------------------------------------------------------------------


async def shift_clock_of_standbys(cluster: PostgresCluster, interval: str) -> None:
    await replace_function(
        cluster.primary,
        "clock_timestamp() RETURNS timestamptz LANGUAGE sql",
        "SELECT pg_catalog.clock_timestamp()"
        f" + CASE WHEN pg_is_in_recovery() THEN interval '{interval}' ELSE interval '0' END",
    )
    await cluster.wait_for_replay()


async def lagging(cluster: PostgresCluster) -> PostgresNode:
    """Return a standby that has replayed a commit, and does not replay the next."""
    node, other = cluster.standbys
    await node.wait_for_replay(await cluster.primary.write_wal(10))
    await node.pause_replay()
    await other.wait_for_replay(await cluster.primary.write_wal(10))
    return node


async def test_a_fast_clock_of_a_replica_does_not_raise_its_lag(cluster: PostgresCluster, watcher: str) -> None:
    await shift_clock_of_standbys(cluster, "10 hours")
    node = await lagging(cluster)
    async with monitor_of(cluster, user=watcher) as monitor:
        lag = status_of(monitor, node).lag_ms
        assert lag is not None
        assert 0 < lag < HOUR * 1000


async def test_a_slow_clock_of_a_replica_does_not_lower_its_lag(cluster: PostgresCluster, watcher: str) -> None:
    await shift_clock_of_standbys(cluster, "-10 hours")
    node = await lagging(cluster)
    async with monitor_of(cluster, user=watcher) as monitor, asyncio.timeout(PATIENCE):
        while (status_of(monitor, node).lag_ms or 0) < 100:
            await monitor.poll()


# --- name servers -----------------------------------------------------------------------------------------------------


async def test_look_ups_that_hang_take_no_thread_of_the_applications(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    hanging = threading.Semaphore(0)

    def hang(host: str, *args: Any, **options: Any) -> Any:
        hanging.release()
        answered.wait(PATIENCE)
        raise socket.gaierror(socket.EAI_AGAIN, "the name server is away")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    # More than the event loop's default executor has threads.
    names = [f"hanging{number}" for number in range(40)]
    monitor = HostMonitor(names, user="u", connect_timeout=HOUR)
    entering = asyncio.create_task(monitor.__aenter__())
    try:
        async with asyncio.timeout(PATIENCE):
            for _ in names:
                while not hanging.acquire(blocking=False):
                    await asyncio.sleep(0.001)
            assert await asyncio.to_thread(lambda: "done") == "done"
    finally:
        answered.set()
        await entering
        await monitor.__aexit__(None, None, None)
