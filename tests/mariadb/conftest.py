from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import make_url
from tests.support.database import eventually
from tests.support.faulty_network import FaultyMariaDBNetwork
from tests.support.mariadb import WHY_NOT, EmbeddedMariaDB, MariaDatabase

from ctxdb_core import DBConnect


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[EmbeddedMariaDB]:
    """The one server of a run, or of each of its workers; each test has a database of its own on it."""
    if WHY_NOT:
        pytest.skip(f"these are not installed: {WHY_NOT}")
    with EmbeddedMariaDB() as server:
        yield server


@pytest.fixture(params=["asyncmy", "aiomysql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def database(database_kind: str, mariadb_server: EmbeddedMariaDB) -> AsyncIterator[MariaDatabase]:
    """A database with empty tables; the test fails if it leaves a connection, transaction, query or task behind."""
    pytest.importorskip(database_kind)
    tasks = asyncio.all_tasks()
    database = MariaDatabase(mariadb_server, database_kind, "test_items")
    try:
        yield database
        await database.assert_quiet()
    finally:
        database.close()

    def left() -> set[asyncio.Task[object]]:
        return asyncio.all_tasks() - tasks - {asyncio.current_task()}

    await eventually(lambda: not left(), lambda: f"tasks are left: {left()}")


@pytest.fixture
async def db(database: MariaDatabase) -> AsyncIterator[DBConnect]:
    async with database.connect() as db:
        yield db
        # Closing it would hide that a connection is still in use.
        await database.assert_quiet()


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
