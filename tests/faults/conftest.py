"""The network with faults between a test and PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.database import Database
from tests.support.faulty_network import FaultyNetwork


@pytest.fixture(params=["asyncpg", "psycopg"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def network(database: Database) -> AsyncIterator[FaultyNetwork]:
    assert database.server is not None
    async with FaultyNetwork(database.server.host, database.server.port) as network:
        yield network
