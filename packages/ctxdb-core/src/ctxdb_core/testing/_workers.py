"""Databases for the workers of pytest-xdist: each has one of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from ctxdb_core.testing._driver import check_driver

_SQLITE_FILES = ("", "-journal", "-wal", "-shm")


def worker_url(url: str | URL, worker: str | None = None) -> URL:
    """Return `url` with the name of a worker in that of its database: ``shop`` becomes ``shop_gw0``.

    Args:
        url: the database's.
        worker: the worker's name; by default the one that this process has from pytest-xdist, else ``main``.
    """
    url = make_url(url)
    worker = worker or os.environ.get("PYTEST_XDIST_WORKER", "main")
    if url.get_backend_name() != "sqlite":
        return url.set(database=f"{url.database}_{worker}")
    file = Path(url.database or "")
    return url.set(database=str(file.with_name(f"{file.stem}_{worker}{file.suffix}")))


async def create_database(url: str | URL, template: str | None = None) -> None:
    """Create the database that `url` names, anew if it exists.

    Args:
        url: where it is to be; the role must be allowed to create databases.
        template: on PostgreSQL, the database that it becomes a copy of; nobody may be connected to that.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        _remove_files(url)
        return
    async with _maintenance(url) as connection:
        name = connection.dialect.identifier_preparer.quote_identifier(url.database or "")
        copied = "" if template is None else connection.dialect.identifier_preparer.quote_identifier(template)
        await connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await connection.exec_driver_sql(f"CREATE DATABASE {name}{f' TEMPLATE {copied}' if copied else ''}")


async def drop_database(url: str | URL) -> None:
    """Drop the database that `url` names, whoever is connected to it."""
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        _remove_files(url)
        return
    async with _maintenance(url) as connection:
        name = connection.dialect.identifier_preparer.quote_identifier(url.database or "")
        await connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@asynccontextmanager
async def _maintenance(url: URL) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    check_driver(engine.sync_engine)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


def _remove_files(url: URL) -> None:
    for suffix in _SQLITE_FILES:
        Path(f"{url.database}{suffix}").unlink(missing_ok=True)
