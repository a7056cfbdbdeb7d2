"""Logical replication: a subscriber counts as a replica by what it has applied of the publisher's WAL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from sqlalchemy import func, insert, select
from tests.support.followers import NUMBERS, following_by_name
from tests.support.monitors import HOUR, PATIENCE, address, monitor_of, status_by_name, until
from tests.support.proxy import Proxy

from ctxdb_core import db_session, new_db_ctx
from ctxdb_pgstatus import HostMonitor, follow_master, follow_replica
from ctxdb_pgstatus._probing.answer import Answer, Slot, Subscription
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode

DDL = "CREATE TABLE number (number integer PRIMARY KEY)"


@pytest.fixture(scope="module")
def publishing() -> Iterator[PostgresCluster]:
    """A publisher and its physical standby, and nothing published yet."""
    cluster = PostgresCluster(standbys=1, settings={"wal_level": "logical"})
    asyncio.run(cluster.start())
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture(scope="module")
def subscribing() -> Iterator[PostgresCluster]:
    """A server of another cluster, which has no subscription yet."""
    cluster = PostgresCluster(hosts=["127.0.0.32"])
    asyncio.run(cluster.start())
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture
async def subscriber(publishing: PostgresCluster, subscribing: PostgresCluster) -> AsyncIterator[PostgresNode]:
    """A server that subscribes to the table `number` of the publisher, whose initial copy has ended."""
    publisher, node = publishing.primary, subscribing.primary
    for each in (publisher, node):
        await each.execute(DDL)
        await each.execute("CREATE ROLE watcher LOGIN")
    await publisher.execute("CREATE PUBLICATION numbers FOR TABLE number")
    target = f"host={publisher.host} port={publisher.port} user=postgres dbname=postgres"
    await node.execute(f"CREATE SUBSCRIPTION numbers CONNECTION '{target}' PUBLICATION numbers")
    async with asyncio.timeout(PATIENCE):
        while not await node.fetch_value("SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel"):
            await asyncio.sleep(0.01)
    yield node
    await node.execute("ALTER SUBSCRIPTION numbers ENABLE")
    await node.execute("DROP SUBSCRIPTION numbers")
    await publisher.execute("DROP PUBLICATION numbers")
    for each in (publisher, node):
        await each.execute("DROP TABLE number")
        await each.execute("DROP OWNED BY watcher")
        await each.execute("DROP ROLE watcher")


@asynccontextmanager
async def monitoring(cluster: PostgresCluster, subscriber: PostgresNode, user: str) -> AsyncIterator[HostMonitor]:
    hosts = [*(address(node) for node in cluster.nodes), address(subscriber)]
    async with monitor_of(cluster, hosts=hosts, subscribers=hosts[-1:], user=user, poll_interval=0.3) as monitor:
        yield monitor


async def grant_progress(subscriber: PostgresNode) -> None:
    await subscriber.execute("GRANT SELECT ON pg_replication_origin_status TO watcher")
    await subscriber.execute("GRANT EXECUTE ON FUNCTION pg_show_replication_origin_status() TO watcher")


async def insert_number(publisher: PostgresNode, number: int) -> int:
    """Commit a row, and return the position after it."""
    async with publisher.connect() as connection:
        await connection.execute("INSERT INTO number VALUES ($1)", number)
        position: int = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
        return position


async def test_a_subscriber_is_a_replica_and_never_the_master(
    publishing: PostgresCluster, subscriber: PostgresNode
) -> None:
    await grant_progress(subscriber)
    async with monitoring(publishing, subscriber, "watcher") as monitor:
        host = status_by_name(monitor, address(subscriber))
        assert (host.role, host.fault) == ("replica", None)
        assert host.system_identifier != status_by_name(monitor, address(publishing.primary)).system_identifier
        assert monitor.master() == address(publishing.primary)
        await insert_number(publishing.primary, 1)
        await until(monitor, lambda: status_by_name(monitor, address(subscriber)).in_sync("time_and_bytes"))
        assert address(subscriber) in {monitor.sync_by_time_and_bytes() for _ in range(4)}
        await publishing.primary.kill()
        await until(monitor, lambda: monitor.master() is None)
        await monitor.poll()
        assert monitor.master() is None
        await publishing.primary.start()
        await until(monitor, lambda: monitor.master() == address(publishing.primary))


async def assert_position_is_found(publishing: PostgresCluster, subscriber: PostgresNode) -> None:
    """Assert that a monitor finds a position on the subscriber after it was applied, while no standby has it."""
    standby = publishing.standbys[0]
    async with monitoring(publishing, subscriber, "watcher") as monitor:
        await standby.pause_replay()
        position = await insert_number(publishing.primary, 1)
        async with asyncio.timeout(PATIENCE):
            found = await monitor.find_replica(min_position=position, max_wait=HOUR)
        assert found == address(subscriber)
        assert await subscriber.fetch_value("SELECT count(*) FROM number") == 1
    await standby.resume_replay()


@pytest.mark.parametrize("granted", [True, False], ids=["origin", "slot"])
async def test_a_position_is_found_on_a_subscriber_once_it_has_applied_it(
    publishing: PostgresCluster, subscriber: PostgresNode, *, granted: bool
) -> None:
    if granted:
        await grant_progress(subscriber)
    await assert_position_is_found(publishing, subscriber)


async def test_a_position_is_found_on_a_subscriber_by_what_its_worker_reports(
    publishing: PostgresCluster, subscriber: PostgresNode
) -> None:
    # With this setting, the subscriber confirms nothing to its slot unless it is asked to. Without a grant, its
    # progress may not be read.
    await subscriber.set("wal_receiver_status_interval", "0")
    await assert_position_is_found(publishing, subscriber)
    await subscriber.set("wal_receiver_status_interval", "10s")


async def test_a_subscriber_is_not_in_sync_while_it_copies_a_table(
    publishing: PostgresCluster, subscriber: PostgresNode
) -> None:
    await grant_progress(subscriber)
    publisher = publishing.primary
    for node in (publisher, subscriber):
        await node.execute("CREATE TABLE added (number integer PRIMARY KEY)")
    await publisher.execute("ALTER PUBLICATION numbers ADD TABLE added")
    # No worker may begin to copy the table.
    await subscriber.set("max_sync_workers_per_subscription", "0")
    async with monitoring(publishing, subscriber, "watcher") as monitor:
        await until(monitor, lambda: status_by_name(monitor, address(subscriber)).in_sync("time_and_bytes"))
        await subscriber.execute("ALTER SUBSCRIPTION numbers REFRESH PUBLICATION")
        await until(monitor, lambda: not status_by_name(monitor, address(subscriber)).in_sync("time_or_bytes"))
        await publishing.standbys[0].pause_replay()
        position = await insert_number(publisher, 1)
        assert await monitor.find_replica(min_position=position, max_wait=0.1) == address(publisher)
        await publishing.standbys[0].resume_replay()
        await subscriber.set("max_sync_workers_per_subscription", "2")
        await until(monitor, lambda: status_by_name(monitor, address(subscriber)).in_sync("time_and_bytes"))
    for node in (publisher, subscriber):
        await node.execute("DROP TABLE added")


async def test_the_applied_position_of_a_subscriber_is_the_one_after_the_commit(
    publishing: PostgresCluster, subscriber: PostgresNode
) -> None:
    await grant_progress(subscriber)
    async with monitoring(publishing, subscriber, "watcher") as monitor:
        watch = monitor._cluster.members[address(subscriber)].watch
        position = number = 0
        async with asyncio.timeout(PATIENCE):
            # A record of the server's own may come between a commit and the question for the position after it.
            while watch.answer is None or watch.answer.subscriptions[0].applied != position:
                number += 1
                position = await insert_number(publishing.primary, number)
                while await subscriber.fetch_value("SELECT count(*) FROM number") < number:
                    await asyncio.sleep(0.005)
                await monitor.poll()


@pytest.mark.parametrize("told", [(7, 5, 5), (5, 7, 5), (5, 5, 7), (7, None, None), (None, 7, None), (None, None, 7)])
async def test_the_highest_known_position_of_a_subscription_counts(told: tuple[int | None, ...]) -> None:
    monitor = HostMonitor(["n1", "n2"], user="u", subscribers=["n2"])
    member = monitor._cluster.members["n2"]
    applied, reported, confirmed = told
    common = {"in_recovery": False, "position": 9, "replay_age_ms": None, "asked_at": 0.0}
    publisher = Answer(timeline=3, slots={"s": Slot(is_active=True, confirmed=confirmed)}, **common)  # type: ignore[arg-type]  # of several types
    member.watch.answer = Answer(timeline=1, subscriptions=(Subscription("s", applied, reported),), **common)  # type: ignore[arg-type]  # see above
    member.compare_with_publisher(publisher)
    assert member.answer is not None
    assert (member.answer.position, member.answer.timeline) == (7, 3)


async def test_of_several_subscriptions_the_one_that_is_the_furthest_behind_counts() -> None:
    monitor = HostMonitor(["n1", "n2"], user="u", subscribers=["n2"])
    member = monitor._cluster.members["n2"]
    slots = {name: Slot(is_active=True, confirmed=None) for name in ("a", "b")}
    subscriptions = (Subscription("a", 7), Subscription("b", 5))
    publisher = Answer(in_recovery=False, timeline=3, position=9, replay_age_ms=None, asked_at=0.0, slots=slots)
    member.watch.answer = replace(publisher, timeline=1, slots={}, subscriptions=subscriptions)
    member.compare_with_publisher(publisher)
    assert member.answer is not None
    assert member.answer.position == 5


async def test_a_subscriber_that_receives_nothing_is_not_in_sync(
    publishing: PostgresCluster, subscriber: PostgresNode
) -> None:
    await grant_progress(subscriber)
    connection = await subscriber.fetch_value("SELECT subconninfo FROM pg_subscription")
    async with monitoring(publishing, subscriber, "watcher") as monitor:
        await until(monitor, lambda: status_by_name(monitor, address(subscriber)).in_sync("time_and_bytes"))
        # No server listens at this address.
        await subscriber.execute("ALTER SUBSCRIPTION numbers CONNECTION 'host=127.0.0.99 port=1'")
        await until(monitor, lambda: not status_by_name(monitor, address(subscriber)).in_sync("time_or_bytes"))
        await subscriber.execute(f"ALTER SUBSCRIPTION numbers CONNECTION '{connection}'")
        await until(monitor, lambda: status_by_name(monitor, address(subscriber)).in_sync("time_and_bytes"))


async def test_a_subscription_that_is_disabled_leaves_its_subscriber_behind(
    publishing: PostgresCluster, subscriber: PostgresNode
) -> None:
    await grant_progress(subscriber)
    async with monitoring(publishing, subscriber, "watcher") as monitor:
        await insert_number(publishing.primary, 1)
        await until(monitor, lambda: status_by_name(monitor, address(subscriber)).in_sync("bytes"))
        await subscriber.execute("ALTER SUBSCRIPTION numbers DISABLE")
        position = await insert_number(publishing.primary, 2)
        await until(monitor, lambda: not status_by_name(monitor, address(subscriber)).in_sync("time_or_bytes"))
        await publishing.wait_for_replay()
        await monitor.poll()
        assert await monitor.find_replica(min_position=position) == address(publishing.standbys[0])


async def test_no_commit_waits_for_a_subscriber(publishing: PostgresCluster, subscriber: PostgresNode) -> None:
    await grant_progress(subscriber)
    primary = address(publishing.primary)
    async with Proxy(subscriber) as slow:
        options = {"hosts": [primary, slow.host], "subscribers": [slow.host], "connect_timeout": HOUR}
        async with monitor_of(publishing, **options) as monitor:
            slow.delay = HOUR
            async with asyncio.timeout(PATIENCE):
                assert await monitor.confirm_master(primary)


async def test_a_subscriber_without_a_subscription_to_the_cluster_is_not_in_sync(
    publishing: PostgresCluster, subscribing: PostgresCluster
) -> None:
    node = subscribing.primary
    hosts = [address(publishing.primary), address(node)]
    async with monitor_of(publishing, hosts=hosts, subscribers=hosts[1:]) as monitor:
        host = status_by_name(monitor, address(node))
        assert (host.position, host.timeline) == (None, None)
        assert not host.in_sync("time_or_bytes")
        assert monitor.sync_by_time() == hosts[0]


async def test_readers_see_on_a_subscriber_what_they_have_written(
    publishing: PostgresCluster, subscriber: PostgresNode
) -> None:
    await grant_progress(subscriber)
    await publishing.standbys[0].pause_replay()
    async with (
        monitoring(publishing, subscriber, "watcher") as monitor,
        following_by_name(follow_master(monitor)) as master,
        following_by_name(follow_replica(monitor, wait=HOUR)) as replica,
    ):
        for number in range(1, 6):
            async with new_db_ctx():
                session = await db_session(master)
                await session.execute(insert(NUMBERS).values(number=number))
                await session.commit()
                reader = await db_session(replica)
                assert await reader.scalar(select(func.max(NUMBERS.c.number))) == number
                assert await reader.scalar(select(func.inet_server_port())) == subscriber.port
    await publishing.standbys[0].resume_replay()
