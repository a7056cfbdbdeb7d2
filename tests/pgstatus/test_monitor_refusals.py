"""`HostMonitor` with servers that run and refuse the monitor, which says nothing of the application's connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.monitors import HOUR, PATIENCE, changes_of, monitor_of, until
from tests.support.proxy import Proxy
from tests.support.server import http_client
from tests.support.sidecar_process import running

from ctxdb_pgstatus import HostMonitor, KnownMaster, OptionError, PgStatusError
from ctxdb_pgstatus.testing import PostgresCluster


@pytest.fixture(scope="module")
def guarded_cluster() -> Iterator[PostgresCluster]:
    """A single server that asks for passwords."""
    cluster = PostgresCluster(standbys=0, password="of the superuser")
    asyncio.run(cluster.start())
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture
async def guarded(guarded_cluster: PostgresCluster) -> AsyncIterator[PostgresCluster]:
    """The server, with a role for monitors whose password is "first"."""
    await guarded_cluster.primary.execute("CREATE ROLE watcher LOGIN PASSWORD 'first'")
    yield guarded_cluster
    await guarded_cluster.primary.execute("DROP ROLE watcher")


async def until_error(monitor: HostMonitor, text: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while text not in (monitor.hosts()[0].error or ""):
            await monitor.poll()
            await asyncio.sleep(0.005)


async def until_confirmed(monitor: HostMonitor, host: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while monitor.known_master() is not None or not await monitor.confirm_master(host):
            await asyncio.sleep(0.02)


async def test_a_server_with_too_many_connections_is_alive_in_its_role(
    guarded: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    primary = guarded.primary
    async with (
        Proxy(primary) as proxy,
        monitor_of(guarded, hosts=[proxy.host], user="watcher", password="first") as monitor,
    ):
        changes = changes_of(monitor)
        await primary.execute("ALTER ROLE watcher CONNECTION LIMIT 0")
        proxy.drop()
        await until_error(monitor, "too many connections")
        for _ in range(10):
            await monitor.poll()
        assert changes == []
        assert monitor.master() == proxy.host
        assert monitor.hosts()[0].alive
        # The monitor cannot confirm, however, that the host is still the master.
        with pytest.raises(PgStatusError, match="refuses the monitor"):
            await monitor.confirm_master(proxy.host)
        assert monitor.known_master() == KnownMaster(proxy.host, monitor.hosts()[0].timeline)
        await primary.execute("ALTER ROLE watcher CONNECTION LIMIT -1")
        await until_confirmed(monitor, proxy.host)
        assert monitor.known_master() is None
        assert changes == []
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1


async def test_a_server_that_refuses_the_monitor_is_asked_less_and_less_often(guarded: PostgresCluster) -> None:
    async with (
        Proxy(guarded.primary) as proxy,
        monitor_of(guarded, hosts=[proxy.host], user="watcher", password="wrong", poll_interval=0.05) as monitor,
    ):
        await until_error(monitor, "password authentication failed")
        watch = monitor._cluster.members[proxy.host].watch
        questions = 0
        async with asyncio.timeout(PATIENCE):
            while watch.refusals < 3:
                await monitor.poll()
                monitor.report_failure(proxy.host)
                await asyncio.sleep(0.005)
                questions += 1
        # Each attempt opens two connections: with TLS, and without.
        assert proxy.attempts <= 8
        # A machine that is not slow asks hundreds of times meanwhile. Without a pause after a refusal, each of these
        # questions would have been an attempt.
        assert questions > 10


async def test_a_rotated_password_leaves_the_host_alive_in_its_role(guarded: PostgresCluster) -> None:
    primary = guarded.primary
    passwords = ["first"]
    async with (
        Proxy(primary) as proxy,
        monitor_of(guarded, hosts=[proxy.host], user="watcher", password=lambda: passwords[-1]) as monitor,
    ):
        changes = changes_of(monitor)
        await primary.execute("ALTER ROLE watcher PASSWORD 'second'")
        proxy.drop()
        await until_error(monitor, "password authentication failed")
        assert monitor.master() == proxy.host
        passwords.append("second")
        await until_confirmed(monitor, proxy.host)
        assert changes == []


async def test_a_password_comes_from_a_coroutine_function(guarded: PostgresCluster) -> None:
    async def read() -> str:
        await asyncio.sleep(0)
        return "first"

    async with monitor_of(guarded, user="watcher", password=read) as monitor:
        assert monitor.master() == guarded.primary.host


async def test_a_password_file_is_read_for_each_connection(guarded: PostgresCluster, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    async with (
        Proxy(guarded.primary) as proxy,
        monitor_of(guarded, hosts=[proxy.host], user="watcher", password_file=file) as monitor,
    ):
        assert monitor.master() == proxy.host
        await guarded.primary.execute("ALTER ROLE watcher PASSWORD 'second'")
        file.write_text("second\n")
        proxy.drop()
        await until_confirmed(monitor, proxy.host)


async def test_the_last_password_is_used_while_its_function_fails(
    guarded: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> str:
        if vault_is_away:
            raise OSError("the vault is away")
        return "first"

    vault_is_away = False
    async with (
        Proxy(guarded.primary) as proxy,
        monitor_of(guarded, hosts=[proxy.host], user="watcher", password=read) as monitor,
    ):
        vault_is_away = True
        proxy.drop()
        async with asyncio.timeout(PATIENCE):
            while "the vault is away" not in caplog.text:
                await monitor.poll()
        await until_confirmed(monitor, proxy.host)
        assert monitor.master() == proxy.host


async def test_a_password_is_found_in_the_password_file_of_libpq(
    guarded: PostgresCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pgpass"
    file.write_text(f"{guarded.primary.host}:{guarded.port}:*:watcher:first\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    async with monitor_of(guarded, user="watcher", connect_timeout=PATIENCE) as monitor:
        assert monitor.master() == guarded.primary.host


@pytest.mark.parametrize("where", ["PGPASSFILE", "~/.pgpass"])
async def test_the_sidecar_finds_its_password_in_the_password_file_of_libpq(
    guarded: PostgresCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    primary = guarded.primary
    file = tmp_path / ".pgpass"
    file.write_text(f"{primary.host}:{primary.port}:*:watcher:first\n")
    file.chmod(0o600)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.delenv("PGPASSFILE", raising=False)
    monkeypatch.setenv(*("PGPASSFILE", str(file)) if where == "PGPASSFILE" else ("HOME", str(tmp_path)))
    name = f"{primary.host}:{primary.port}"
    async with (
        running(hosts=name, pg_user="watcher") as sidecar,
        http_client(await sidecar.ready()) as client,
    ):
        assert (await client.get("/master")).text == name
        assert await sidecar.stop() == 0


async def test_no_message_holds_a_password_that_a_function_has_returned(
    guarded: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with monitor_of(guarded, user="watcher", password=lambda: "s3cr3t-s3cr3t") as monitor:
        await until_error(monitor, "password authentication failed")
        assert monitor._account.mask("it was s3cr3t-s3cr3t") == "it was ***"
        assert "s3cr3t" not in caplog.text + repr(monitor) + repr(monitor.hosts()) + repr(monitor._account)


def test_two_sources_of_a_password_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="are both given"):
        HostMonitor(["n1"], user="u", password="p", password_file=tmp_path / "password")


STARTING_UP = ("57P03", "the database system is starting up")


async def test_a_master_that_starts_up_is_alive_in_its_role(cluster: PostgresCluster) -> None:
    async with (
        Proxy(cluster.primary) as proxy,
        monitor_of(cluster, hosts=[proxy.host, *_standbys(cluster)], poll_interval=0.3) as monitor,
    ):
        changes = changes_of(monitor)
        proxy.error = STARTING_UP
        proxy.drop()
        await until_error(monitor, "is starting up")
        assert changes == []
        assert monitor.master() == proxy.host
        proxy.error = None
        await until_confirmed(monitor, proxy.host)
        assert changes == []


async def test_a_dead_master_is_the_master_again_while_it_starts_up(cluster: PostgresCluster) -> None:
    async with (
        Proxy(cluster.primary) as proxy,
        monitor_of(cluster, hosts=[proxy.host, *_standbys(cluster)], poll_interval=0.3) as monitor,
    ):
        proxy.refusals = 1000
        proxy.drop()
        await until(monitor, lambda: monitor.master() is None)
        proxy.refusals = 0
        proxy.error = STARTING_UP
        await until(monitor, lambda: monitor.master() == proxy.host)


async def test_a_replica_that_takes_no_connections_gets_no_reads(cluster: PostgresCluster) -> None:
    async with (
        Proxy(cluster.standbys[0]) as proxy,
        monitor_of(cluster, hosts=[f"{cluster.primary.host}:{cluster.port}", proxy.host], poll_interval=0.3) as monitor,
    ):
        assert monitor.replica() == proxy.host
        proxy.error = STARTING_UP
        proxy.drop()
        await until(monitor, lambda: monitor.replica() == monitor.master() is not None)
        assert await monitor.find_replicas() == frozenset()
        proxy.error = None
        await until(monitor, lambda: monitor.sync_by_time_and_bytes() == proxy.host)


async def test_a_replica_that_refuses_the_monitor_is_read_from_only_without_others(cluster: PostgresCluster) -> None:
    others = [f"{node.host}:{node.port}" for node in (cluster.primary, cluster.standbys[1])]
    async with (
        Proxy(cluster.standbys[0]) as proxy,
        monitor_of(cluster, hosts=[proxy.host, *others]) as monitor,
    ):
        proxy.error = ("53300", "sorry, too many clients already")
        proxy.drop()
        await until_error(monitor, "too many clients")
        assert {monitor.replica() for _ in range(4)} == {others[1]}
        assert {await monitor.find_replica("bytes") for _ in range(4)} == {others[1]}
        assert await monitor.find_replicas() == {proxy.host, others[1]}


async def test_a_commit_waits_for_a_standby_that_has_refused_the_monitor_while_the_primary_lacks_one(
    cluster: PostgresCluster,
) -> None:
    old, new, _ = cluster.nodes
    async with Proxy(new) as proxy:
        # As a standby that is no hot standby does.
        proxy.error = STARTING_UP
        async with monitor_of(cluster, hosts=[f"{old.host}:{old.port}", proxy.host]) as monitor:
            master = monitor.master()
            assert master is not None
            await new.promote()
            async with asyncio.timeout(PATIENCE):
                while await old.fetch_value("SELECT count(*) FROM pg_stat_replication") == 2:
                    await asyncio.sleep(0.005)
            proxy.error = None
            # The monitor would not ask this host again for a while.
            monitor._cluster.members[proxy.host].watch._not_before += HOUR
            assert not await monitor.confirm_master(master)
            assert monitor.master() == proxy.host


async def test_a_host_that_has_refused_the_monitor_from_the_start_has_no_role(cluster: PostgresCluster) -> None:
    async with Proxy(cluster.primary) as proxy:
        proxy.error = STARTING_UP
        async with monitor_of(cluster, hosts=[proxy.host]) as monitor:
            [host] = monitor.hosts()
            assert (host.alive, host.role, monitor.master(), monitor.replica()) == (True, None, None, None)
            assert "(unknown)" in repr(monitor)
            proxy.error = None
            await until(monitor, lambda: monitor.master() == proxy.host)


def _standbys(cluster: PostgresCluster) -> list[Any]:
    return [f"{node.host}:{node.port}" for node in cluster.standbys]
