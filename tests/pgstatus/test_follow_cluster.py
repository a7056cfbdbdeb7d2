"""`follow_master` and `follow_replica` on a real cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.support.followers import (
    NUMBERS,
    SERVER,
    Engines,
    following,
    monitoring,
    numbers_on,
    server_of,
    until,
    write_number,
)
from tests.support.hosts import FakeSource, RememberingSource
from tests.support.sidecar import serve_monitor

from ctxdb_core import DBConnect, db_session, new_non_ctx_session
from ctxdb_pgstatus import (
    ConnectionLostError,
    HostMonitor,
    HostUnreachableError,
    KnownMaster,
    MasterChangedError,
    NoMasterError,
    PgStatusClient,
    SidecarError,
    follow_master,
    follow_replica,
)
from ctxdb_pgstatus.testing import PostgresCluster
from ctxdb_starlette import DBSessionMiddleware

pytestmark = pytest.mark.usefixtures("number_table")


@pytest.fixture
async def forgetful(cluster: PostgresCluster) -> AsyncIterator[HostMonitor]:
    """A monitor that polls every ten minutes: in a test, it notices a promotion only if it is asked."""
    async with monitoring(cluster, poll_interval=600, connect_timeout=5) as monitor:
        yield monitor


@pytest.fixture
def engines(cluster: PostgresCluster) -> Engines:
    return Engines(cluster)


async def test_a_write_on_the_only_primary_while_that_is_fenced_is_the_error_of_postgresql(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    async with following(engines, follow_master(monitor)) as db:
        await cluster.primary.set("default_transaction_read_only", "on")
        with pytest.raises(DBAPIError, match="in a read-only transaction"):
            await write_number(db, 1)
        await monitor.poll()
        assert await server_of(db) == monitor.master() == cluster.primary.host
        await cluster.primary.set("default_transaction_read_only", "off")
        await write_number(db, 1)


async def test_a_demoted_host_loses_its_pool_and_is_reported_to_the_source(
    cluster: PostgresCluster, engines: Engines
) -> None:
    demoted = cluster.standbys[0]
    source = FakeSource(master=demoted.host, replicas=())
    async with following(engines, follow_master(source)) as db:
        assert await server_of(db) == demoted.host
        assert engines.connections[demoted.host] == 1
        with pytest.raises(ConnectionLostError, match="read-only") as raised:
            await write_number(db, 1)
        assert raised.value.retryable
        assert source.failures == [demoted.host]
        assert await server_of(db) == demoted.host
        assert engines.connections[demoted.host] == 2


async def test_a_commit_on_a_primary_after_a_promotion_of_another_host_is_answered_by_500(
    cluster: PostgresCluster, engines: Engines, forgetful: HostMonitor
) -> None:
    old, new = cluster.primary, cluster.standbys[0]
    async with following(engines, follow_master(forgetful)) as db:

        async def write(request: Request) -> Response:
            session = await db_session(db)
            await session.execute(insert(NUMBERS).values(number=int(request.query_params["number"])))
            return Response(status_code=201)

        app = Starlette(routes=[Route("/", write, methods=["POST"])])
        app.add_middleware(DBSessionMiddleware)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.post("/?number=1")).status_code == 201
            await cluster.wait_for_replay()
            await new.promote()
            assert forgetful.master() == old.host
            assert (await client.post("/?number=2")).status_code == 500
            assert forgetful.master() == new.host
            assert (await client.post("/?number=3")).status_code == 201
        assert await numbers_on(cluster.primary) == [1, 3]
        await until(lambda: _none_left(engines, old.host, cluster))


async def _none_left(engines: Engines, host: str, cluster: PostgresCluster) -> bool:
    (node,) = [node for node in cluster.nodes if node.host == host]
    return await engines.left_on(node) == 0


async def test_a_standby_that_was_taken_for_the_master_does_not_confirm_a_commit(
    cluster: PostgresCluster, engines: Engines
) -> None:
    standby = cluster.standbys[0]
    # The sidecar is away, and took the standby for the master. A statement that was given as text may have written.
    away = RememberingSource(master=standby.host, error=SidecarError("away"), known=KnownMaster(standby.host, None))
    async with following(engines, follow_master(away)) as db, new_non_ctx_session(db) as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(MasterChangedError):
            await session.commit()


async def test_a_commit_on_a_thawed_host_is_an_error_after_a_promotion(
    cluster: PostgresCluster, engines: Engines, forgetful: HostMonitor
) -> None:
    old, new = cluster.primary, cluster.standbys[0]
    async with following(engines, follow_master(forgetful)) as db, new_non_ctx_session(db) as session:
        await session.execute(insert(NUMBERS).values(number=1))
        await old.freeze()
        commit = asyncio.create_task(session.commit())
        await new.promote()
        await old.thaw()
        with pytest.raises(MasterChangedError, match=old.host):
            await commit
        await write_number(db, 2)
    assert await numbers_on(cluster.primary) == [2]


async def test_an_old_primary_that_returns_as_a_primary_gets_no_write(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    old, new = cluster.primary, cluster.standbys[0]
    async with following(engines, follow_master(monitor)) as db:
        await write_number(db, 1)
        await cluster.wait_for_replay()
        await old.kill()
        with pytest.raises((HostUnreachableError, ConnectionLostError, NoMasterError)):
            await write_number(db, 2)
        await new.promote()
        await until(lambda: monitor.master() == new.host)
        await write_number(db, 3)
        await old.start()
        await monitor.poll()
        for number in range(4, 10):
            await write_number(db, number)
        assert await numbers_on(cluster.primary) == [1, 3, *range(4, 10)]
        assert [row[0] for row in await old.execute("SELECT number FROM number")] == [1]


async def test_requests_on_a_frozen_master_fail_when_the_monitor_has_noticed(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    old, new = cluster.primary, cluster.standbys[0]
    async with following(engines, follow_master(monitor)) as db:
        await asyncio.gather(*(server_of(db) for _ in range(2)))
        await old.freeze()
        # Two requests have the connections that there are, and the others wait in the pool's queue.
        stuck = [asyncio.create_task(server_of(db)) for _ in range(10)]
        async with asyncio.timeout(10):
            results = await asyncio.gather(*stuck, return_exceptions=True)
        assert Counter(type(result) for result in results) == {ConnectionLostError: 2, NoMasterError: 8}
        with pytest.raises(NoMasterError):
            await server_of(db)
        await new.promote()
        await until(lambda: monitor.master() == new.host)
        assert await server_of(db) == new.host
        await write_number(db, 1)
        await old.thaw()
        await until(lambda: _none_left(engines, old.host, cluster))
    assert await numbers_on(cluster.primary) == [1]


async def test_reading_on_the_master_needs_no_confirmation(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    old, new = cluster.primary, cluster.standbys[0]
    async with following(engines, follow_master(monitor)) as db, new_non_ctx_session(db) as session:
        await session.execute(select(NUMBERS))
        await new.promote()
        await session.commit()
        assert old.host != new.host


async def test_replicas_are_balanced_over_few_connections(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    served: Counter[str] = Counter()

    async with following(engines, follow_replica(monitor, "bytes")) as db:

        async def read() -> None:
            for _ in range(50):
                served[await server_of(db)] += 1

        await asyncio.gather(*(read() for _ in range(20)))
    assert served == {node.host: 500 for node in cluster.standbys}
    assert engines.connections.total() <= 5


async def test_readers_go_to_the_master_until_a_replica_returns(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    async with following(engines, follow_replica(monitor)) as db:
        standbys = {node.host for node in cluster.standbys}
        assert {await server_of(db) for _ in range(4)} == standbys
        for node in cluster.standbys:
            await node.kill()
        await until(lambda: not monitor.status.replicas())
        assert {await server_of(db) for _ in range(4)} == {cluster.primary.host}
        first, second = cluster.standbys
        await first.start()
        await until(lambda: len(monitor.status.replicas()) == 1)
        assert {await server_of(db) for _ in range(4)} == {first.host}
        assert await engines.left_on(cluster.primary) == 0
        await second.start()
        await until(lambda: len(monitor.status.replicas()) == 2)
        assert {await server_of(db) for _ in range(4)} == standbys


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_connection_to_a_replica_serves_further_readers_after_a_read_only_transaction(
    cluster: PostgresCluster, monitor: HostMonitor, driver: str
) -> None:
    def create_engine(host: str) -> AsyncEngine:
        url = f"postgresql+{driver}://postgres@{host}:{cluster.port}/postgres"
        return create_async_engine(url, pool_size=1, max_overflow=0)

    async with DBConnect(create_engine, before_create_session_handler=follow_replica(monitor)) as db:
        for read_only in (True, True, False, False):
            async with new_non_ctx_session(db) as session:
                if read_only:
                    await session.connection(execution_options={"postgresql_readonly": True})
                assert await session.scalar(SERVER) != cluster.primary.host


async def test_new_readers_leave_a_replica_that_is_promoted(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    new, other = cluster.standbys
    async with following(engines, follow_replica(monitor)) as db:
        assert {await server_of(db) for _ in range(4)} == {new.host, other.host}
        # Of two sessions that are opened one after the other, one is on each replica.
        async with new_non_ctx_session(db) as one, new_non_ctx_session(db) as another:
            session = one if await one.scalar(SERVER) == new.host else another
            await new.promote()
            await other.follow(new)
            await until(lambda: monitor.master() == new.host)
            await until(lambda: [each.host for each in monitor.status.replicas()] == [other.host])
            # A reader that is at work is not disturbed.
            assert await session.scalar(SERVER) == new.host
        assert {await server_of(db) for _ in range(4)} == {other.host}
        await until(lambda: _none_left(engines, new.host, cluster))


async def test_a_second_event_loop_follows_the_same_monitor(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    new = cluster.standbys[0]
    async with (
        following(engines, follow_master(monitor)) as master,
        following(Engines(cluster, "readers"), follow_replica(monitor)) as replica,
    ):

        async def work(number: int) -> str:
            await write_number(master, number)
            async with new_non_ctx_session(replica) as session:
                assert number in (await session.scalars(select(NUMBERS.c.number))).all()
            return await server_of(master)

        def in_thread(number: int) -> str:
            return asyncio.run(work(number))

        assert {*await asyncio.gather(work(1), asyncio.to_thread(in_thread, 2))} == {cluster.primary.host}
        await cluster.wait_for_replay()
        await new.promote()
        await cluster.standbys[1].follow(new)
        await until(lambda: monitor.master() == new.host)
        assert {*await asyncio.gather(work(3), asyncio.to_thread(in_thread, 4))} == {new.host}
    assert await numbers_on(cluster.primary) == [1, 2, 3, 4]


async def test_a_write_in_a_read_only_transaction_on_a_real_master_does_not_drop_the_pool(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    async with following(engines, follow_master(monitor)) as db:
        async with new_non_ctx_session(db) as session:
            await session.execute(text("SET TRANSACTION READ ONLY"))
            with pytest.raises(DBAPIError, match="read-only"):
                await session.execute(insert(NUMBERS).values(number=1))
        await write_number(db, 2)
        assert engines.connections.total() == 1


async def test_sessions_that_follow_a_sidecar_move_with_a_failover(
    cluster: PostgresCluster, engines: Engines, monitor: HostMonitor
) -> None:
    old, new = cluster.primary, cluster.standbys[0]
    async with (
        serve_monitor(monitor) as url,
        PgStatusClient(url, max_age=0.05) as client,
        following(engines, follow_master(client)) as master,
        following(Engines(cluster, "readers"), follow_replica(client)) as replica,
    ):

        async def write_and_read(number: int) -> None:
            await write_number(master, number)
            async with new_non_ctx_session(replica) as session:
                assert number in (await session.scalars(select(NUMBERS.c.number))).all()

        await write_and_read(1)
        await cluster.wait_for_replay()
        async with new_non_ctx_session(master) as session:
            await session.execute(insert(NUMBERS).values(number=2))
            await old.freeze()
            # The statement waits for an answer until the sidecar says that the host is dead.
            with pytest.raises(ConnectionLostError, match="the host was left while the connection was in use"):
                await session.scalars(select(NUMBERS))
        with pytest.raises(NoMasterError):
            await write_and_read(3)
        await new.promote()
        await until(lambda: monitor.master() == new.host)
        await until(lambda: _follows(client, new.host))
        await write_and_read(4)
        await old.thaw()
        # A confirmation after the thaw, as of a commit that the freeze has interrupted.
        assert not await client.confirm_master(old.host)
        await until(lambda: _none_left(engines, old.host, cluster))
    assert await numbers_on(cluster.primary) == [1, 4]


async def _follows(client: PgStatusClient, host: str) -> bool:
    return await client.find_master() == host
