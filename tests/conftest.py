from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.support.database import Database, eventually, fresh_database

from ctxdb_core import DBConnect, is_context_initiated
from ctxdb_demo.embedded_postgres import EmbeddedPostgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    """The one server of the whole run; each test has a database of its own on it."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture(params=["asyncpg"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
async def database(database_kind: str, postgres_server: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Database]:
    """A fresh database; the test fails if it leaves a connection, transaction, query, context or task behind."""
    tasks = asyncio.all_tasks()
    async with fresh_database(database_kind, postgres_server, tmp_path) as database:
        yield database
        await database.assert_quiet()
    assert not is_context_initiated()

    def left() -> set[asyncio.Task[object]]:
        return asyncio.all_tasks() - tasks - {asyncio.current_task()}

    # A driver may still be closing a socket.
    await eventually(lambda: not left(), lambda: f"tasks are left: {left()}")


@pytest.fixture
async def db(database: Database) -> AsyncIterator[DBConnect]:
    async with database.connect() as db:
        yield db
