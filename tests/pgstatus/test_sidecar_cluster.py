"""The sidecar and `PgStatusClient` on a real cluster."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.database import eventually
from tests.support.proxy import Proxy
from tests.support.server import http_client
from tests.support.sidecar import serve_sidecar
from tests.support.sidecar_process import running

from ctxdb_pgstatus import HostMonitor, PgStatusClient
from ctxdb_pgstatus.lsn import format_lsn
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.testing import PostgresCluster


@asynccontextmanager
async def sidecar(cluster: PostgresCluster) -> AsyncIterator[tuple[str, HostMonitor]]:
    """Serve the status of a cluster by a sidecar, and yield the sidecar's URL and its monitor."""
    monitor = HostMonitor(cluster.hosts, port=cluster.primary.port, user="postgres", poll_interval=0.2)
    async with monitor:
        history = History()
        app = SidecarApp(history)
        app.monitor = monitor
        monitor.on_change(history.note)
        async with serve_sidecar(app) as url:
            yield url, monitor


async def test_the_sidecar_and_its_client_follow_a_failover(cluster: PostgresCluster) -> None:
    first, second, third = cluster.hosts
    async with sidecar(cluster) as (url, monitor), http_client(url) as http, PgStatusClient(url, max_age=0) as client:
        assert (await http.get("/master")).text == first
        assert await client.find_replicas() == {second, third}
        assert await client.confirm_master(first)
        assert {await client.sync_by_time_and_bytes() for _ in range(4)} == {second, third}

        await cluster.primary.kill()
        await eventually(lambda: monitor.status.master is None, "the death of the master is not noticed")
        assert (await http.get("/master")).status_code == 404
        assert (await http.get("/health")).status_code == 503
        assert await client.master() is None
        assert not await client.confirm_master(first)

        await cluster.standbys[0].promote()
        # A request that is not to be answered from memory need not wait for the next poll.
        assert (await http.get("/master", headers={"cache-control": "no-cache"})).text == second
        assert await client.master() == second
        assert await client.confirm_master(second)
        assert [each["role"] for each in (await http.get("/hosts")).json()] == [None, "master", "replica"]
        page = (await http.get("/")).text
    assert f"{second} is the master" in page
    assert f"{first} does not answer" in page


async def test_the_sidecar_names_a_replica_that_has_replayed_a_position(cluster: PostgresCluster) -> None:
    first, second, third = cluster.hosts
    async with sidecar(cluster) as (url, _), http_client(url) as http, PgStatusClient(url) as client:
        for standby in cluster.standbys:
            await standby.pause_replay()
        position = await cluster.primary.write_wal(100_000)
        assert await client.find_replica(min_position=position) == first
        assert (await http.get("/replica", params={"min_lsn": format_lsn(position)})).text == first
        # One standby goes on to replay, and the sidecar waits for it.
        await cluster.standbys[1].resume_replay()
        assert await client.find_replica(min_position=position, max_wait=20) == third
        assert await client.find_replica(min_position=position) == third
        assert second in await client.find_replicas()


async def test_sigusr1_has_a_lower_timeline_accepted(cluster: PostgresCluster) -> None:
    old, new = cluster.nodes[:2]
    hosts = ",".join(f"{node.host}:{node.port}" for node in cluster.nodes)
    async with running(hosts=hosts, sleep_ms="300") as sidecar, http_client(await sidecar.ready()) as client:

        async def until_master(name: str) -> None:
            async with asyncio.timeout(30):
                while (await client.get("/master")).text != name:
                    await asyncio.sleep(0.02)

        await until_master(f"{old.host}:{old.port}")
        await new.promote()
        await until_master(f"{new.host}:{new.port}")
        await new.kill()
        await until_master("")
        sidecar.process.send_signal(signal.SIGUSR1)
        await until_master(f"{old.host}:{old.port}")
        assert await sidecar.stop() == 0


async def test_the_monitor_of_the_sidecar_has_the_settings_of_the_sidecar(cluster: PostgresCluster) -> None:
    primary, standby = cluster.nodes[:2]
    spared = f"{standby.host}:{standby.port}"
    async with Proxy(primary) as silent, Proxy(primary) as renewed:
        silent.blocked = True
        variables = {
            "hosts": f"{silent.host},{renewed.host},{spared}",
            "sleep_ms": "200",
            "query_timeout_ms": "321",
            "conn_max_age_ms": "1",
            "noloadbalance": spared,
            "nofailover": renewed.host,
        }
        async with running(**variables) as sidecar, http_client(await sidecar.ready()) as client:
            hosts = {host["host"]: host for host in (await client.get("/hosts")).json()}
            assert "no answer within 0.321 s" in hosts[silent.host]["error"]
            assert [host["takes_reads"] for host in hosts.values()] == [True, True, False]
            assert (await client.get("/master")).status_code == 404
            attempts = renewed.attempts
            await eventually(lambda: renewed.attempts > attempts + 1, "the connection is not renewed")
            assert await sidecar.stop() == 0


async def test_the_sidecar_finds_its_hosts_in_a_file_that_changes(cluster: PostgresCluster, tmp_path: Path) -> None:
    first, second = cluster.nodes[:2]
    file = tmp_path / "hosts"
    file.write_text(f"{first.host}:{first.port}\n")
    variables = {"hosts_file": str(file), "sleep_ms": "300"}
    async with running(**variables) as sidecar, http_client(await sidecar.ready()) as client:
        assert (await client.get("/replica")).text == f"{first.host}:{first.port}"
        file.write_text(f"{first.host}:{first.port}\n{second.host}:{second.port}\n")
        async with asyncio.timeout(30):
            while (await client.get("/replica")).text != f"{second.host}:{second.port}":
                await asyncio.sleep(0.02)
        assert await sidecar.stop() == 0
