"""Commits whose answers were lost with their server, and are resolved by the host that is the master after that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tests.support.followers import monitoring, until
from tests.support.proxy import Proxy
from tests.support.sidecar import serve_monitor

from ctxdb_core import CommitOutcomeUnknownError, DBConnect, db_session, new_db_ctx
from ctxdb_pgstatus import CommitUnconfirmedError, ConnectionLostError, HostMonitor, PgStatusClient, follow_master
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


async def until_commit_waits(node: PostgresNode, *, after: int = 0) -> int:
    """Wait until a COMMIT has only to be confirmed by a standby; return the number of its server process.

    Args:
        node: the primary.
        after: the number of another process, whose COMMIT does not count.
    """
    query = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND pid <> $1"
    found: list[int] = []

    async def waits() -> bool:
        found[:] = [row["pid"] for row in await node.execute(query, after)]
        return bool(found)

    await until(waits)
    return found[0]


async def stored_on(node: PostgresNode) -> bool:
    return bool(await node.execute("SELECT 1 FROM number"))


async def kill_all(nodes: Sequence[PostgresNode]) -> None:
    await asyncio.gather(*(node.kill() for node in nodes))


async def lose_answer(cluster: PostgresCluster, db: DBConnect) -> Committing:
    """Begin a COMMIT that reaches the standbys, and whose answer is lost with the primary."""
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


async def test_a_lost_commit_succeeds_if_the_new_master_has_it(
    cluster: PostgresCluster, monitor: HostMonitor, db: DBConnect
) -> None:
    new = cluster.standbys[0]
    committing = await lose_answer(cluster, db)
    await until_replayed(monitor, new)
    await new.promote()
    await committing
    assert await stored_on(new)


async def test_a_lost_commit_succeeds_if_its_server_comes_back_as_the_master(
    cluster: PostgresCluster, db: DBConnect
) -> None:
    committing = await lose_answer(cluster, db)
    await cluster.primary.start()
    await committing
    assert await stored_on(cluster.primary)


async def test_a_lost_commit_whose_wait_for_a_standby_was_cut_short_succeeds_when_a_standby_has_it(
    cluster: PostgresCluster, db: DBConnect
) -> None:
    for node in cluster.standbys:
        await node.freeze()
    committing = asyncio.create_task(insert(db))
    pid = await until_commit_waits(cluster.primary)
    await cluster.primary.execute("SELECT pg_terminate_backend($1)", pid)
    await until(lambda: stored_on(cluster.primary))
    # The server has committed by itself alone. If it died now, the write would be lost.
    await until_commit_waits(cluster.primary, after=pid)
    assert not committing.done()
    await cluster.standbys[0].thaw()
    await committing


async def test_a_lost_commit_is_resolved_by_the_new_master_although_the_old_one_comes_back(
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


async def test_a_lost_commit_is_rolled_back_if_the_new_master_lacks_its_end(
    cluster: PostgresCluster, monitor: HostMonitor, db: DBConnect
) -> None:
    old, standbys = cluster.primary, cluster.standbys
    are_lost = asyncio.Event()

    async def is_left() -> bool:
        return not await old.execute("SELECT 1 FROM pg_stat_replication")

    async def lose_standbys() -> None:
        # The INSERT before this has written WAL, which is sent with the next commit.
        position = await old.write_wal(1)
        await cluster.wait_for_replay()
        await until(lambda: standbys[0].host in monitor.replayed(position))
        # The standbys follow each other from now on, and receive no WAL of the primary any more.
        for node, other in (standbys, reversed(standbys)):
            await node.follow(other, wait=False)
        await until(is_left)
        are_lost.set()

    committing = asyncio.create_task(insert(db, inserted=lose_standbys))
    # Until then, a commit that waits for a standby may be the one of `write_wal`.
    await are_lost.wait()
    await until_commit_waits(old)
    await old.kill()
    await standbys[0].promote()
    with pytest.raises(ConnectionLostError) as raised:
        await committing
    assert raised.value.retryable
    assert not await stored_on(standbys[0])


async def test_a_transaction_unknown_to_the_new_master_is_not_taken_for_another_one_with_its_id(
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
    # These transactions get the identifiers that the old master had assigned.
    for _ in range(5):
        await standbys[0].execute("SELECT pg_current_xact_id()")
    with pytest.raises((ConnectionLostError, CommitUnconfirmedError)):
        await committing
    assert not await stored_on(standbys[0])


class _BeforeCommit(Proxy):
    """A way to a server over which the first COMMIT does not get: the connection breaks when `open` is set."""

    def __init__(self, node: PostgresNode) -> None:
        super().__init__(node)
        self.held = asyncio.Event()
        self.open = asyncio.Event()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                if b"COMMIT" in data and not self.held.is_set():
                    self.held.set()
                    await self.open.wait()
                    return
                writer.write(data)
        finally:
            writer.transport.abort()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("checkpoint", [False, True])
async def test_a_transaction_that_a_crash_has_lost_is_not_taken_for_another_one_with_its_id(
    driver: str, *, checkpoint: bool
) -> None:
    # What is committed is flushed, and what is not committed stays in memory.
    async with PostgresCluster(standbys=0, settings={"wal_writer_delay": "10s"}) as cluster:
        node = cluster.primary
        await node.execute("CREATE TABLE number (number integer PRIMARY KEY)")
        async with (
            _BeforeCommit(node) as proxy,
            DBConnect.from_url(f"postgresql+{driver}://postgres@{proxy.host}/postgres", resolve_commits=True) as db,
        ):
            committing = asyncio.create_task(insert(db))
            await proxy.held.wait()
            await node.kill()
            await node.start()
            # These transactions get the identifiers that the server had assigned before.
            for number in range(2, 7):
                await node.execute("INSERT INTO number VALUES ($1)", number)
            if checkpoint:
                await node.execute("CHECKPOINT")
            proxy.open.set()
            # After a further checkpoint, the outcome may be unknown.
            with pytest.raises((CommitOutcomeUnknownError, DBAPIError)):
                await committing
        assert await node.fetch_value("SELECT count(*) FROM number WHERE number = 1") == 0


async def test_a_lost_commit_is_resolved_by_way_of_a_sidecar(cluster: PostgresCluster, monitor: HostMonitor) -> None:
    new = cluster.standbys[0]
    async with (
        serve_monitor(monitor) as url,
        PgStatusClient(url, max_age=0.1) as client,
        resolving(cluster, client) as db,
    ):
        committing = await lose_answer(cluster, db)
        await until_replayed(monitor, new)
        await new.promote()
        await committing
        assert await stored_on(new)
        assert await client.promotion_of(new.host) == await monitor.promotion_of(new.host)


async def test_a_lost_commit_stays_unknown_if_the_source_has_not_seen_the_promotion(
    cluster: PostgresCluster, monitor: HostMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing_was_seen(host: str) -> None:
        return None

    # A monitor that was started after the promotion has not seen it either.
    monkeypatch.setattr(monitor, "promotion_of", nothing_was_seen)
    new = cluster.standbys[0]
    async with resolving(cluster, monitor) as db:
        committing = await lose_answer(cluster, db)
        await until_replayed(monitor, new)
        await new.promote()
        with pytest.raises(CommitUnconfirmedError):
            await committing
        assert await stored_on(new)


async def test_a_lost_commit_stays_unknown_if_its_own_host_was_promoted_since(
    cluster: PostgresCluster, monitor: HostMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing_was_seen(host: str) -> None:
        return None

    monkeypatch.setattr(monitor, "promotion_of", nothing_was_seen)
    old = cluster.primary
    async with resolving(cluster, monitor) as db:
        committing = await lose_answer(cluster, db)
        # A host that has been a standby in between may have given the identifier to another transaction.
        await old.follow(cluster.standbys[0])
        await old.set("synchronous_standby_names", "")
        await old.start()
        await old.promote()
        with pytest.raises(CommitUnconfirmedError):
            await committing


async def test_a_lost_commit_succeeds_only_where_the_host_that_has_it_is_confirmed_as_the_master(
    cluster: PostgresCluster, monitor: HostMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [True, False]
    confirm_master = monitor.confirm_master

    async def confirm(host: str) -> bool:
        return await confirm_master(host) and answers.pop()

    async with resolving(cluster, monitor) as db:
        committing = await lose_answer(cluster, db)
        monkeypatch.setattr(monitor, "confirm_master", confirm)
        await cluster.primary.start()
        await committing
        assert answers == []
