"""Commits whose answers were lost with their server: what the host that is the master afterwards tells of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tests.support.followers import monitoring, until
from tests.support.sidecar import serve_sidecar

from ctxdb_core import DBConnect, db_session, new_db_ctx
from ctxdb_pgstatus import CommitUnconfirmedError, ConnectionLostError, HostMonitor, PgStatusClient, follow_master
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode


@pytest.fixture
async def monitor(cluster: PostgresCluster, number_table: None) -> AsyncIterator[HostMonitor]:
    await cluster.set_synchronous("ANY 1 (*)")
    async with monitoring(cluster) as monitor:
        yield monitor


@pytest.fixture(params=["asyncpg", "psycopg"])
async def db(
    cluster: PostgresCluster, monitor: HostMonitor, request: pytest.FixtureRequest
) -> AsyncIterator[DBConnect]:
    async with resolving(cluster, monitor, request.param) as db:
        yield db


@asynccontextmanager
async def resolving(
    cluster: PostgresCluster, source: HostMonitor | PgStatusClient, driver: str = "asyncpg"
) -> AsyncIterator[DBConnect]:
    def create_engine(host: str) -> AsyncEngine:
        return create_async_engine(f"postgresql+{driver}://postgres@{host}:{cluster.port}/postgres")

    async with DBConnect(
        create_engine, before_create_session_handler=follow_master(source), resolve_commits=True
    ) as db:
        yield db


Committing: TypeAlias = asyncio.Task[None]


async def insert(db: DBConnect, *, inserted: Callable[[], Any] | None = None) -> None:
    async with new_db_ctx():
        await (await db_session(db)).execute(text("INSERT INTO number VALUES (1)"))
        if inserted is not None:
            await inserted()


async def until_commit_waits(node: PostgresNode) -> None:
    """Wait until a COMMIT is done but for the standby that has to confirm it."""

    async def waits() -> bool:
        return bool(await node.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))

    await until(waits)


async def stored_on(node: PostgresNode) -> bool:
    return bool(await node.execute("SELECT 1 FROM number"))


async def kill_all(nodes: Sequence[PostgresNode]) -> None:
    await asyncio.gather(*(node.kill() for node in nodes))


async def lose_answer(cluster: PostgresCluster, db: DBConnect) -> Committing:
    """Have a COMMIT reach the standbys, and its answer be lost with the primary."""
    for node in cluster.standbys:
        await node.freeze()
    committing = asyncio.create_task(insert(db))
    await until_commit_waits(cluster.primary)
    await cluster.primary.kill()
    for node in cluster.standbys:
        await node.thaw()
    return committing


async def until_replayed(monitor: HostMonitor, node: PostgresNode) -> None:
    """Wait until a standby has the write, and the monitor knows that it has."""
    await until(lambda: stored_on(node))
    position = await node.position()
    await until(lambda: node.host in monitor.replayed(position))


async def test_a_commit_that_reached_the_new_master_is_a_success(
    cluster: PostgresCluster, monitor: HostMonitor, db: DBConnect
) -> None:
    new = cluster.standbys[0]
    committing = await lose_answer(cluster, db)
    await until_replayed(monitor, new)
    await new.promote()
    await committing
    assert await stored_on(new)


async def test_a_commit_of_a_server_that_comes_back_as_the_master_is_a_success(
    cluster: PostgresCluster, db: DBConnect
) -> None:
    committing = await lose_answer(cluster, db)
    await cluster.primary.start()
    await committing
    assert await stored_on(cluster.primary)


async def test_a_commit_is_told_by_the_new_master_also_if_the_old_one_comes_back_as_one(
    cluster: PostgresCluster, monitor: HostMonitor, db: DBConnect
) -> None:
    old, new = cluster.primary, cluster.standbys[0]
    committing = await lose_answer(cluster, db)
    await until_replayed(monitor, new)
    await new.promote()
    await old.set("synchronous_standby_names", "")
    await old.start()
    await committing
    assert await stored_on(new)


async def test_a_commit_whose_end_the_new_master_lacks_is_rolled_back(
    cluster: PostgresCluster, monitor: HostMonitor, db: DBConnect
) -> None:
    old, standbys = cluster.primary, cluster.standbys
    are_lost = asyncio.Event()

    async def is_left() -> bool:
        return not await old.execute("SELECT 1 FROM pg_stat_replication")

    async def lose_standbys() -> None:
        # What is written is sent with the next commit.
        position = await old.write_wal(1)
        await cluster.wait_for_replay()
        await until(lambda: standbys[0].host in monitor.replayed(position))
        # They follow each other, and receive nothing more.
        for node, other in (standbys, reversed(standbys)):
            await node.follow(other, wait=False)
        await until(is_left)
        are_lost.set()

    committing = asyncio.create_task(insert(db, inserted=lose_standbys))
    # Before that, the commit that waits may be the one by which WAL is written.
    await are_lost.wait()
    await until_commit_waits(old)
    await old.kill()
    await standbys[0].promote()
    with pytest.raises(ConnectionLostError) as raised:
        await committing
    assert raised.value.retryable
    assert not await stored_on(standbys[0])


async def test_a_transaction_that_the_new_master_has_never_seen_is_not_taken_for_another_one(
    cluster: PostgresCluster, db: DBConnect
) -> None:
    old, standbys = cluster.primary, cluster.standbys
    await kill_all(standbys)
    committing = asyncio.create_task(insert(db))
    await until_commit_waits(old)
    await old.kill()
    await standbys[0].set("synchronous_standby_names", "")
    await standbys[0].start()
    await standbys[0].promote()
    # They get the identifiers that the old master had given away.
    for _ in range(5):
        await standbys[0].execute("SELECT pg_current_xact_id()")
    with pytest.raises((ConnectionLostError, CommitUnconfirmedError)):
        await committing
    assert not await stored_on(standbys[0])


async def test_a_service_that_follows_a_sidecar_is_told_as_well(cluster: PostgresCluster, monitor: HostMonitor) -> None:
    new = cluster.standbys[0]
    app = SidecarApp(History())
    app.monitor = monitor
    async with (
        serve_sidecar(app) as url,
        PgStatusClient(url, max_age=0.1) as client,
        resolving(cluster, client) as db,
    ):
        committing = await lose_answer(cluster, db)
        await until_replayed(monitor, new)
        await new.promote()
        await committing
        assert await stored_on(new)
        assert await client.promotion_of(new.host) == await monitor.promotion_of(new.host)


async def test_a_commit_is_unknown_where_nobody_has_seen_the_promotion(
    cluster: PostgresCluster, monitor: HostMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing_was_seen(host: str) -> None:
        return None

    # As of a monitor that has been started since.
    monkeypatch.setattr(monitor, "promotion_of", nothing_was_seen)
    new = cluster.standbys[0]
    async with resolving(cluster, monitor) as db:
        committing = await lose_answer(cluster, db)
        await until_replayed(monitor, new)
        await new.promote()
        with pytest.raises(CommitUnconfirmedError):
            await committing
        assert await stored_on(new)
