from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from ctxdb_pgstatus.testing import PostgresCluster


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[PostgresCluster]:
    """A primary and two standbys, which all tests of a worker share; a test takes `cluster`."""
    cluster = PostgresCluster(standbys=2)
    asyncio.run(cluster.start())
    yield cluster
    asyncio.run(cluster.stop())


@pytest.fixture
async def cluster(shared_cluster: PostgresCluster) -> AsyncIterator[PostgresCluster]:
    """The shared cluster, put back afterwards: the first node is the primary, the others stream from it.

    What a test writes there may be found by the next one.
    """
    yield shared_cluster
    await shared_cluster.restore()
