"""`HostMonitor` on a real cluster. Polls are an hour apart in tests of what a monitor notices without a poll."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from tests.support.database import eventually
from tests.support.monitors import CONNECTIONS, HOUR, PATIENCE, changes_of, monitor_of, status_of, until
from tests.support.proxy import Proxy

from ctxdb_pgstatus import ClusterStatus, HostListError, HostMonitor, OptionError, PgStatusError
from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.pace import Pace
from ctxdb_pgstatus._probing.probe import Probe
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    tasks = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - tasks - {asyncio.current_task()}
    assert left == set()


# --- statuses ---------------------------------------------------------------------------------------------------------


async def test_after_entering_each_host_is_known(cluster: PostgresCluster) -> None:
    await cluster.wait_for_replay()
    async with monitor_of(cluster) as monitor:
        primary, *replicas = monitor.hosts()
        assert monitor.master() == cluster.primary.host
        assert (primary.alive, primary.role, primary.lag_ms, primary.lag_bytes) == (True, "master", 0, 0)
        assert primary.position == await cluster.primary.position()
        for replica in replicas:
            assert (replica.alive, replica.role, replica.lag_ms, replica.lag_bytes) == (True, "replica", 0, 0)
            assert replica.position == primary.position
            assert replica.in_sync("time_and_bytes")
        assert len({host.timeline for host in monitor.hosts()}) == 1
        assert [host.error for host in monitor.hosts()] == [None, None, None]


async def test_replicas_take_turns(cluster: PostgresCluster) -> None:
    await cluster.wait_for_replay()
    replicas = {node.host for node in cluster.standbys}
    async with monitor_of(cluster) as monitor:
        for ask in (
            monitor.replica,
            monitor.sync_by_time,
            monitor.sync_by_bytes,
            monitor.sync_by_time_or_bytes,
            monitor.sync_by_time_and_bytes,
        ):
            answers = [ask() for _ in range(6)]
            assert set(answers) == replicas
            assert answers[:2] == answers[2:4] == answers[4:]


async def test_a_host_that_cannot_be_reached_is_no_error(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster, hosts=["127.0.0.99", cluster.primary.host, "host.invalid"]) as monitor:
        assert monitor.master() == cluster.primary.host
        # Without a living replica, the master is named.
        assert monitor.replica() == monitor.sync_by_time() == cluster.primary.host
        dead = [host for host in monitor.hosts() if not host.alive]
        assert [host.host for host in dead] == ["127.0.0.99", "host.invalid"]
        assert all(host.error for host in dead)
        assert all((host.role, host.position, host.lag_ms) == (None, None, None) for host in dead)


async def test_without_any_host_the_answer_is_none(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster, hosts=["127.0.0.99"]) as monitor:
        assert monitor.master() is None
        assert monitor.replica() is monitor.sync_by_bytes() is None
        assert await monitor.find_master() is await monitor.find_replica() is None
        assert not await monitor.confirm_master("127.0.0.99")


async def test_a_monitor_works_as_a_user_without_privileges(cluster: PostgresCluster) -> None:
    await cluster.primary.execute("CREATE ROLE watcher LOGIN")
    await cluster.wait_for_replay()
    async with monitor_of(cluster, user="watcher") as monitor:
        assert monitor.master() == cluster.primary.host
        assert [host.in_sync("time_and_bytes") for host in monitor.hosts()] == [True, True, True]
    await cluster.primary.execute("DROP ROLE watcher")


@pytest.mark.parametrize("name", ["::1", "[::1]:{port}", "localhost:{port}"])
async def test_a_host_is_reached_by_each_form_of_its_name(name: str, ipv6_cluster: PostgresCluster) -> None:
    name = name.format(port=ipv6_cluster.port)
    async with monitor_of(ipv6_cluster, hosts=[name]) as monitor:
        [host] = monitor.hosts()
        assert host.host == name
        assert host.alive


# --- deaths -----------------------------------------------------------------------------------------------------------


async def test_a_killed_master_is_noticed_without_a_poll(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster) as monitor:
        await cluster.primary.kill()
        await until(monitor, lambda: monitor.master() is None)
        assert not status_of(monitor, cluster.primary).alive
        assert status_of(monitor, cluster.primary).error is not None
        # The replicas can still be read from.
        assert monitor.sync_by_time() in {node.host for node in cluster.standbys}


async def test_a_killed_replica_is_noticed_without_a_poll_and_is_found_when_it_returns(
    cluster: PostgresCluster,
) -> None:
    dying, other = cluster.standbys
    async with monitor_of(cluster, poll_interval=5) as monitor:
        await dying.kill()
        await until(monitor, lambda: not status_of(monitor, dying).alive)
        assert {monitor.replica() for _ in range(4)} == {other.host}
        await other.kill()
        await until(monitor, lambda: not status_of(monitor, other).alive)
        assert monitor.replica() == cluster.primary.host
        assert await monitor.find_replicas() == frozenset()
        await dying.start()
        await until(monitor, lambda: status_of(monitor, dying).alive)
        assert monitor.replica() == dying.host


async def test_the_freeze_and_the_thaw_of_a_host_are_noticed(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster, poll_interval=0.6) as monitor:
        await cluster.primary.freeze()
        await until(monitor, lambda: monitor.master() is None)
        assert "no answer within" in (status_of(monitor, cluster.primary).error or "")
        await cluster.primary.thaw()
        await until(monitor, lambda: monitor.master() == cluster.primary.host)


@pytest.mark.parametrize("time_outs", [0.5, 100])
@pytest.mark.parametrize("max_fails", [1, 3, 10])
@pytest.mark.parametrize("poll_interval", [2.0, 5.0, 60.0])
def test_the_failures_of_a_dead_host_take_one_poll_interval_at_most(
    poll_interval: float, max_fails: int, time_outs: float
) -> None:
    pace = Pace(poll_interval, time_outs, max_fails)
    assert sum(pace.pause(failures, 0.0) for failures in range(1, max_fails)) <= poll_interval
    assert pace.silence(usual=0.01) <= poll_interval


def test_a_host_that_usually_takes_long_may_be_silent_for_longer_but_not_beyond_its_time_outs() -> None:
    pace = Pace(1.0, 4.0, 3)
    assert pace.silence(usual=0.5) == pytest.approx(1.5)
    assert pace.silence(usual=3.0) == pytest.approx(4.0)
    assert pace.patience(usual=0.5) == pytest.approx(1.5)


async def test_a_host_that_hangs_delays_no_other(cluster: PostgresCluster) -> None:
    frozen, other = cluster.standbys
    async with monitor_of(cluster, connect_timeout=HOUR) as monitor:
        await frozen.freeze()
        monitor.report_failure(frozen.host)
        position = await cluster.primary.write_wal(10)
        async with asyncio.timeout(PATIENCE):
            assert await monitor.find_replica(min_position=position, max_wait=HOUR) == other.host
        await other.kill()
        await until(monitor, lambda: not status_of(monitor, other).alive)


async def test_a_name_whose_look_up_hangs_takes_one_thread(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[str] = []
    answered = threading.Event()
    resolve = socket.getaddrinfo

    def hang(host: str, *args: Any, **options: Any) -> Any:
        if host != "hanging":
            return resolve(host, *args, **options)
        lookups.append(host)
        answered.wait(PATIENCE)
        return resolve(cluster.primary.host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        async with monitor_of(cluster, hosts=["hanging"], connect_timeout=0.2, max_fails=1) as monitor:
            for _ in range(3):
                await monitor.poll()
            assert not monitor.hosts()[0].alive
            assert lookups == ["hanging"]
            answered.set()
            await until(monitor, lambda: monitor.master() == "hanging")
    finally:
        answered.set()


async def test_fewer_failures_than_max_fails_do_not_make_a_host_dead(cluster: PostgresCluster) -> None:
    async with Proxy(cluster.primary) as proxy, monitor_of(cluster, hosts=[proxy.host]) as monitor:
        changes = changes_of(monitor)
        proxy.refusals = 2
        proxy.drop()
        # After the first connection: two that are refused, and one that is not.
        await eventually(lambda: proxy.attempts == 4, lambda: f"{proxy.attempts} attempts")
        await monitor.poll()
        assert changes == []
        assert monitor.master() == proxy.host
        assert monitor.hosts()[0].error is not None

        proxy.refusals = 3
        proxy.drop()
        await until(monitor, lambda: monitor.master() is None)


async def test_the_position_of_a_replica_does_not_count_after_its_connection_broke(cluster: PostgresCluster) -> None:
    await cluster.wait_for_replay()
    async with (
        Proxy(cluster.standbys[0]) as proxy,
        monitor_of(cluster, hosts=[cluster.primary.host, proxy.host]) as monitor,
    ):
        position = await cluster.primary.position()
        await monitor.poll()
        assert await monitor.find_replica(min_position=position) == proxy.host
        proxy.blocked = True
        proxy.drop()
        await eventually(lambda: proxy.attempts == 2, "the replica was not asked again")
        # The replica may have been restarted, and replay from an earlier position.
        assert monitor.replica() == proxy.host
        assert await monitor.find_replica(min_position=position) == cluster.primary.host


async def test_a_reported_failure_has_the_host_asked_at_once(cluster: PostgresCluster) -> None:
    frozen, other = cluster.standbys
    async with monitor_of(cluster, connect_timeout=1.0) as monitor:
        await frozen.freeze()
        monitor.report_failure(frozen.host)
        monitor.report_failure("unknown")
        await until(monitor, lambda: not status_of(monitor, frozen).alive)
        assert status_of(monitor, other).alive


async def test_all_hosts_may_die_and_come_back(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster, poll_interval=1) as monitor:
        for node in cluster.nodes:
            await node.kill()
        await until(monitor, lambda: not any(host.alive for host in monitor.hosts()))
        assert monitor.master() is monitor.replica() is None
        for node in cluster.nodes:
            await node.start()
        await until(monitor, lambda: all(host.alive for host in monitor.hosts()))
        assert monitor.master() == cluster.primary.host


# --- elections --------------------------------------------------------------------------------------------------------


async def test_a_promotion_is_followed(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster, poll_interval=1) as monitor:
        await monitor.poll()
        assert [host.promotion for host in monitor.hosts()] == [None, None, None]
        before = await _timeline(old)
        await old.kill()
        await new.promote()
        await until(monitor, lambda: monitor.master() == new.host)
        status = status_of(monitor, new)
        assert status.timeline == await _timeline(new)
        assert status.promotion is not None
        assert status.promotion.timeline == before


async def _timeline(node: PostgresNode) -> int:
    name: str = await node.fetch_value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
    return int(name[:8], 16)


async def test_of_two_primaries_the_one_on_the_higher_timeline_is_the_master(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, _ = cluster.nodes
    await new.promote()
    async with monitor_of(cluster) as monitor:
        # The old primary is the first of the list.
        assert monitor.master() == new.host
        assert status_of(monitor, old).role == "master"
        assert not status_of(monitor, old).in_sync("time_or_bytes")
        assert old.host not in {ask() for ask in (monitor.replica, monitor.sync_by_bytes) for _ in range(6)}
        await monitor.poll()
        assert not await monitor.confirm_master(old.host)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.__dict__["host"] for record in warnings] == [old.host]
    assert "on a timeline that a promotion has left" in warnings[0].getMessage()


async def test_an_old_primary_that_returns_is_refused_also_while_the_new_one_is_away(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster, poll_interval=1) as monitor:
        await old.kill()
        await new.promote()
        await until(monitor, lambda: monitor.master() == new.host)
        masters = changes_of(monitor)
        await old.start()
        await until(monitor, lambda: status_of(monitor, old).alive)
        assert monitor.master() == new.host
        await new.kill()
        await until(monitor, lambda: not status_of(monitor, new).alive)
        await monitor.poll()
        assert status_of(monitor, old).role == "master"
        assert monitor.master() is None
        assert old.host not in {change.master for change in masters}
    assert f"{old.host} says that it is the master" in caplog.text


async def test_an_old_primary_is_refused_by_what_a_replica_receives(cluster: PostgresCluster) -> None:
    old, new, replica = cluster.nodes
    await cluster.wait_for_replay()
    await old.kill()
    await new.promote()
    await replica.rewind(new)
    await old.start()
    async with monitor_of(cluster, hosts=[old.host, replica.host]) as monitor:
        assert status_of(monitor, old).role == "master"
        assert status_of(monitor, replica).timeline == await _timeline(new)
        assert monitor.master() is None


async def test_an_old_primary_is_refused_by_what_a_replica_has_received(cluster: PostgresCluster) -> None:
    old, new, replica = cluster.nodes
    await old.execute("CREATE ROLE watcher LOGIN IN ROLE pg_monitor")
    # The replica's control data does not tell the new timeline, as the checkpoint is older: only its files do.
    await replica.execute("CHECKPOINT")
    await cluster.wait_for_replay()
    await old.kill()
    await new.promote()
    await replica.follow(new)
    await new.kill()
    await old.start()
    for user in ("postgres", "watcher"):
        async with monitor_of(cluster, user=user) as monitor:
            assert status_of(monitor, old).role == "master"
            assert status_of(monitor, replica).role == "replica"
            assert monitor.master() is None
    await old.execute("DROP ROLE watcher")


async def _promote_both(cluster: PostgresCluster) -> tuple[PostgresNode, PostgresNode]:
    """Have two standbys go on from the same point, each on the same new timeline."""
    old, one, other = cluster.nodes
    await cluster.wait_for_replay()
    await old.kill()
    await one.promote()
    await other.promote()
    return one, other


async def test_while_two_servers_take_writes_on_one_timeline_there_is_no_master(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with monitor_of(cluster, poll_interval=0.5) as monitor:
        one, other = await _promote_both(cluster)
        await other.write_wal(1_000_000)
        await until(monitor, lambda: all(status_of(monitor, node).fault == "rival" for node in (one, other)))
        assert monitor.master() is None
        assert not await monitor.confirm_master(one.host)
        for _ in range(3):
            await monitor.poll()
        warnings = [record for record in caplog.records if "rivals" in record.__dict__]
        assert len(warnings) == 1
        assert {warnings[0].__dict__["host"], *warnings[0].__dict__["rivals"]} == {one.host, other.host}
        await one.kill()
        await until(monitor, lambda: monitor.master() == other.host)
        assert status_of(monitor, other).fault is None


async def test_a_replica_of_another_primary_on_the_timeline_of_the_master_is_not_in_sync(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await _promote_both(cluster)
    replica = cluster.nodes[0]
    await replica.rewind(other)
    await replica.wait_for_replay(await other.write_wal(1_000_000))
    await other.kill()
    async with monitor_of(cluster) as monitor:
        assert monitor.master() == one.host
        await monitor.poll()
        await monitor.poll()
        assert (status_of(monitor, replica).lag_ms, status_of(monitor, replica).lag_bytes) == (None, None)
        assert monitor.sync_by_time_and_bytes() == monitor.sync_by_bytes() == one.host
        # At the positions that it has replayed, the replica has other WAL than the master.
        assert monitor.replayed(await one.position()) == frozenset()
        await one.write_wal(2_000_000)
        await monitor.poll()
        assert monitor.sync_by_bytes() == one.host
        assert caplog.text.count("has replayed WAL that the master does not have") == 1
        # The master goes away for a moment, and has more WAL than the replica by now.
        await one.stop()
        await until(monitor, lambda: monitor.master() is None)
        await one.start()
        await until(monitor, lambda: monitor.master() == one.host)
        await monitor.poll()
        assert status_of(monitor, replica).lag_bytes is None
        assert monitor.replayed(1) == frozenset()
        # Without a promotion, the other primary takes over.
        await one.kill()
        await other.start()
        await until(monitor, lambda: monitor.sync_by_bytes() == replica.host)
        assert monitor.master() == other.host


@pytest.mark.parametrize("reverse", [False, True])
async def test_monitors_judge_rivals_alike_whatever_the_order_of_their_hosts(
    cluster: PostgresCluster, *, reverse: bool
) -> None:
    one, other = await _promote_both(cluster)
    hosts = [one.host, other.host]
    async with monitor_of(cluster, hosts=hosts[::-1] if reverse else hosts) as monitor:
        assert monitor.master() is None
        assert [host.fault for host in monitor.hosts()] == ["rival", "rival"]


async def test_of_two_servers_on_one_timeline_the_one_that_takes_writes_is_the_master(cluster: PostgresCluster) -> None:
    one, other = await _promote_both(cluster)
    await one.set("default_transaction_read_only", "on")
    async with monitor_of(cluster) as monitor:
        assert monitor.master() == other.host
        assert status_of(monitor, one).fault == "rival"


async def test_a_read_only_role_of_the_monitor_does_not_make_a_primary_count_as_fenced(
    cluster: PostgresCluster,
) -> None:
    await cluster.primary.execute("CREATE ROLE reading LOGIN")
    await cluster.primary.execute("ALTER ROLE reading SET default_transaction_read_only = on")
    one, other = await _promote_both(cluster)
    async with monitor_of(cluster, user="reading") as monitor:
        assert monitor.master() is None
        assert status_of(monitor, one).fault == status_of(monitor, other).fault == "rival"


async def test_two_names_of_one_server_are_no_rivals(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        Proxy(cluster.primary) as one,
        Proxy(cluster.primary) as other,
        monitor_of(cluster, hosts=[one.host, other.host]) as monitor,
    ):
        for _ in range(3):
            assert monitor.master() == one.host
            assert await monitor.confirm_master(one.host)
    assert [record for record in caplog.records if record.levelno == logging.WARNING] == []


async def test_a_replica_that_stays_on_the_old_timeline_is_not_in_sync(cluster: PostgresCluster) -> None:
    old, new, left_behind = cluster.nodes
    await cluster.wait_for_replay()
    async with monitor_of(cluster, sync_max_lag_ms=10**9, sync_max_lag_bytes=10**15) as monitor:
        await old.kill()
        await new.promote()
        await monitor.poll()
        assert monitor.master() == new.host
        assert status_of(monitor, left_behind).alive
        assert not status_of(monitor, left_behind).in_sync("time_or_bytes")
        assert monitor.sync_by_time() == new.host
        # The replica's positions are of another timeline.
        assert await monitor.find_replica(min_position=1) == new.host
        await left_behind.rewind(new)
        # The replica may have been asked after its start, and before it received any WAL.
        async with asyncio.timeout(PATIENCE):
            while monitor.sync_by_time() != left_behind.host:
                await monitor.poll()


async def test_a_demoted_primary_becomes_a_replica(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster, poll_interval=1) as monitor:
        await new.promote()
        await old.rewind(new)
        await until(monitor, lambda: status_of(monitor, old).role == "replica" and monitor.master() == new.host)


async def test_a_confirmation_notices_a_promotion_since_the_last_poll(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster) as monitor:
        assert await monitor.confirm_master(old.host)
        await new.promote()
        assert monitor.master() == old.host
        assert not await monitor.confirm_master(old.host)
        assert monitor.master() == new.host
        assert await monitor.confirm_master(new.host)


async def test_a_host_that_does_not_answer_is_not_confirmed(cluster: PostgresCluster) -> None:
    async with Proxy(cluster.primary) as proxy, monitor_of(cluster, hosts=[proxy.host]) as monitor:
        assert not await monitor.confirm_master("unknown")
        assert await monitor.confirm_master(proxy.host)
        proxy.refusals = 100
        proxy.drop()
        assert monitor.master() == proxy.host
        assert not await monitor.confirm_master(proxy.host)
        assert monitor.master() is None


async def test_a_host_that_answers_again_before_it_counts_as_dead_is_confirmed(cluster: PostgresCluster) -> None:
    async with Proxy(cluster.primary) as proxy, monitor_of(cluster, hosts=[proxy.host]) as monitor:
        proxy.refusals = 1
        proxy.drop()
        assert await monitor.confirm_master(proxy.host)


async def test_a_host_that_answers_again_before_the_others_do_is_confirmed(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, standby = cluster.primary, cluster.standbys[0]
    ask = Probe.ask
    attempts: list[bool] = []
    answered_again = asyncio.Event()

    async def ask_standby_last(probe: Probe) -> Answer:
        if probe._address.host == standby.host:
            await answered_again.wait()
            return await ask(probe)
        attempts.append(True)
        if len(attempts) == 1:
            raise ConnectionResetError("broken")
        answer = await ask(probe)
        asyncio.get_running_loop().call_soon(answered_again.set)
        return answer

    async with monitor_of(cluster, hosts=[primary.host, standby.host]) as monitor:
        monkeypatch.setattr(Probe, "ask", ask_standby_last)
        async with asyncio.timeout(PATIENCE):
            assert await monitor.confirm_master(primary.host)
        assert len(attempts) == 3


# --- lag --------------------------------------------------------------------------------------------------------------


async def test_a_replica_of_an_idle_primary_is_in_sync(cluster: PostgresCluster) -> None:
    await cluster.wait_for_replay()
    age = "SELECT extract(epoch FROM now() - pg_last_xact_replay_timestamp()) * 1000"
    async with monitor_of(cluster, sync_max_lag_ms=0, sync_max_lag_bytes=0) as monitor:
        await monitor.poll()
        for node in cluster.standbys:
            assert status_of(monitor, node).in_sync("time_and_bytes")
            # The age of the last commit alone would be above the limit.
            assert (await node.fetch_value(age) or 1) > 0


async def test_a_replica_that_never_replayed_a_commit_is_not_in_sync(cluster: PostgresCluster) -> None:
    replica, other = cluster.standbys
    await replica.stop()
    position = await cluster.primary.write_wal(10)
    await replica.set_apply_delay(HOUR)
    await replica.start()
    await replica.wait_for_stream()
    await other.wait_for_replay(position)
    assert await replica.fetch_value("SELECT pg_last_xact_replay_timestamp()") is None
    async with monitor_of(cluster) as monitor:
        assert status_of(monitor, replica).lag_ms is None
        assert not status_of(monitor, replica).in_sync("time")
        assert {monitor.sync_by_time() for _ in range(4)} == {other.host}


async def test_a_replica_whose_replay_is_paused_is_in_sync_until_the_master_goes_on(cluster: PostgresCluster) -> None:
    paused, other = cluster.standbys
    await cluster.wait_for_replay()
    async with monitor_of(cluster, sync_max_lag_ms=0, sync_max_lag_bytes=0) as monitor:
        await paused.pause_replay()
        await monitor.poll()
        assert status_of(monitor, paused).in_sync("time_and_bytes")
        await other.wait_for_replay(await cluster.primary.write_wal(10))
        await monitor.poll()
        assert not status_of(monitor, paused).in_sync("time_or_bytes")
        assert status_of(monitor, other).in_sync("time_and_bytes")
        await paused.resume_replay()
        await cluster.wait_for_replay()
        await monitor.poll()
        assert status_of(monitor, paused).in_sync("time_and_bytes")


async def test_a_replica_that_receives_no_wal_any_more_is_not_in_sync(cluster: PostgresCluster) -> None:
    cut_off, upstream = cluster.standbys
    await cut_off.follow(upstream)
    await cluster.wait_for_replay()
    async with monitor_of(cluster, sync_max_lag_ms=0, sync_max_lag_bytes=0) as monitor:
        await upstream.kill()
        await monitor.poll()
        assert status_of(monitor, cut_off).in_sync("time_and_bytes")
        await cluster.primary.write_wal(10)
        await monitor.poll()
        assert not status_of(monitor, cut_off).in_sync("time_or_bytes")


async def test_a_replica_that_lags_in_bytes_is_in_sync_by_time_alone(cluster: PostgresCluster) -> None:
    lagging, other = cluster.standbys
    await cluster.wait_for_replay()
    async with monitor_of(cluster, sync_max_lag_bytes=1000, sync_max_lag_ms=10**9) as monitor:
        await lagging.pause_replay()
        await other.wait_for_replay(await cluster.primary.write_wal(100_000))
        await monitor.poll()
        assert (status_of(monitor, lagging).lag_bytes or 0) > 100_000
        both = {lagging.host, other.host}
        assert {monitor.sync_by_bytes() for _ in range(4)} == {other.host}
        assert {monitor.sync_by_time_and_bytes() for _ in range(4)} == {other.host}
        assert {monitor.sync_by_time() for _ in range(4)} == both
        assert {monitor.sync_by_time_or_bytes() for _ in range(4)} == both
        assert {monitor.replica() for _ in range(4)} == both


async def test_a_replica_that_lags_in_time_is_in_sync_by_bytes_alone(cluster: PostgresCluster) -> None:
    lagging, other = cluster.standbys
    await cluster.wait_for_replay()
    async with monitor_of(cluster, sync_max_lag_bytes=10**9, sync_max_lag_ms=0) as monitor:
        await lagging.set_apply_delay(HOUR)
        await other.wait_for_replay(await cluster.primary.write_wal(10))
        await monitor.poll()
        assert (status_of(monitor, lagging).lag_ms or 0) > 0
        both = {lagging.host, other.host}
        assert {monitor.sync_by_time() for _ in range(4)} == {other.host}
        assert {monitor.sync_by_time_and_bytes() for _ in range(4)} == {other.host}
        assert {monitor.sync_by_bytes() for _ in range(4)} == both
        assert {monitor.sync_by_time_or_bytes() for _ in range(4)} == both
        await other.kill()
        await until(monitor, lambda: monitor.sync_by_time() == cluster.primary.host)


async def test_wal_that_is_on_its_way_to_a_replica_is_no_lag(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = cluster.standbys
    await cluster.wait_for_replay()
    ask = Probe.ask
    arrived = False

    async def asked_too_early(probe: Probe) -> Answer:
        nonlocal arrived
        answer = await ask(probe)
        if probe._address.host == slow.host and not arrived:
            arrived = True
            await slow.resume_replay()
            await slow.wait_for_replay(position)
        return answer

    async with monitor_of(cluster, sync_max_lag_ms=0, sync_max_lag_bytes=0) as monitor:
        changes = changes_of(monitor)
        await slow.pause_replay()
        position = await cluster.primary.write_wal(10)
        await other.wait_for_replay(position)
        monkeypatch.setattr(Probe, "ask", asked_too_early)
        await monitor.poll()
        assert arrived
        assert changes == []


async def test_a_replica_is_not_compared_with_what_the_master_wrote_after_its_last_answer(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The replicas count as asked before the master, however soon after them the master is asked.
    monkeypatch.setattr("ctxdb_pgstatus._probing.judge._SAME_ROUND_SECONDS", 0.0)
    await cluster.wait_for_replay()
    async with monitor_of(cluster, sync_max_lag_ms=0, sync_max_lag_bytes=0) as monitor:
        await monitor.poll()
        changes = changes_of(monitor)
        await cluster.primary.write_wal(10)
        await monitor._cluster.members[cluster.primary.host].watch.ask()
        assert changes == []
        assert all(host.in_sync("time_and_bytes") for host in monitor.hosts())


async def test_before_there_is_a_master_a_standby_is_compared_with_what_another_one_has_now(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The standbys count as asked at once, however slow the machine is.
    monkeypatch.setattr("ctxdb_pgstatus._probing.judge._SAME_ROUND_SECONDS", HOUR)
    # Without a master, all hosts would be asked twice a second.
    monkeypatch.setattr("ctxdb_pgstatus.monitor._LONGEST_HASTE_SECONDS", HOUR)
    behind, ahead = cluster.standbys
    await cluster.wait_for_replay()
    hosts = [behind.host, ahead.host]
    async with monitor_of(cluster, hosts=hosts, sync_max_lag_ms=0, sync_max_lag_bytes=0) as monitor:
        assert monitor.master() is None
        assert status_of(monitor, behind).in_sync("time_and_bytes")
        # It has nothing to send to itself.
        await behind.follow(behind)
        await ahead.wait_for_replay(await cluster.primary.write_wal(10))
        await monitor._cluster.members[ahead.host].watch.ask()
        await until(monitor, lambda: not status_of(monitor, behind).in_sync("time_or_bytes"))
        assert status_of(monitor, ahead).in_sync("time_and_bytes")
        # The standby that is left has all that is known of.
        await ahead.kill()
        await until(monitor, lambda: status_of(monitor, behind).in_sync("time_and_bytes"))


# --- positions --------------------------------------------------------------------------------------------------------


async def test_a_replica_that_has_replayed_a_position_is_found_from_memory(cluster: PostgresCluster) -> None:
    await cluster.wait_for_replay()
    async with monitor_of(cluster) as monitor:
        position = await cluster.primary.position()
        await monitor.poll()
        found = [await monitor.find_replica(min_position=position) for _ in range(4)]
        assert set(found) == {node.host for node in cluster.standbys}


async def test_a_search_waits_for_a_replica_that_replays_the_position(cluster: PostgresCluster) -> None:
    first, second = cluster.standbys
    async with monitor_of(cluster) as monitor:
        await first.pause_replay()
        await second.pause_replay()
        position = await cluster.primary.write_wal(10)
        assert await monitor.find_replica(min_position=position) == cluster.primary.host
        search = asyncio.create_task(monitor.find_replica("bytes", min_position=position, max_wait=HOUR))
        await second.resume_replay()
        async with asyncio.timeout(PATIENCE):
            assert await search == second.host


async def test_a_search_names_the_master_if_no_replica_replays_the_position(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster) as monitor:
        for node in cluster.standbys:
            await node.pause_replay()
        position = await cluster.primary.write_wal(10)
        assert await monitor.find_replica(min_position=position, max_wait=0.1) == cluster.primary.host
        for node in cluster.standbys:
            await node.kill()
        await until(monitor, lambda: not monitor.status.replicas())
        async with asyncio.timeout(PATIENCE):
            assert await monitor.find_replica(min_position=position, max_wait=HOUR) == cluster.primary.host


# --- accounts and options ---------------------------------------------------------------------------------------------


async def test_a_wrong_password_is_reported_without_the_password_and_can_be_corrected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with PostgresCluster(standbys=0, password="right") as cluster:
        caplog.clear()
        async with monitor_of(cluster, password="s3cr3t", poll_interval=0.5) as monitor:
            assert monitor.master() is None
            await monitor.poll()
            [host] = monitor.hosts()
            assert host.error is not None
            assert "password authentication failed" in host.error
            assert "check the monitor's user (postgres), password and database (postgres)" in host.error
            errors = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert len(errors) == 1
            assert errors[0].__dict__["host"] == cluster.primary.host
            for text in (caplog.text, repr(monitor), repr(host)):
                assert "s3cr3t" not in text
            assert "s3cr3t" not in repr(monitor._account)
            await cluster.primary.execute("ALTER ROLE postgres PASSWORD 's3cr3t'")
            await until(monitor, lambda: monitor.master() == cluster.primary.host)


async def test_a_missing_database_is_named_in_the_error_of_each_host(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster, database="missing") as monitor:
        assert all('database "missing" does not exist' in (host.error or "") for host in monitor.hosts())


@pytest.mark.parametrize(
    "options",
    [
        {"port": 0},
        {"port": 70000},
        {"poll_interval": 0},
        {"poll_interval": float("nan")},
        {"poll_interval": float("inf")},
        {"connect_timeout": -1},
        {"max_fails": 0},
        {"max_fails": 1.5},
        {"max_fails": True},
        {"sync_max_lag_ms": -1},
        {"sync_max_lag_bytes": -1},
        {"user": ""},
        {"user": None},
        {"database": ""},
    ],
    ids=str,
)
def test_a_wrong_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"`{next(iter(options))}` is "):
        HostMonitor(["n1"], **{"user": "u", **options})


@pytest.mark.parametrize("hosts", [["n1", "n1:5432"], [3], 3, None], ids=str)
def test_wrong_hosts_are_refused(hosts: Any) -> None:
    with pytest.raises(HostListError):
        HostMonitor(hosts, user="u")


# --- news -------------------------------------------------------------------------------------------------------------


async def test_wait_for_change_returns_after_a_change_and_not_after_a_mere_poll(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster) as monitor:
        before = monitor.status
        waiting = asyncio.create_task(monitor.wait_for_change())
        await monitor.poll()
        assert monitor.status is not before
        with pytest.raises(TimeoutError):
            await monitor.wait_for_change(0)
        assert not waiting.done()
        await cluster.standbys[0].kill()
        after = await asyncio.wait_for(waiting, PATIENCE)
        assert not next(host for host in after.hosts if host.host == cluster.standbys[0].host).alive
        # A change that has happened already is not missed.
        assert await monitor.wait_for_change(0, since=before) is monitor.status


async def test_callbacks_get_the_old_and_the_new_status_and_may_fail(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with monitor_of(cluster) as monitor:
        seen: list[tuple[str | None, str | None]] = []

        def fail(old: ClusterStatus, new: ClusterStatus) -> None:
            raise RuntimeError("the callback failed")

        def note(old: ClusterStatus, new: ClusterStatus) -> None:
            seen.append((old.master, new.master))

        monitor.on_change(fail)
        remove = monitor.on_change(note)
        await cluster.primary.kill()
        await until(monitor, lambda: monitor.master() is None)
        assert seen == [(cluster.primary.host, None)]
        assert "the callback failed" in caplog.text
        remove()
        remove()
        await cluster.standbys[0].kill()
        await until(monitor, lambda: not status_of(monitor, cluster.standbys[0]).alive)
        assert len(seen) == 1


async def test_simultaneous_polls_share_their_questions(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    ask = Probe.ask

    async def count(probe: Probe) -> Answer:
        nonlocal asked
        asked += 1
        return await ask(probe)

    async with monitor_of(cluster) as monitor:
        monkeypatch.setattr(Probe, "ask", count)
        await asyncio.gather(*(monitor.poll() for _ in range(100)))
        assert asked <= 2 * len(cluster.nodes)


async def test_a_defect_in_a_poll_does_not_end_the_polling(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with monitor_of(cluster) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr(monitor._changes, "tell", _fail)
            await monitor.poll()
        assert "Polling" in caplog.text
        with monkeypatch.context() as patch:
            patch.setattr(Probe, "ask", _fail)
            await monitor.poll()
            assert monitor.master() == cluster.primary.host
        await monitor.poll()
        assert monitor.master() == cluster.primary.host


def _fail(*args: object) -> Any:
    raise RuntimeError("this cannot happen")


# --- life -------------------------------------------------------------------------------------------------------------


async def test_monitor_answers_another_event_loop(cluster: PostgresCluster) -> None:
    await cluster.wait_for_replay()

    async def elsewhere() -> None:
        assert monitor.master() == await monitor.find_master() == cluster.primary.host
        assert await monitor.confirm_master(cluster.primary.host)
        assert (await monitor.poll()).master == cluster.primary.host
        position = await cluster.primary.write_wal(10)
        assert await monitor.find_replica(min_position=position, max_wait=HOUR) in await monitor.find_replicas()
        with pytest.raises(TimeoutError):
            await monitor.wait_for_change(0.01)
        before = monitor.status
        await cluster.standbys[0].kill()
        monitor.report_failure(cluster.standbys[0].host)
        after = await monitor.wait_for_change(PATIENCE, since=before)
        assert len(after.replicas()) == 1

    async with monitor_of(cluster) as monitor:
        await asyncio.to_thread(asyncio.run, elsewhere())


async def test_closed_monitor_leaves_no_connection_and_no_waiting_call(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster) as monitor:
        assert [await node.fetch_value(CONNECTIONS) for node in cluster.nodes] == [1, 1, 1]
        await cluster.standbys[1].freeze()
        monitor.report_failure(cluster.standbys[1].host)
        pending = asyncio.create_task(monitor.poll())
        waiting = asyncio.create_task(monitor.wait_for_change())
        await asyncio.sleep(0)
    await cluster.standbys[1].thaw()
    await pending
    with pytest.raises(PgStatusError, match="was closed"):
        await waiting
    assert monitor.master() is None
    for node in cluster.nodes:
        await _until_zero(lambda node=node: node.fetch_value(CONNECTIONS))  # type: ignore[misc]  # a default, not a parameter


async def test_confirmations_under_way_end_with_their_monitor_and_open_no_connection(cluster: PostgresCluster) -> None:
    before = asyncio.all_tasks()
    async with monitor_of(cluster, conn_max_age=0) as monitor:
        await cluster.primary.freeze()
        confirmation = asyncio.create_task(monitor.confirm_master(cluster.primary.host))
        await asyncio.sleep(0)
    await cluster.primary.thaw()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(PgStatusError):
            await confirmation
        assert asyncio.all_tasks() == before
    for node in cluster.nodes:
        await _until_zero(lambda node=node: node.fetch_value(CONNECTIONS))  # type: ignore[misc]  # a default, not a parameter


async def test_a_cancellation_of_the_close_leaves_no_connection_and_no_old_master(cluster: PostgresCluster) -> None:
    before = asyncio.all_tasks()
    monitor = await monitor_of(cluster).__aenter__()
    waiting = asyncio.create_task(monitor.wait_for_change())
    await asyncio.sleep(0)
    closing = asyncio.create_task(monitor.__aexit__(None, None, None))
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert monitor.master() is None
    with pytest.raises(PgStatusError, match="was closed"):
        await waiting
    assert asyncio.all_tasks() == before
    for node in cluster.nodes:
        await _until_zero(lambda node=node: node.fetch_value(CONNECTIONS))  # type: ignore[misc]  # a default, not a parameter


async def _until_zero(count: Callable[[], Awaitable[int]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while await count():
            await asyncio.sleep(0.005)


async def test_methods_of_a_monitor_that_is_not_running_raise_an_error(cluster: PostgresCluster) -> None:
    monitor = monitor_of(cluster)
    calls: list[Callable[[], Awaitable[object]]] = [
        monitor.find_master,
        monitor.find_replica,
        monitor.find_replicas,
        monitor.poll,
        monitor.wait_for_change,
        lambda: monitor.confirm_master("n1"),
    ]
    for call in calls:
        with pytest.raises(PgStatusError, match="not running"):
            await call()
    assert monitor.master() is monitor.replica() is None
    monitor.report_failure(cluster.primary.host)
    async with monitor:
        with pytest.raises(PgStatusError, match="running already"):
            await monitor.__aenter__()


async def test_closed_monitor_can_be_entered_again(cluster: PostgresCluster) -> None:
    monitor = monitor_of(cluster)
    for _ in range(2):
        async with monitor:
            assert monitor.master() == cluster.primary.host


async def test_a_monitor_can_be_cancelled_while_it_is_entered(cluster: PostgresCluster) -> None:
    await cluster.primary.freeze()
    monitor = monitor_of(cluster, connect_timeout=HOUR)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), monitor:
            pass
    assert monitor.master() is None
