"""A service under Patroni and etcd: switchovers and deaths under acknowledged writes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tests.support.followers import until
from tests.support.patroni import ETCD, PATRONI, PatroniCluster, PatroniMember
from tests.support.traffic import Traffic

from ctxdb_demo.cluster_app import Base, create_app
from ctxdb_pgstatus import HostAddress, HostMonitor, PatroniDiscovery

pytestmark = [
    pytest.mark.patroni,
    # Patroni looks at its cluster once a second, and three servers start beside other tests.
    pytest.mark.timeout(240),
    pytest.mark.skipif(PATRONI is None, reason="there is no Patroni"),
    pytest.mark.skipif(ETCD is None, reason="there is no etcd"),
]


@pytest.fixture
async def patroni() -> AsyncIterator[PatroniCluster]:
    async with PatroniCluster() as cluster:
        yield cluster


def create_engine(name: str) -> AsyncEngine:
    address = HostAddress.parse(name)
    url = f"postgresql+asyncpg://postgres@{address.host}:{address.port}/postgres"
    return create_async_engine(url, pool_size=5, max_overflow=0)


async def test_switchovers_and_deaths_lose_no_acknowledged_write_and_have_no_stale_read(
    patroni: PatroniCluster,
) -> None:
    leader = patroni.members[0]
    engine = create_async_engine(leader.url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
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

            # The server alone: Patroni hands the role on.
            await patroni.find("synchronous")
            first.kill_server()
            second = await patroni.find("primary", other_than=first)
            await goes_on_at(second)

            # The whole machine.
            await patroni.find("synchronous")
            await second.kill()
            await traffic.some_refusals()
            await patroni.expire_leader()
            third = await patroni.find("primary", other_than=second)
            await goes_on_at(third)

            # It comes back, as a standby, and serves reads again.
            await patroni.start(second)
            await until(lambda: second.address in {host.host for host in monitor.status.replicas("time_or_bytes")})
            await goes_on_at(third)
        stored = {row["id"] for row in await third.fetch("SELECT id FROM ctxdb_demo_payments")}
    assert traffic.acknowledged.keys() - stored == set()
    assert traffic.stale == []
    assert traffic.errors <= {503}
    print(traffic)  # noqa: T201 - seen with `pytest -s`
