from __future__ import annotations

import pytest
from tests.support.database import Database


@pytest.fixture(params=["asyncpg", "psycopg", "sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def postgresql(database: Database) -> None:
    if not database.is_postgresql:
        pytest.skip("PostgreSQL's own behaviour")
