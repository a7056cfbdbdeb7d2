from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import make_url
from tests.support.faulty_network import FaultyMariaDBNetwork
from tests.support.mariadb import MariaDatabase

from ctxdb_core import DBConnect


@pytest.fixture(params=["asyncmy", "aiomysql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def network(database: MariaDatabase) -> AsyncIterator[FaultyMariaDBNetwork]:
    async with FaultyMariaDBNetwork(database.maria.host, database.maria.port) as network:
        yield network


@pytest.fixture
async def far(database: MariaDatabase, network: FaultyMariaDBNetwork) -> AsyncIterator[DBConnect]:
    """The database, on the other side of the network."""
    near = database.url
    database.url = make_url(near).set(port=network.port).render_as_string(hide_password=False)
    async with database.connect() as far:
        yield far
        await database.assert_quiet()
    database.url = near
