"""Databases for the workers of pytest-xdist: each has one of its own."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from ctxdb_core._databases.url import sqlite_file
from ctxdb_core._shield import run_to_completion
from ctxdb_core.errors import ArgumentValueError
from ctxdb_core.testing._driver import check_driver
from ctxdb_core.testing._errors import WrongDatabaseError
from ctxdb_core.testing._marks import MARK_OF_MADE, SQLITE_MARK, is_sqlite_made_by_tests

_NAME_BYTES = 63
"""PostgreSQL truncates a longer name (PostgreSQL, "Identifiers and Key Words"), so that two names may become one."""

_NO_WORKER = "ctxdb"
"""The ending of the name where there are no workers: no worker is called so, and hardly a database of anything else."""

_SQLITE_FILES = ("", "-journal", "-wal", "-shm")

# Since a file was made here, another file, which has no mark, may have been copied over it.
_files_made_here: set[Path] = set()


def worker_url(url: str | URL, worker: str | None = None) -> URL:
    """Return `url` with the name of a worker in that of its database: ``shop`` becomes ``shop_gw0``.

    A name that is longer than PostgreSQL's 63 bytes is shortened, and a hash keeps it apart from all others. A SQLite
    database in memory is each process's own: its URL is returned as it is.

    Args:
        url: the database's.
        worker: the worker's name; by default the one that this process has from pytest-xdist. A run without workers
            gets ``shop_ctxdb``, a database of its own as well.

    Raises:
        ValueError: `url` names no database.
    """
    url = make_url(url)
    worker = worker or os.environ.get("PYTEST_XDIST_WORKER") or _NO_WORKER
    if url.get_backend_name() == "sqlite":
        if sqlite_file(url) is None:
            return url
        file = Path(url.database or "")
        return url.set(database=str(file.with_name(f"{file.stem}_{worker}{file.suffix}")))
    if not url.database:
        raise ArgumentValueError("This URL names no database that one for a worker could be named after: add its name.")
    return url.set(database=_name_for(worker, url.database))


def _name_for(worker: str, base: str) -> str:
    name = f"{base}_{worker}"
    if len(name.encode()) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    ending = f"_{digest}_{worker}".encode()
    if len(ending) >= _NAME_BYTES:
        ending = f"_{digest}".encode()
    # A character must not be cut in two.
    return base.encode()[: _NAME_BYTES - len(ending)].decode(errors="ignore") + ending.decode()


async def create_database(url: str | URL, template: str | None = None) -> None:
    """Create the database that `url` names; a database that this function has made before is replaced.

    It knows its own by a mark that it leaves: a comment on a PostgreSQL database, the application ID of a SQLite file.
    A database without this mark is never dropped. For one in memory, there is nothing to do.

    Args:
        url: where it is to be; the role must be allowed to create databases.
        template: on PostgreSQL, the database that the new one becomes a copy of, while no client is connected to it.

    Raises:
        WrongDatabaseError: the database exists, and this function has not made it.
        ValueError: `url` names no database, or has a name that is too long; or a `template` is given for SQLite.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        if template is not None:
            raise ArgumentValueError("template= is for PostgreSQL: copy the SQLite file over the one that was made.")
        if (file := sqlite_file(url)) is not None:
            _remove_own_files(file)
            _create_file(file)
        return
    name = _name_of(url)
    async with _maintenance(url) as connection:
        await _drop_own_database(connection, name)
        await run_to_completion(_create_and_mark(connection, name, template))


async def drop_database(url: str | URL) -> None:
    """Drop the database that `url` names and `create_database` has made, although there may be connections to it.

    Does nothing if there is no such database.

    Raises:
        WrongDatabaseError: `create_database` has not made it.
        ValueError: `url` names no database, or has a name that is too long.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        if (file := sqlite_file(url)) is not None:
            _remove_own_files(file)
        return
    name = _name_of(url)
    async with _maintenance(url) as connection:
        await _drop_own_database(connection, name)


def _name_of(url: URL) -> str:
    name = url.database or ""
    if not 0 < len(name.encode()) <= _NAME_BYTES:
        raise ArgumentValueError(
            f"{name!r} is no name for a database: it needs 1 to {_NAME_BYTES} bytes, and PostgreSQL would cut off the "
            "rest. `worker_url` shortens names."
        )
    return name


async def _drop_own_database(connection: AsyncConnection, name: str) -> None:
    found = await connection.execute(
        text("SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = :name"), {"name": name}
    )
    row = found.one_or_none()
    if row is None:
        return
    if not str(row[0] or "").startswith(MARK_OF_MADE):
        raise WrongDatabaseError(
            f"The database {name!r} exists, and create_database() has not made it (its comment does not say so): it is "
            "left alone. Name another one; or, if nobody needs it, drop it yourself."
        )
    # The tests that have used the database have ended, or this run of tests takes it from them.
    await connection.exec_driver_sql(f"DROP DATABASE {_quoted(connection, name)} WITH (FORCE)")


async def _create_and_mark(connection: AsyncConnection, name: str, template: str | None) -> None:
    copied = "" if template is None else f" TEMPLATE {_quoted(connection, template)}"
    await connection.exec_driver_sql(f"CREATE DATABASE {_quoted(connection, name)}{copied}")
    # CREATE DATABASE must be alone in its transaction. No SQL injection: the mark is a constant.
    await connection.exec_driver_sql(f"COMMENT ON DATABASE {_quoted(connection, name)} IS '{MARK_OF_MADE}'")


def _quoted(connection: AsyncConnection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(name)


@asynccontextmanager
async def _maintenance(url: URL) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    check_driver(engine.sync_engine)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


def _remove_own_files(file: Path) -> None:
    # An empty file holds nothing: SQLite makes one when it connects.
    holds_something = file.exists() and file.stat().st_size > 0
    if holds_something and file.resolve() not in _files_made_here and not is_sqlite_made_by_tests(file):
        raise WrongDatabaseError(
            f"The file {str(file)!r} exists, and create_database() has not made it (its application ID does not say "
            "so): it is left alone. Name another one; or, if nobody needs it, remove it yourself."
        )
    for suffix in _SQLITE_FILES:
        file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)
    _files_made_here.discard(file.resolve())


def _create_file(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA application_id = {SQLITE_MARK}")
    _files_made_here.add(file.resolve())
