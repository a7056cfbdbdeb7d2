"""`DBConnect`s that follow a real cluster, and what the hosts of the cluster show of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import URL, Column, Integer, MetaData, Table, event, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ctxdb_core import DBConnect, db_session, new_db_ctx, new_non_ctx_session
from ctxdb_pgstatus import FollowHandler, HostAddress, HostMonitor
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode

SERVER = text("SELECT host(inet_server_addr())")
NUMBERS = Table("number", MetaData(), Column("number", Integer, primary_key=True))
"""The table of the fixture `number_table`."""


class Engines:
    """Makes the engines of a `DBConnect` on the hosts of a cluster, and counts their connections."""

    def __init__(self, cluster: PostgresCluster, name: str = "followers", **options: Any) -> None:
        self.cluster = cluster
        self.name = name
        self.options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 60, **options}
        self.connections: Counter[str] = Counter()

    def __call__(self, host: str) -> AsyncEngine:
        engine = create_async_engine(
            f"postgresql+asyncpg://postgres@{host}:{self.cluster.port}/postgres",
            connect_args={"server_settings": {"application_name": self.name}},
            **self.options,
        )
        event.listen(engine.sync_engine, "connect", lambda *args: self.connections.update([host]))
        return engine

    async def left_on(self, node: PostgresNode) -> int:
        """Return how many of these connections are open on a host.

        A server process whose COMMIT waits for a standby does not notice that its client has gone.
        """
        count: int = await node.fetch_value(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE application_name = $1 AND wait_event IS DISTINCT FROM 'SyncRep'",
            self.name,
        )
        return count


@asynccontextmanager
async def monitoring(cluster: PostgresCluster, **options: Any) -> AsyncIterator[HostMonitor]:
    """Provide a monitor that knows all hosts of a cluster."""
    options = {"poll_interval": 0.4, "connect_timeout": 1.0, **options}
    async with HostMonitor(cluster.hosts, port=cluster.port, user="postgres", **options) as monitor:
        await until(lambda: len(monitor.status.replicas()) == len(cluster.standbys) and monitor.master() is not None)
        yield monitor


@asynccontextmanager
async def following(engines: Engines, handler: FollowHandler) -> AsyncIterator[DBConnect]:
    """Provide a `DBConnect` that follows the hosts of a cluster."""
    async with DBConnect(engines, before_create_session_handler=handler) as db:
        yield db


@asynccontextmanager
async def following_by_name(handler: FollowHandler, driver: str = "asyncpg") -> AsyncIterator[DBConnect]:
    """Provide a `DBConnect` that follows hosts whose names hold ports, with two connections to each host."""

    def create_engine(host: str) -> AsyncEngine:
        address = HostAddress.parse(host)
        url = URL.create(f"postgresql+{driver}", "postgres", host=address.host, port=address.port, database="postgres")
        return create_async_engine(url, pool_size=2, max_overflow=0)

    async with DBConnect(create_engine, before_create_session_handler=handler) as db:
        yield db


async def write_number(db: DBConnect, number: int) -> None:
    """Write a number in a unit of work of its own."""
    async with new_db_ctx():
        await (await db_session(db)).execute(insert(NUMBERS).values(number=number))


async def numbers_on(node: PostgresNode) -> list[int]:
    """Return the numbers that a node has, in their order."""
    return [row[0] for row in await node.execute("SELECT number FROM number ORDER BY number")]


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 30.0) -> None:
    """Wait until `condition` holds."""
    pause = 0.005
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if result is True or (not isinstance(result, bool) and await result):
                return
            await asyncio.sleep(pause)
            # Many conditions open a connection, which keeps a server busy for as long as this waits.
            pause = min(2 * pause, 0.1)


async def server_of(db: DBConnect) -> str:
    """Return the address of the server to which a new session is led."""
    async with new_non_ctx_session(db) as session:
        address: str = await session.scalar(SERVER)
        return address
