"""The example application on a cluster under Patroni and etcd: switchovers, deaths, and restarts of the sidecar."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tests.support.followers import until
from tests.support.patroni import ETCD, PATRONI, PatroniCluster, PatroniMember
from tests.support.server import http_client
from tests.support.sidecar_process import running
from tests.support.traffic import Traffic

from ctxdb_core.testing.postgres import find_free_port
from ctxdb_demo.cluster_app import Base, create_app
from ctxdb_pgstatus import HostAddress, HostMonitor, PatroniDiscovery, PgStatusClient

pytestmark = [
    pytest.mark.patroni,
    # Patroni looks at its cluster once a second, and three servers start beside other tests.
    pytest.mark.timeout(240),
    pytest.mark.skipif(PATRONI is None, reason="there is no Patroni"),
    pytest.mark.skipif(ETCD is None, reason="there is no etcd"),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def patroni() -> AsyncIterator[PatroniCluster]:
    async with PatroniCluster() as cluster:
        yield cluster


def create_engine(name: str) -> AsyncEngine:
    address = HostAddress.parse(name)
    url = f"postgresql+asyncpg://postgres@{address.host}:{address.port}/postgres"
    return create_async_engine(url, pool_size=5, max_overflow=0)


async def make_tables(leader: PatroniMember) -> None:
    """Make the tables of the application, with nothing in them."""
    engine = create_async_engine(leader.url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


async def assert_nothing_is_lost(traffic: Traffic, primary: PatroniMember) -> None:
    stored = {row["id"] for row in await primary.fetch("SELECT id FROM ctxdb_demo_payments")}
    assert traffic.acknowledged.keys() - stored == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}


async def test_no_acknowledged_write_is_lost_and_no_read_is_stale_in_switchovers_and_deaths(
    patroni: PatroniCluster,
) -> None:
    leader = await patroni.find("primary")
    await make_tables(leader)
    discovery = PatroniDiscovery([member.api for member in patroni.members])
    async with HostMonitor(discovery, user="postgres", poll_interval=0.4, connect_timeout=1.0) as monitor:
        app = create_app(monitor, create_engine, secrets.token_hex(16))
        traffic = Traffic(app)

        async def goes_on_at(member: PatroniMember) -> None:
            await until(lambda: monitor.master() == member.address)
            await traffic.some_writes()
            await traffic.some_reads()

        async with app.router.lifespan_context(app), traffic.flowing():
            await goes_on_at(leader)

            first = await patroni.find("synchronous")
            await patroni.switch_over(leader, first)
            await goes_on_at(first)

            # The server of the leader dies, and its Patroni hands the role on.
            await patroni.find("synchronous")
            first.kill_server()
            second = await patroni.find("primary", other_than=first)
            await goes_on_at(second)

            # The machine of the leader dies, with its Patroni.
            await patroni.find("synchronous")
            await second.kill()
            await traffic.some_refusals()
            await patroni.expire_leader()
            third = await patroni.find("primary", other_than=second)
            await goes_on_at(third)

            # The machine comes back: its server is a standby, and serves reads again.
            await patroni.start(second)
            await until(lambda: second.address in {host.host for host in monitor.status.replicas("time_or_bytes")})
            await goes_on_at(third)
        await assert_nothing_is_lost(traffic, third)
    print(traffic)  # noqa: T201 - seen with `pytest -s`


async def test_no_write_is_refused_while_the_sidecar_restarts_and_none_is_lost_in_a_switchover(
    patroni: PatroniCluster,
) -> None:
    leader = await patroni.find("primary")
    await make_tables(leader)
    port = find_free_port(["127.0.0.1"])
    url = f"http://127.0.0.1:{port}"
    variables = {
        "hosts_patroni": ",".join(member.api for member in patroni.members),
        "pg_user": "postgres",
        "sleep_ms": "400",
        "http_port": str(port),
    }
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(PgStatusClient(url, max_age=0.05))
        app = create_app(client, create_engine, secrets.token_hex(16))
        traffic = Traffic(app)
        sidecar = await stack.enter_async_context(running(**variables))
        http = await stack.enter_async_context(http_client(await sidecar.ready()))

        async def leads_to(member: PatroniMember) -> None:
            async with asyncio.timeout(60):
                while (await http.get("/master")).text != member.address:
                    await asyncio.sleep(0.05)

        await leads_to(leader)
        async with app.router.lifespan_context(app), traffic.flowing():
            await traffic.some_writes()
            await traffic.some_reads()
            refused = traffic.refused

            assert await sidecar.stop() == 0
            await traffic.some_writes()
            sidecar = await stack.enter_async_context(running(**variables))
            await sidecar.ready()
            await leads_to(leader)
            await traffic.some_writes()
            assert traffic.refused == refused

            standby = await patroni.find("synchronous")
            await patroni.switch_over(leader, standby)
            await leads_to(standby)
            await traffic.some_writes()
            await traffic.some_reads()
        await assert_nothing_is_lost(traffic, standby)
