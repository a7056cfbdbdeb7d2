"""The guide "Deploying ctxdb-pgstatus": its statements and settings, used as they stand there, do what it says."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import pytest
import yaml
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.followers import NUMBERS, Engines
from tests.support.monitors import PATIENCE, monitor_of, status_of, until
from tests.support.proxy import Proxy
from tests.support.server import http_client
from tests.support.sidecar_process import running
from tests.support.tls import TLSFront, make_certificate

from ctxdb_core import DBConnect, db_session, retry_on_conflict
from ctxdb_pgstatus import HostMonitor, follow_replica
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode

GUIDE = Path(__file__).parents[2] / "docs" / "deploying-pgstatus.md"
PASSWORD = "of the watcher"
SLOW_MACHINE = {"query_timeout_ms": str(PATIENCE * 1000)}
"""With this, a sidecar does not take a host for dead that is slow to answer, as on a loaded machine."""
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl for certificates")


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(
        rf"^```{language}\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return found


def statements(start: str) -> list[str]:
    """Return the statements of the block of SQL that begins with `start`, with a password in the place of its dots."""
    (block,) = (each for each in blocks("sql") if each.startswith(start))
    return [each.strip() for each in block.replace("'...'", f"'{PASSWORD}'").split(";") if each.strip()]


# --- the role ---------------------------------------------------------------------------------------------------------


async def test_the_privileges_of_the_guide_are_enough_for_a_sidecar() -> None:
    async with PostgresCluster(standbys=1, password="of the superuser") as cluster:
        # The guide has them executed on the primary alone.
        for statement in statements("CREATE ROLE watcher"):
            await cluster.primary.execute(statement)
        await cluster.wait_for_replay()
        variables = {"hosts": ",".join(cluster.hosts), "pg_port": str(cluster.port), "pg_user": "watcher"}
        async with (
            running(**variables, **SLOW_MACHINE, pg_password=PASSWORD) as sidecar,
            http_client(await sidecar.ready()) as client,
        ):
            assert (await client.get("/master")).text == cluster.primary.host
            for host in (await client.get("/hosts")).json():
                assert (host["alive"], host["error"], host["timeline"]) == (True, None, 1)
                assert host["lag_bytes"] is not None
            assert await sidecar.stop() == 0


async def test_reserved_connections_let_the_monitor_in_when_applications_have_taken_all_others() -> None:
    settings = {"max_connections": "8", "superuser_reserved_connections": "2", "reserved_connections": "2"}
    async with PostgresCluster(standbys=0, settings=settings) as cluster, AsyncExitStack() as stack:
        primary = cluster.primary
        await primary.execute("CREATE ROLE watcher LOGIN")
        await primary.execute("CREATE ROLE shop LOGIN")
        for statement in statements("GRANT pg_use_reserved_connections"):
            await primary.execute(statement)
        with pytest.raises(asyncpg.TooManyConnectionsError):
            for _ in range(8):
                taken = await asyncpg.connect(host=primary.host, port=primary.port, user="shop", database="postgres")
                stack.push_async_callback(taken.close)
        async with monitor_of(cluster, user="watcher") as monitor:
            assert monitor.master() == primary.host
            assert status_of(monitor, primary).error is None


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def certificate(tmp_path: Path) -> Path:
    return await make_certificate(tmp_path)


@pytest.fixture
async def front(cluster: PostgresCluster, certificate: Path) -> AsyncIterator[TLSFront]:
    """The primary, which is reached by TLS."""
    async with TLSFront(cluster.primary, certificate) as front:
        yield front


@needs_openssl
async def test_the_sidecar_verifies_its_hosts_by_the_variables_of_libpq(
    front: TLSFront, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(certificate))
    host = f"{front.host}:{front.port}"
    async with (
        running(hosts=host, pg_user="postgres", **SLOW_MACHINE) as sidecar,
        http_client(await sidecar.ready()) as client,
    ):
        assert (await client.get("/master")).text == host
        assert await sidecar.stop() == 0
    assert front.handshakes > 0


@needs_openssl
async def test_the_sidecar_takes_no_host_whose_certificate_another_authority_has_signed(
    front: TLSFront, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = tmp_path / "another"
    another.mkdir()
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(await make_certificate(another)))
    host = f"{front.host}:{front.port}"
    async with (
        running(hosts=host, pg_user="postgres", **SLOW_MACHINE) as sidecar,
        http_client(await sidecar.ready()) as client,
    ):
        (known,) = (await client.get("/hosts")).json()
        assert not known["alive"]
        assert "certificate verify failed" in known["error"]
        assert await sidecar.stop() == 0


@needs_openssl
async def test_a_monitor_and_an_engine_use_one_ssl_context(front: TLSFront, certificate: Path) -> None:
    context = ssl.create_default_context(cafile=certificate)
    async with HostMonitor([f"{front.host}:{front.port}"], user="postgres", ssl=context) as monitor:
        host = monitor.master()
    engine = create_async_engine(f"postgresql+asyncpg://postgres@{host}/postgres", connect_args={"ssl": context})
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
    await engine.dispose()


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def test_kubernetes_knows_every_field_of_the_service_for_one_pod() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    (service,) = map(yaml.safe_load, blocks("yaml"))
    kubernetes_validate.validate(service, kubernetes_validate.latest_version(), strict=True)


# --- planned work -----------------------------------------------------------------------------------------------------


async def test_during_a_major_upgrade_the_upgraded_primary_is_the_master_and_old_standbys_get_no_reads(
    cluster: PostgresCluster,
) -> None:
    async with (
        PostgresCluster(hosts=["127.0.0.41"]) as anew,
        Proxy(cluster.primary) as name,
        monitor_of(
            cluster,
            hosts=[name.host, *(f"{node.host}:{node.port}" for node in cluster.standbys)],
            poll_interval=0.3,
            connect_timeout=PATIENCE,
        ) as monitor,
    ):
        primary, *standbys = (host.host for host in monitor.hosts())
        assert monitor.master() == primary
        assert {monitor.replica(), monitor.replica()} == set(standbys)
        # The primary that `pg_upgrade` makes has another system identifier. The standbys are made anew later.
        name.nodes = (anew.primary,)
        name.drop()
        await until(monitor, lambda: monitor.master() == primary and monitor.hosts()[1].fault is not None)
        assert [host.fault for host in monitor.hosts()] == [None, "stranger", "stranger"]
        assert monitor.replica() == primary


async def test_a_monitor_started_during_a_major_upgrade_follows_the_new_primary_once_an_operator_accepts_it(
    cluster: PostgresCluster,
) -> None:
    async with PostgresCluster(hosts=["127.0.0.41"]) as anew:
        await cluster.primary.stop()
        hosts = [f"{node.host}:{node.port}" for node in (anew.primary, *cluster.standbys)]
        async with monitor_of(cluster, hosts=hosts, poll_interval=0.3, connect_timeout=PATIENCE) as monitor:
            assert monitor.master() is None
            assert monitor.hosts()[0].fault == "stranger"
            for node in cluster.standbys:
                await node.stop()
            await until(monitor, lambda: [host.alive for host in monitor.hosts()] == [True, False, False])
            await monitor.accept_lower_timeline()
            assert monitor.master() == hosts[0]


async def test_the_statements_of_the_guide_stop_the_writes_of_a_second_master(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    async with monitor_of(cluster, poll_interval=0.3) as monitor:
        await new.promote()
        await until(monitor, lambda: status_of(monitor, old).fault == "stale")
        for statement in statements("ALTER SYSTEM"):
            await old.execute(statement)
        async with asyncio.timeout(PATIENCE):
            while await old.fetch_value("SHOW default_transaction_read_only") != "on":
                await asyncio.sleep(0.01)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await old.execute("CREATE TABLE written (number integer)")
        assert monitor.master() == new.host
        # The server comes back without the setting for the next test.
        await old.execute("ALTER SYSTEM RESET default_transaction_read_only")


async def test_retry_on_conflict_repeats_a_read_that_replay_has_cancelled() -> None:
    async with PostgresCluster(standbys=1, settings={"max_standby_streaming_delay": "0"}) as cluster:
        (standby,) = cluster.standbys
        await cluster.primary.execute("CREATE TABLE number (number integer PRIMARY KEY)")
        await cluster.primary.execute("INSERT INTO number VALUES (1)")
        await cluster.wait_for_replay()
        attempts = 0
        async with monitor_of(cluster, poll_interval=0.3, connect_timeout=PATIENCE) as monitor:
            replicas = DBConnect(Engines(cluster), before_create_session_handler=follow_replica(monitor))

            @retry_on_conflict(wait=0)
            async def report() -> list[int]:
                nonlocal attempts
                attempts += 1
                session = await db_session(replicas)
                if attempts == 1:
                    # The report takes long, and reads rows that the primary removes meanwhile.
                    await session.execute(text("SELECT pg_sleep(60) FROM number"))
                return list(await session.scalars(select(NUMBERS.c.number)))

            reading = asyncio.create_task(report())
            await _until_it_sleeps(standby)
            await cluster.primary.execute("DELETE FROM number")
            async with asyncio.timeout(PATIENCE):
                while attempts == 1:
                    # VACUUM leaves rows that a poll of the monitor might still see: so it is repeated until it removes
                    # the row, which cancels the report on the standby. A later one may end the connection of the
                    # repetition, if it comes between its query and its COMMIT.
                    await cluster.primary.execute("VACUUM number")
                    await asyncio.sleep(0.05)
                await reading
            assert reading.result() == []
            # The repetition is cancelled as well, if the row is removed after it has begun.
            assert attempts > 1
            await replicas.close()


async def _until_it_sleeps(node: PostgresNode) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await node.fetch_value("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
            await asyncio.sleep(0.01)
