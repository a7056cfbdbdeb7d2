"""`HostMonitor` with hosts that are far away, slow or hanging, behind a proxy that delays what is sent."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.support.database import eventually
from tests.support.monitors import CONNECTIONS, HOUR, PATIENCE, changes_of, monitor_of, status_of, until
from tests.support.pooler import Pooler
from tests.support.proxy import Proxy
from tests.support.tls import TLSFront, make_certificate

from ctxdb_pgstatus import OptionError
from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.pace import Pace
from ctxdb_pgstatus._probing.probe import Probe
from ctxdb_pgstatus._probing.watch import Watch
from ctxdb_pgstatus.testing import PostgresCluster


async def test_a_host_that_takes_longer_to_connect_to_than_a_poll_interval_is_reached(
    cluster: PostgresCluster,
) -> None:
    async with (
        Proxy(cluster.primary, delay=0.1) as proxy,
        monitor_of(cluster, hosts=[proxy.host, cluster.primary.host], poll_interval=0.5, connect_timeout=10) as monitor,
    ):
        assert monitor.master() == proxy.host
        changes = changes_of(monitor)
        for _ in range(5):
            await monitor.poll()
        assert changes == []
        assert proxy.attempts == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate with")
async def test_a_host_is_reached_by_tls_over_40_ms_of_round_trips_with_polls_of_a_second(
    cluster: PostgresCluster, tmp_path: Path
) -> None:
    certificate = await make_certificate(tmp_path)
    context = ssl.create_default_context(cafile=certificate)
    async with (
        TLSFront(cluster.primary, certificate) as front,
        Proxy(front, delay=0.02) as proxy,
        monitor_of(cluster, hosts=[proxy.host], poll_interval=1.0, connect_timeout=PATIENCE, ssl=context) as monitor,
    ):
        assert monitor.master() == proxy.host
        assert await monitor.confirm_master(proxy.host)
        assert front.handshakes > 0


async def test_a_host_that_usually_takes_longer_to_answer_than_a_poll_interval_stays_alive(
    cluster: PostgresCluster,
) -> None:
    async with (
        Proxy(cluster.primary, delay=0.15) as proxy,
        monitor_of(
            cluster,
            hosts=[proxy.host, cluster.primary.host],
            poll_interval=0.2,
            connect_timeout=PATIENCE,
            max_fails=1,
        ) as monitor,
    ):
        watch = monitor._cluster.members[proxy.host].watch
        await watch.ask()
        await until(monitor, lambda: monitor.master() == proxy.host)
        changes = changes_of(monitor)
        for _ in range(3):
            await watch.ask()
        assert changes == []
        assert proxy.attempts == 1


async def test_a_slow_host_is_asked_one_question_at_a_time_and_delays_no_other(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    overlaps: list[str] = []
    ask = Probe.ask

    async def count(probe: Probe) -> Answer:
        name = probe._address.name
        under_way[name] += 1
        if under_way[name] > 1:
            overlaps.append(name)
        try:
            answer = await ask(probe)
        finally:
            under_way[name] -= 1
        answers[name] += 1
        return answer

    monkeypatch.setattr(Probe, "ask", count)
    async with (
        Proxy(cluster.standbys[0], delay=0.15) as slow,
        monitor_of(cluster, hosts=[cluster.primary.host, slow.host], poll_interval=0.05, connect_timeout=PATIENCE),
    ):
        start = answers[cluster.primary.host]
        before = answers[slow.host]
        await eventually(lambda: answers[slow.host] >= before + 2, "the slow host does not answer")
        assert answers[cluster.primary.host] - start > 4
        assert overlaps == []


async def test_a_host_that_counted_as_dead_is_alive_again_by_a_late_answer(cluster: PostgresCluster) -> None:
    async with monitor_of(cluster, poll_interval=0.6, connect_timeout=HOUR) as monitor:
        await cluster.primary.freeze()
        await until(monitor, lambda: monitor.master() is None)
        # The monitor has kept its one connection.
        await cluster.primary.thaw()
        await until(monitor, lambda: monitor.master() == cluster.primary.host)
        assert await cluster.primary.fetch_value(CONNECTIONS) == 1


async def until_asked(watches: list[Watch]) -> None:
    """Wait until all questions are under way, and not a moment longer, as the answers come soon after that."""
    for _ in range(100):
        if all(watch._silent_since is not None for watch in watches):
            return
        await asyncio.sleep(0)
    raise AssertionError("a host was not asked, or has answered already")


async def test_a_process_that_was_stopped_reads_the_answers_of_hosts_before_it_takes_these_for_dead(
    cluster: PostgresCluster,
) -> None:
    async with monitor_of(cluster, poll_interval=0.3) as monitor:
        changes = changes_of(monitor)
        watches = [member.watch for member in monitor._cluster.members.values()]
        answers = [watch.ask() for watch in watches]
        await until_asked(watches)
        # When the process goes on, all of its timers are overdue.
        time.sleep(0.8)
        assert all(await asyncio.gather(*answers))
        assert changes == []


async def test_a_process_that_was_stopped_notices_a_promotion_before_it_confirms_a_commit(
    cluster: PostgresCluster,
) -> None:
    old, new, other = cluster.nodes
    async with (
        # Behind a pooler, a question takes several round trips.
        Pooler(new) as pooler,
        monitor_of(cluster, hosts=[old.host, pooler.host, other.host], connect_timeout=PATIENCE) as monitor,
    ):
        await monitor.poll()
        # No host is polled before the confirmation, whose answers are late as soon as those of quick polls would be.
        for member in monitor._cluster.members.values():
            member.watch._pace = Pace(0.3, PATIENCE, 3)
        await new.promote()
        confirmation = asyncio.create_task(monitor.confirm_master(old.host))
        watches = [member.watch for member in monitor._cluster.members.values()]
        await until_asked(watches)
        time.sleep(0.5)
        assert not await confirmation


# --- confirmations ----------------------------------------------------------------------------------------------------


async def test_no_commit_waits_for_a_nofailover_host(cluster: PostgresCluster) -> None:
    async with Proxy(cluster.standbys[0]) as slow:
        hosts = [cluster.primary.host, slow.host]
        async with monitor_of(cluster, hosts=hosts, nofailover=[slow.host], connect_timeout=HOUR) as monitor:
            slow.delay = HOUR
            # With polls an hour apart, a question to the slow host would last as long.
            async with asyncio.timeout(PATIENCE):
                for _ in range(3):
                    assert await monitor.confirm_master(cluster.primary.host)
            assert monitor.replica() == slow.host


async def test_a_commit_waits_for_the_hosts_that_may_be_promoted(cluster: PostgresCluster) -> None:
    async with Proxy(cluster.standbys[0]) as slow:
        hosts = [cluster.primary.host, slow.host]
        async with monitor_of(cluster, hosts=hosts, connect_timeout=HOUR) as monitor:
            slow.delay = HOUR
            confirmation = asyncio.create_task(monitor.confirm_master(cluster.primary.host))
            assert await monitor._cluster.members[cluster.primary.host].watch.ask()
            assert not confirmation.done()
            slow.drop()
            await confirmation


async def test_a_commit_waits_no_longer_than_usual_for_a_host_that_hangs(cluster: PostgresCluster) -> None:
    frozen = cluster.standbys[0]
    async with monitor_of(cluster, poll_interval=1.5, connect_timeout=HOUR) as monitor:
        await frozen.freeze()
        async with asyncio.timeout(PATIENCE):
            for _ in range(3):
                assert await monitor.confirm_master(cluster.primary.host)


async def test_no_commit_waits_for_a_host_that_has_just_failed(cluster: PostgresCluster) -> None:
    async with Proxy(cluster.standbys[0]) as failing:
        hosts = [cluster.primary.host, failing.host]
        async with monitor_of(cluster, hosts=hosts, connect_timeout=HOUR) as monitor:
            watch = monitor._cluster.members[failing.host].watch
            # The first attempt fails, and the next one hangs.
            failing.refusals, failing.blocked = 1, True
            failing.drop()
            await eventually(lambda: watch.failures == 1, "the attempt has not failed")
            async with asyncio.timeout(PATIENCE):
                assert await monitor.confirm_master(cluster.primary.host)
            assert watch.alive


async def test_a_commit_waits_for_a_host_that_is_late_while_the_primary_lacks_a_standby(
    cluster: PostgresCluster,
) -> None:
    old, new, other = cluster.nodes
    async with (
        Proxy(new) as slow,
        monitor_of(cluster, hosts=[old.host, slow.host, other.host], connect_timeout=PATIENCE) as monitor,
    ):
        # No host is polled before the confirmation, whose answers are late after a fifth of a second.
        for member in monitor._cluster.members.values():
            member.watch._pace = Pace(3.0, PATIENCE, 15)
        slow.delay = 0.25
        await new.promote()
        async with asyncio.timeout(PATIENCE):
            while await old.fetch_value("SELECT count(*) FROM pg_stat_replication") == 2:
                await asyncio.sleep(0.005)
        assert not await monitor.confirm_master(old.host)
        assert monitor.master() == slow.host


async def test_no_commit_waits_for_a_dead_standby_that_the_primary_lacks(cluster: PostgresCluster) -> None:
    primary, dead, other = cluster.nodes
    async with (
        Proxy(dead) as proxy,
        monitor_of(
            cluster, hosts=[primary.host, proxy.host, other.host], poll_interval=0.5, connect_timeout=3 * PATIENCE
        ) as monitor,
    ):
        # Connections are accepted, and nothing is answered: as long as an attempt may take, it goes on.
        proxy.blocked = True
        await dead.kill()
        await until(monitor, lambda: not monitor.hosts()[1].alive)
        watch = monitor._cluster.members[primary.host].watch
        async with asyncio.timeout(PATIENCE):
            while not watch.standbys_before_loss:
                await monitor.poll()
            assert await monitor.confirm_master(primary.host)


async def test_a_nofailover_host_is_never_the_master(
    cluster: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster, poll_interval=0.5, nofailover=[new.host]) as monitor:
        await old.kill()
        await new.promote()
        await until(monitor, lambda: status_of(monitor, new).role == "master")
        await monitor.poll()
        assert monitor.master() is None
    warnings = [record for record in caplog.records if "`nofailover`" in record.getMessage()]
    assert [(record.levelno, record.__dict__["host"]) for record in warnings] == [(logging.WARNING, new.host)]


async def test_a_noloadbalance_host_gets_no_reads(cluster: PostgresCluster) -> None:
    await cluster.wait_for_replay()
    spared, other = cluster.standbys
    async with monitor_of(cluster, noloadbalance=[spared.host]) as monitor:
        asked = [monitor.replica() for _ in range(4)] + [monitor.sync_by_time_or_bytes() for _ in range(4)]
        assert set(asked) == {other.host}
        position = await cluster.primary.position()
        await monitor.poll()
        assert {await monitor.find_replica(min_position=position) for _ in range(4)} == {other.host}
        assert await monitor.find_replicas() == {other.host}
        # A `noloadbalance` host may be promoted all the same.
        await spared.promote()
        await monitor.poll()
        assert monitor.master() == spared.host


@pytest.mark.parametrize("option", ["nofailover", "noloadbalance"])
def test_an_option_that_names_an_unknown_host_is_refused(cluster: PostgresCluster, option: str) -> None:
    with pytest.raises(OptionError, match=f"`{option}` names n9"):
        monitor_of(cluster, **{option: ["n9"]})
    with pytest.raises(OptionError, match=f"`{option}` is the string"):
        monitor_of(cluster, **{option: cluster.primary.host})
