"""Databases of the workers of pytest-xdist."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.database import Database

from ctxdb_core.errors import ArgumentValueError
from ctxdb_core.testing import WrongDatabaseError, create_database, drop_database, worker_url


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
    assert worker_url("postgresql+asyncpg://app@db.example/shop").database == "shop_ctxdb"


LONG = "a_database_whose_name_takes_all_of_the_bytes_that_it_may_have__"


@pytest.mark.parametrize("base", [LONG, LONG[:-1], LONG[:-4], "é" * 31])
def test_names_of_workers_differ_within_the_bytes_that_postgresql_looks_at(base: str) -> None:
    url = f"postgresql+asyncpg://app@db.example/{base}"
    names = [worker_url(url, worker).database or "" for worker in ("gw1", "gw2", "gw11", "w" * 80)]
    assert len({name.encode()[:63] for name in (*names, base)}) == 5
    assert all(len(name.encode()) <= 63 for name in names)
    assert names[0].endswith("_gw1")


def test_long_names_that_differ_at_their_ends_have_workers_that_differ() -> None:
    urls = [worker_url(f"postgresql+asyncpg://app@db.example/{LONG[:-1]}{end}", "gw1") for end in "ab"]
    assert urls[0] != urls[1]


def test_a_url_without_a_database_has_none_for_a_worker() -> None:
    with pytest.raises(ArgumentValueError, match="names no database"):
        worker_url("postgresql+asyncpg://app@db.example/", "gw1")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite+aiosqlite://",
        "sqlite+aiosqlite:///:memory:",
        "sqlite+aiosqlite:///file::memory:?uri=true",
        "sqlite+aiosqlite:///file:shop?mode=memory&cache=shared&uri=true",
    ],
)
async def test_a_database_in_memory_is_each_workers_own(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert worker_url(url, "gw1") == make_url(url)
    await create_database(url)
    await drop_database(url)
    assert list(tmp_path.iterdir()) == []


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


@pytest.fixture
async def precious(database: Database, postgresql: None) -> AsyncIterator[Database]:
    """A database that no tool has made, under a name that a worker's would have."""
    name = f"{database.name}_gw1"
    await database.query(f"CREATE DATABASE {name}")
    yield database
    await database.query(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("act", [create_database, drop_database])
@pytest.mark.parametrize("comment", [None, "ctxdb: test database", "of the shop"])
async def test_a_database_that_create_database_has_not_made_is_left_alone(
    precious: Database, act: Callable[[URL], Awaitable[None]], comment: str | None
) -> None:
    url = worker_url(precious.url, "gw1")
    if comment is not None:
        await precious.query(f"COMMENT ON DATABASE {url.database} IS '{comment}'")
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE item AS SELECT 1"))
    with pytest.raises(WrongDatabaseError, match="has not made it"):
        await act(url)
    async with engine.begin() as connection:
        assert (await connection.execute(text("SELECT * FROM item"))).all() == [(1,)]
    await engine.dispose()


async def test_the_copy_of_a_database_is_known_by_its_mark_and_its_template_is_not(
    precious: Database,
) -> None:
    copy = worker_url(precious.url, "gw2")
    for _ in range(2):
        await create_database(copy, f"{precious.name}_gw1")
    await drop_database(copy)
    with pytest.raises(WrongDatabaseError):
        await drop_database(worker_url(precious.url, "gw1"))


@pytest.mark.parametrize("act", [create_database, drop_database])
async def test_a_name_that_postgresql_would_cut_off_is_refused(
    act: Callable[[URL], Awaitable[None]], database: Database, postgresql: None
) -> None:
    with pytest.raises(ArgumentValueError, match="63 bytes"):
        await act(make_url(database.url).set(database=LONG + "x"))


@pytest.mark.parametrize("act", [create_database, drop_database])
@pytest.mark.parametrize("content", ["sqlite", "text"])
async def test_a_file_that_create_database_has_not_made_is_left_alone(
    tmp_path: Path, act: Callable[[URL], Awaitable[None]], content: str
) -> None:
    url = worker_url(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", "gw1")
    file = tmp_path / "shop_gw1.db"
    if content == "text":
        file.write_text("precious")
    else:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE item (name TEXT)")
    before = file.read_bytes()
    with pytest.raises(WrongDatabaseError, match="has not made it"):
        await act(url)
    assert file.read_bytes() == before


async def test_a_file_that_was_copied_over_the_database_that_was_made_is_removed(tmp_path: Path) -> None:
    url = worker_url(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", "gw1")
    await create_database(url)
    with closing(sqlite3.connect(tmp_path / "template.db")) as connection:
        connection.execute("CREATE TABLE item (name TEXT)")
    shutil.copy(tmp_path / "template.db", tmp_path / "shop_gw1.db")
    await drop_database(url)
    assert [file.name for file in tmp_path.iterdir()] == ["template.db"]


async def test_a_file_that_another_process_has_made_is_known_by_its_mark(tmp_path: Path) -> None:
    url = worker_url(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", "gw1")
    script = "import asyncio, sys; from ctxdb_core.testing import create_database as c; asyncio.run(c(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(url)], check=True)
    await create_database(url)
    await drop_database(url)
    assert list(tmp_path.iterdir()) == []


async def test_a_file_named_by_a_uri_is_created_and_removed(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///file://{tmp_path}/the%20shop.db?uri=true"
    await create_database(url)
    assert [file.name for file in tmp_path.iterdir()] == ["the shop.db"]
    await drop_database(url)
    assert list(tmp_path.iterdir()) == []


async def test_a_template_is_refused_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match="template= is for PostgreSQL"):
        await create_database(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", "template")
