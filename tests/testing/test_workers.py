"""Databases of the workers of pytest-xdist."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.database import Database

from ctxdb_core.testing import create_database, drop_database, worker_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql+asyncpg://app@db.example/shop?ssl=require",
            "postgresql+asyncpg://app@db.example/shop_gw1?ssl=require",
        ),
        ("sqlite+aiosqlite:////var/data/shop.db", "sqlite+aiosqlite:////var/data/shop_gw1.db"),
        ("sqlite+aiosqlite:///shop", "sqlite+aiosqlite:///shop_gw1"),
    ],
)
def test_a_workers_database_has_its_name(url: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(worker_url(url, "gw1")) == expected
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    assert str(worker_url(url)) == expected


def test_a_run_without_workers_has_a_database_of_its_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert worker_url("postgresql+asyncpg://app@db.example/shop").database == "shop_main"


async def test_a_database_is_created_anew_and_dropped(database: Database, postgresql: None) -> None:
    url = worker_url(database.url, "gw1")
    for _ in range(2):
        await create_database(url)
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE item (name TEXT)"))
        await engine.dispose()
    for _ in range(2):
        await drop_database(url)
    assert await database.query(f"SELECT 1 FROM pg_database WHERE datname = '{database.name}_gw1'") == []


async def test_a_database_can_be_the_copy_of_a_template(database: Database, postgresql: None) -> None:
    template, copy = worker_url(database.url, "template"), worker_url(database.url, "copy")
    await create_database(template)
    engine = create_async_engine(template)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE item (name TEXT)"))
    await engine.dispose()
    await create_database(copy, template.database)
    engine = create_async_engine(copy)
    async with engine.begin() as connection:
        assert (await connection.execute(text("SELECT * FROM item"))).all() == []
    await engine.dispose()
    await drop_database(copy)
    await drop_database(template)


async def test_a_file_is_created_anew_and_removed(tmp_path: Path) -> None:
    url = worker_url(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", "gw1")
    for _ in range(2):
        await create_database(url)
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE item (name TEXT)"))
        await engine.dispose()
    assert [file.name for file in tmp_path.iterdir()] == ["shop_gw1.db"]
    await drop_database(url)
    assert list(tmp_path.iterdir()) == []
