"""The network with faults between a test and MariaDB."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.faulty_network import FaultyMariaDBNetwork
from tests.support.mariadb import MariaDatabase


@pytest.fixture(params=["asyncmy", "aiomysql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def network(database: MariaDatabase) -> AsyncIterator[FaultyMariaDBNetwork]:
    async with FaultyMariaDBNetwork(database.maria.host, database.maria.port) as network:
        yield network
