"""Sessions by names that come to lead to other servers, or to several, and while a server refuses the monitor."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import ref

import pytest
from sqlalchemy import event, func, insert, select
from sqlalchemy.util import await_only
from tests.support.database import eventually
from tests.support.followers import NUMBERS, SERVER, following_by_name, numbers_on, server_of, write_number
from tests.support.monitors import HOUR, PATIENCE, address, monitor_of, until, until_server
from tests.support.proxy import Proxy
from tests.support.sidecar import serve_monitor

from ctxdb_core import DBConnect, db_session, new_db_ctx, new_non_ctx_session
from ctxdb_core.adapters import UnitOfWork, running_unit
from ctxdb_pgstatus import (
    CommitUnconfirmedError,
    HostMonitor,
    HostUnreachableError,
    MasterChangedError,
    MasterUncertainError,
    NoMasterError,
    PgStatusClient,
    follow_master,
    follow_replica,
)
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode

pytestmark = pytest.mark.usefixtures("number_table")


async def test_an_engine_reaches_a_host_that_is_named_by_an_ipv6_address_and_a_port(
    ipv6_cluster: PostgresCluster,
) -> None:
    await ipv6_cluster.primary.execute("CREATE TABLE number (number integer PRIMARY KEY)")
    await ipv6_cluster.wait_for_replay()
    name = f"[::1]:{ipv6_cluster.port}"
    async with (
        monitor_of(ipv6_cluster, hosts=[name]) as monitor,
        following_by_name(follow_master(monitor)) as db,
    ):
        await write_number(db, 1)
        assert await numbers_on(ipv6_cluster.primary) == [1]


async def test_a_host_is_reached_by_a_unix_socket(cluster: PostgresCluster) -> None:
    with tempfile.TemporaryDirectory(prefix="ctxdb") as directory:
        name = f"{directory}:6000"
        async with (
            Proxy(cluster.primary) as proxy,
            proxy.listening_at(f"{directory}/.s.PGSQL.6000"),
            monitor_of(cluster, hosts=[name], poll_interval=0.2, conn_max_age=0.0) as monitor,
            following_by_name(follow_master(monitor)) as db,
        ):
            await write_number(db, 1)
            assert monitor.master() == name
    assert await numbers_on(cluster.primary) == [1]


async def test_a_name_of_several_addresses_leads_to_the_one_that_answers(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def two(host: Any, *args: Any, **options: Any) -> Any:
        if host != "several":
            return resolve(host, *args, **options)
        # No server listens at the first address.
        return [*resolve("127.0.0.99", *args, **options), *resolve(cluster.primary.host, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    name = f"several:{cluster.port}"
    async with monitor_of(cluster, hosts=[name]) as monitor, following_by_name(follow_master(monitor)) as db:
        await write_number(db, 1)
        assert monitor.hosts()[0].fault is None
    assert await numbers_on(cluster.primary) == [1]


async def test_a_name_of_several_addresses_that_are_of_several_servers_gets_no_writes(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    dice = random.Random(1)

    def any_of_two(host: Any, *args: Any, **options: Any) -> Any:
        return resolve(dice.choice(cluster.nodes[:2]).host if host == "several" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", any_of_two)
    name = f"several:{cluster.port}"
    async with (
        monitor_of(cluster, hosts=[name], poll_interval=0.2, conn_max_age=0.1) as monitor,
        following_by_name(follow_master(monitor)) as db,
    ):
        await until(monitor, lambda: monitor.hosts()[0].fault == "shared_name")
        with pytest.raises(NoMasterError):
            await write_number(db, 1)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_connection_that_breaks_before_it_is_handed_out_is_an_unreachable_host(
    cluster: PostgresCluster, driver: str
) -> None:
    kill = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid = $1"
    name = address(cluster.primary)
    async with (
        monitor_of(cluster, hosts=[name]) as monitor,
        following_by_name(follow_master(monitor), driver) as db,
        new_non_ctx_session(db) as session,
    ):
        # SQLAlchemy asks the first connection of the engine for the server's version.
        await session.execute(select(NUMBERS))
        engine = (await db.engine()).sync_engine

        def break_off(dbapi_connection: Any, record: object) -> None:
            connection = dbapi_connection.driver_connection
            pid = connection.get_server_pid() if driver == "asyncpg" else connection.info.backend_pid
            await_only(cluster.primary.execute(kill, pid))

        event.listen(engine, "connect", break_off, insert=True)
        with pytest.raises(HostUnreachableError, match="has not accepted a connection") as raised:
            await write_number(db, 1)
    assert raised.value.__cause__ is not None
    assert raised.value.retryable


# --- names that move --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_writes_follow_a_name_to_another_server(cluster: PostgresCluster, driver: str) -> None:
    old, new, _ = cluster.nodes
    async with (
        Proxy(old) as proxy,
        monitor_of(cluster, hosts=[proxy.host], poll_interval=0.2, conn_max_age=0.1) as monitor,
        following_by_name(follow_master(monitor), driver) as db,
    ):
        await write_number(db, 1)
        await cluster.wait_for_replay()
        await new.promote()
        # The old primary goes on, and so do the connections to it that the pool keeps.
        proxy.nodes = (new,)
        await until_server(monitor, proxy.host, new)
        await write_number(db, 2)
        assert await numbers_on(old) == [1]
        assert await numbers_on(new) == [1, 2]


async def test_a_commit_on_a_server_that_has_lost_its_name_is_an_error(
    cluster: PostgresCluster,
) -> None:
    old, new, _ = cluster.nodes
    async with (
        Proxy(old) as proxy,
        monitor_of(cluster, hosts=[proxy.host], poll_interval=0.2, conn_max_age=0.1) as monitor,
        following_by_name(follow_master(monitor)) as db,
        new_non_ctx_session(db) as session,
    ):
        await session.execute(insert(NUMBERS).values(number=1))
        await new.promote()
        proxy.nodes = (new,)
        await until_server(monitor, proxy.host, new)
        with pytest.raises(MasterChangedError, match="is not behind the name"):
            await session.commit()


async def test_a_new_connection_to_another_server_has_the_monitor_look_where_the_name_leads(
    cluster: PostgresCluster,
) -> None:
    old, new, _ = cluster.nodes
    async with (
        Proxy(old) as proxy,
        monitor_of(cluster, hosts=[proxy.host], conn_max_age=HOUR) as monitor,
        following_by_name(follow_master(monitor)) as db,
    ):
        await new.promote()
        proxy.nodes = (new,)
        # By itself, the monitor would replace its connection to the old primary after an hour.
        await write_number(db, 1)
        assert monitor.server_of(proxy.host) == await new.fetch_value("SELECT pg_postmaster_start_time()")
        assert await numbers_on(new) == [1]


async def test_writes_by_a_sidecar_follow_a_name_to_another_server(cluster: PostgresCluster) -> None:
    old, new, _ = cluster.nodes
    async with (
        Proxy(old) as proxy,
        monitor_of(cluster, hosts=[proxy.host], poll_interval=0.2, conn_max_age=0.1) as monitor,
        asking_sidecar(monitor) as client,
        following_by_name(follow_master(client)) as db,
    ):
        await write_number(db, 1)
        await cluster.wait_for_replay()
        await new.promote()
        proxy.nodes = (new,)
        await until_server(monitor, proxy.host, new)
        client.report_failure(proxy.host)
        await client.hosts()
        assert client.server_of(proxy.host) == monitor.server_of(proxy.host)
        await write_number(db, 2)
        assert await numbers_on(new) == [1, 2]


async def test_a_new_connection_to_another_server_has_the_sidecar_look_where_the_name_leads(
    cluster: PostgresCluster,
) -> None:
    old, new, _ = cluster.nodes
    async with (
        Proxy(old) as proxy,
        monitor_of(cluster, hosts=[proxy.host], conn_max_age=HOUR) as monitor,
        asking_sidecar(monitor) as client,
        following_by_name(follow_master(client)) as db,
    ):
        await client.hosts()
        await new.promote()
        proxy.nodes = (new,)
        await write_number(db, 1)
        started_at = await new.fetch_value("SELECT pg_postmaster_start_time()")
        assert monitor.server_of(proxy.host) == client.server_of(proxy.host) == started_at


@asynccontextmanager
async def asking_sidecar(monitor: HostMonitor, max_age: float = 1.0) -> AsyncIterator[PgStatusClient]:
    async with serve_monitor(monitor) as url, PgStatusClient(url, max_age=max_age) as client:
        yield client


# --- names that move together, while every connection lives on --------------------------------------------------------


@asynccontextmanager
async def knowing(monitor: HostMonitor, kind: str) -> AsyncIterator[HostMonitor | PgStatusClient]:
    """A source: the monitor, or a client of its sidecar that has asked for the hosts and keeps the answer."""
    if kind == "monitor":
        yield monitor
        return
    async with asking_sidecar(monitor, max_age=HOUR) as client:
        await client.hosts()
        yield client


async def promote_beside(old: PostgresNode, new: PostgresNode) -> None:
    """Promote a standby of a primary that goes on; return when the primary has noticed that the standby has left."""
    before = await old.fetch_value("SELECT count(*) FROM pg_stat_replication")
    await new.promote()
    async with asyncio.timeout(30):
        while await old.fetch_value("SELECT count(*) FROM pg_stat_replication") >= before:
            await asyncio.sleep(0.005)


@asynccontextmanager
async def watched_without(
    cluster: PostgresCluster, hidden: PostgresNode, conn_max_age: float = HOUR
) -> AsyncIterator[tuple[HostMonitor, Proxy]]:
    """Provide a monitor of all nodes but `hidden`, and the proxy by which it reaches the primary.

    So no kept connection leads to `hidden`. By default, no connection is replaced during the test.
    """
    (other,) = (node for node in cluster.nodes if node not in (cluster.primary, hidden))
    async with (
        Proxy(cluster.primary) as writer,
        Proxy(other) as reader,
        monitor_of(cluster, hosts=[writer.host, reader.host], conn_max_age=conn_max_age) as monitor,
    ):
        yield monitor, writer


sources = pytest.mark.parametrize("kind", ["monitor", "sidecar"])


@sources
async def test_a_commit_on_the_old_primary_is_an_error_once_the_name_of_the_primary_has_moved(
    cluster: PostgresCluster, kind: str
) -> None:
    old, new = cluster.nodes[:2]
    async with (
        watched_without(cluster, new) as (monitor, writer),
        knowing(monitor, kind) as source,
        following_by_name(follow_master(source)) as db,
    ):
        await write_number(db, 1)
        await cluster.wait_for_replay()
        await promote_beside(old, new)
        writer.nodes = (new,)
        with pytest.raises(MasterChangedError, match="is not behind the name"):
            await write_number(db, 2)
        await write_number(db, 3)
        assert await numbers_on(new) == [1, 3]


@sources
async def test_a_commit_is_unconfirmed_if_a_standby_is_gone_and_the_primary_accepts_no_new_connection(
    cluster: PostgresCluster, kind: str
) -> None:
    old, new = cluster.nodes[:2]
    async with (
        watched_without(cluster, new) as (monitor, writer),
        knowing(monitor, kind) as source,
        following_by_name(follow_master(source)) as db,
    ):
        await write_number(db, 1)
        await promote_beside(old, new)
        writer.refusals = 1000
        with pytest.raises(CommitUnconfirmedError, match="No new connection to"):
            await write_number(db, 2)


async def test_no_known_master_is_told_while_its_name_may_lead_to_another_server(
    cluster: PostgresCluster,
) -> None:
    old, new = cluster.nodes[:2]
    async with watched_without(cluster, new) as (monitor, writer):
        await promote_beside(old, new)
        await monitor.poll()
        # The monitor has lost its connection, and cannot open another one.
        writer.error = ("53300", "sorry, too many clients already")
        writer.drop()
        async with asyncio.timeout(PATIENCE):
            while not monitor._cluster.members[writer.host].watch.refusals:
                await asyncio.sleep(0.005)
        assert monitor.master() == writer.host
        assert monitor.known_master() is None
        with pytest.raises(MasterUncertainError):
            await monitor.confirm_master(writer.host)


async def test_with_a_conn_max_age_of_0_each_commit_is_confirmed_over_a_new_connection(
    cluster: PostgresCluster,
) -> None:
    new, other = cluster.standbys
    # The promoted node is a standby of the other standby: the old primary does not notice that it leaves.
    await new.follow(other)
    async with (
        watched_without(cluster, new, conn_max_age=0) as (monitor, writer),
        following_by_name(follow_master(monitor)) as db,
    ):
        await write_number(db, 1)
        await cluster.wait_for_replay()
        await new.promote()
        writer.nodes = (new,)
        with pytest.raises(MasterChangedError, match="is not behind the name"):
            await write_number(db, 2)
        await write_number(db, 3)
        assert await numbers_on(new) == [1, 3]


async def test_a_connection_does_not_keep_the_unit_of_work_that_has_opened_it(cluster: PostgresCluster) -> None:
    async def write(db: DBConnect) -> ref[UnitOfWork]:
        async with new_db_ctx():
            await (await db_session(db)).execute(insert(NUMBERS).values(number=1))
            unit = running_unit()
            assert unit is not None
            return ref(unit)

    hosts = [address(node) for node in cluster.nodes]
    async with monitor_of(cluster, hosts=hosts) as monitor, following_by_name(follow_master(monitor)) as db:
        unit = await asyncio.create_task(write(db))

        def is_forgotten() -> bool:
            gc.collect()
            return unit() is None

        async with new_non_ctx_session(db) as session:
            # The engine stays in use. The event loop keeps timers that were cancelled until they are due.
            await session.execute(select(1))
            await eventually(is_forgotten, "the unit of work is kept")


async def test_commits_open_no_connection_after_a_standby_has_come_back(cluster: PostgresCluster) -> None:
    standby = cluster.standbys[0]
    async with watched_without(cluster, standby) as (monitor, writer):
        attempts = writer.attempts
        await standby.stop()
        assert await monitor.confirm_master(writer.host)
        assert writer.attempts == attempts + 1
        await standby.start()
        await standby.wait_for_stream()
        await monitor.poll()
        attempts = writer.attempts
        assert await monitor.confirm_master(writer.host)
        assert writer.attempts == attempts


async def test_commits_open_no_connection_while_a_listed_standby_is_away(
    cluster: PostgresCluster,
) -> None:
    old, standby, other = cluster.nodes
    hosts = [address(node) for node in (standby, other)]
    async with (
        Proxy(old) as writer,
        monitor_of(cluster, hosts=[writer.host, *hosts], conn_max_age=HOUR) as monitor,
    ):
        attempts = writer.attempts
        await standby.stop()
        for _ in range(3):
            assert await monitor.confirm_master(writer.host)
        assert writer.attempts == attempts


async def test_no_commit_waits_for_another_host_that_accepts_no_new_connection(cluster: PostgresCluster) -> None:
    primary = address(cluster.primary)
    async with (
        Proxy(cluster.standbys[0]) as hanging,
        monitor_of(
            cluster, hosts=[primary, hanging.host], poll_interval=0.6, connect_timeout=HOUR, conn_max_age=0
        ) as monitor,
    ):
        # Only new connections are blocked: the kept connection goes on.
        hanging.blocked = True
        async with asyncio.timeout(PATIENCE):
            for _ in range(3):
                assert await monitor.confirm_master(primary)


async def test_commits_that_wait_for_a_new_connection_share_it(cluster: PostgresCluster) -> None:
    old = cluster.primary
    async with (
        Proxy(old) as writer,
        monitor_of(cluster, hosts=[writer.host], conn_max_age=0) as monitor,
    ):
        attempts = writer.attempts
        assert all(await asyncio.gather(*(monitor.confirm_master(writer.host) for _ in range(20))))
        assert writer.attempts - attempts <= 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks cannot be started eagerly")
async def test_each_confirmation_has_a_new_connection_where_tasks_are_started_eagerly(cluster: PostgresCluster) -> None:
    async with (
        Proxy(cluster.primary) as writer,
        monitor_of(cluster, hosts=[writer.host], conn_max_age=0) as monitor,
    ):
        asyncio.get_running_loop().set_task_factory(vars(asyncio)["eager_task_factory"])
        for _ in range(3):
            attempts = writer.attempts
            assert await monitor.confirm_master(writer.host)
            assert writer.attempts > attempts


# --- names that are shared --------------------------------------------------------------------------------------------


async def test_a_reader_behind_a_shared_name_sees_what_it_has_written(cluster: PostgresCluster) -> None:
    fresh, stale = cluster.standbys
    await stale.pause_replay()
    async with Proxy(fresh, stale) as shared:
        primary = address(cluster.primary)
        async with (
            monitor_of(cluster, hosts=[primary, shared.host], conn_max_age=HOUR) as monitor,
            following_by_name(follow_master(monitor)) as master,
            following_by_name(follow_replica(monitor)) as replica,
        ):
            for number in range(1, 11):
                async with new_db_ctx():
                    session = await db_session(master)
                    await session.execute(insert(NUMBERS).values(number=number))
                    await session.commit()
                    assert await (await db_session(replica)).scalar(select(func.max(NUMBERS.c.number))) == number


@sources
async def test_a_reader_sees_its_write_also_after_its_replica_has_come_back_without_that(
    cluster: PostgresCluster, kind: str
) -> None:
    fresh, stale = cluster.standbys
    await stale.pause_replay()
    async with (
        Proxy(fresh) as proxy,
        monitor_of(cluster, hosts=[address(cluster.primary), proxy.host], poll_interval=0.2) as monitor,
        knowing(monitor, kind) as source,
        following_by_name(follow_master(source)) as master,
        following_by_name(follow_replica(source)) as replica,
    ):
        await write_number(master, 1)
        await fresh.wait_for_replay(await cluster.primary.position())
        async with new_non_ctx_session(replica) as session:
            assert await session.scalar(SERVER) == fresh.host
            await session.commit()
            # A replica that has crashed has replayed less when it takes connections again. Here another server is in
            # its place.
            proxy.nodes = (stale,)
            proxy.drop()
            await until_server(monitor, proxy.host, stale)
            assert await session.scalar(select(NUMBERS.c.number)) == 1


async def test_a_reader_that_has_written_nothing_may_read_behind_a_shared_name(cluster: PostgresCluster) -> None:
    async with Proxy(*cluster.standbys) as shared:
        primary = address(cluster.primary)
        async with (
            monitor_of(cluster, hosts=[primary, shared.host], conn_max_age=HOUR) as monitor,
            following_by_name(follow_replica(monitor)) as replica,
        ):
            for _ in range(5):
                assert await server_of(replica) in {node.host for node in cluster.standbys}


async def test_a_shared_name_gets_no_writes(cluster: PostgresCluster) -> None:
    async with (
        Proxy(*cluster.nodes) as shared,
        monitor_of(cluster, hosts=[shared.host], poll_interval=0.2, conn_max_age=0.1) as monitor,
        following_by_name(follow_master(monitor)) as db,
    ):
        await until(monitor, lambda: monitor.hosts()[0].fault == "shared_name")
        with pytest.raises(NoMasterError):
            await write_number(db, 1)


# --- while a server refuses the monitor -------------------------------------------------------------------------------


@asynccontextmanager
async def refusing(cluster: PostgresCluster) -> AsyncIterator[tuple[HostMonitor, DBConnect]]:
    """A monitor that the primary refuses, and a `DBConnect` that follows this monitor."""
    primary = cluster.primary
    await primary.execute("CREATE ROLE refused LOGIN")
    await cluster.wait_for_replay()
    hosts = [address(node) for node in cluster.nodes]
    try:
        async with (
            monitor_of(cluster, hosts=hosts, user="refused") as monitor,
            following_by_name(follow_master(monitor)) as db,
        ):
            await write_number(db, 0)
            await primary.execute("ALTER ROLE refused CONNECTION LIMIT 0")
            await primary.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'refused'")
            while monitor.known_master() is None:
                await monitor.poll()
            yield monitor, db
    finally:
        await cluster.primary.execute("DROP ROLE refused")


async def test_commits_are_confirmed_by_the_master_itself_while_it_refuses_the_monitor(
    cluster: PostgresCluster,
) -> None:
    async with refusing(cluster) as (_, db):
        for number in range(1, 4):
            await write_number(db, number)
        assert await numbers_on(cluster.primary) == [0, 1, 2, 3]


async def test_a_commit_is_no_success_if_another_host_was_promoted_while_the_master_refused_the_monitor(
    cluster: PostgresCluster,
) -> None:
    new = cluster.standbys[0]
    async with refusing(cluster) as (monitor, db):
        await new.promote()
        with pytest.raises((MasterChangedError, CommitUnconfirmedError)):
            await write_number(db, 1)
        assert monitor.master() == address(new)
