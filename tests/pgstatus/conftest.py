from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.support.followers import monitoring

from ctxdb_pgstatus import HostMonitor
from ctxdb_pgstatus.testing import PostgresCluster


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[PostgresCluster]:
    """A primary and two standbys, which all tests of a worker share; a test takes `cluster`."""
    cluster = PostgresCluster(standbys=2)
    asyncio.run(cluster.start())
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture(scope="session")
def ipv6_cluster() -> Iterator[PostgresCluster]:
    """A primary on ::1 and a standby on 127.0.0.1: "localhost" may stand for either of them."""
    cluster = PostgresCluster(hosts=["::1", "127.0.0.1"])
    asyncio.run(cluster.start())
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture
async def cluster(shared_cluster: PostgresCluster) -> AsyncIterator[PostgresCluster]:
    """The shared cluster. After the test, the first node is the primary again, and the other nodes stream from it.

    Rows and tables that a test leaves there may be found by the next test.
    """
    yield shared_cluster
    await shared_cluster.restore()


@pytest.fixture
async def number_table(cluster: PostgresCluster) -> None:
    """Leave the table `number` empty on every host of the cluster."""
    # By one connection, which takes longer to make than the statements to execute. TRUNCATE would make new files, on
    # each of the nodes.
    async with cluster.primary.connect() as connection:
        await connection.execute("CREATE TABLE IF NOT EXISTS number (number integer PRIMARY KEY); DELETE FROM number")
    await cluster.wait_for_replay()


@pytest.fixture
async def monitor(cluster: PostgresCluster, number_table: None) -> AsyncIterator[HostMonitor]:
    """A monitor that knows all hosts of the cluster, whose table `number` is empty."""
    async with monitoring(cluster) as monitor:
        yield monitor
