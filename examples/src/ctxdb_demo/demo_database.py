"""The database that the demo runs on: the embedded PostgreSQL, SQLite, or the user's own; and a look into it."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from sqlalchemy import URL, Connection, func, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_demo.cleanup import see_through
from ctxdb_demo.database import create_engine
from ctxdb_demo.domain import Account, AuditEntry, Base, Transfer
from ctxdb_demo.errors import DemoError
from ctxdb_demo.progress import Progress
from ctxdb_pgstatus.testing import EmbeddedPostgres, EmbeddedPostgresError, postgres_is_available

CONNECT_TIMEOUT_SECONDS = 10
DROP_TIMEOUT_SECONDS = 10

TRANSFERS, AUDIT = "transfers", "audit"

Contents: TypeAlias = Mapping[str, int]
"""What is in the database: each owner's balance, and how many transfers and audit entries there are."""

_ASYNC_DRIVERS = {"postgresql": ("asyncpg", "psycopg"), "sqlite": ("aiosqlite",)}
_SYNC_DRIVERS = {"postgresql": ("", "psycopg2", "psycopg2cffi", "pg8000"), "sqlite": ("", "pysqlite")}


@dataclass(frozen=True)
class DemoDatabase:
    """A database with the demo's tables."""

    url: str
    title: str
    observer: AsyncEngine
    """An engine of the demo's own: what the application has not committed is not visible through it."""

    async def contents(self) -> Contents:
        """Return what is in the database right now."""
        async with self.observer.connect() as connection:
            accounts = await connection.execute(select(Account.owner, Account.balance).order_by(Account.owner))
            contents = {account.owner: account.balance for account in accounts}
            for name, table in ((TRANSFERS, Transfer), (AUDIT, AuditEntry)):
                contents[name] = await connection.scalar(select(func.count()).select_from(table)) or 0
        return contents


@asynccontextmanager
async def open_database(url: str | None, progress: Progress) -> AsyncIterator[DemoDatabase]:
    """Make a database ready, with empty tables of the demo's, for the length of a block; nothing of it stays.

    Args:
        url: the user's database; without it, an embedded PostgreSQL, or SQLite where there is none for the platform.
        progress: where to say what is going on.

    Raises:
        DemoError: it cannot be used.
    """
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(_find_place(url, progress))
        rendered = place.url.render_as_string(hide_password=False)
        observer = _create_observer(rendered, place.url)
        stack.push_async_callback(_dispose, observer)
        with progress.step(f"Connecting to {_name(place.url)} ..."):
            version = await _connect(observer, place.url)
        await stack.enter_async_context(_tables(observer, place))
        yield DemoDatabase(rendered, f"{version}{place.remark}", observer)


@dataclass(frozen=True)
class _Place:
    """Where a database is to be found, or to be made."""

    url: URL
    thrown_away: bool
    """Whether all of it goes when the demo ends; else the demo's tables do."""
    remark: str = ""


@asynccontextmanager
async def _find_place(url: str | None, progress: Progress) -> AsyncIterator[_Place]:
    if url is not None:
        parsed = parse_url(url)
        if parsed.get_backend_name() != "sqlite":
            yield _Place(parsed, thrown_away=False)
        elif parsed.database in (None, "", ":memory:"):
            # A database in memory is one connection; the demo is about several.
            with _temporary_file() as path:
                yield _Place(parsed.set(database=str(path)), thrown_away=True)
        else:
            with _file(Path(parsed.database or "")) as is_new:
                yield _Place(parsed, thrown_away=is_new)
    elif postgres_is_available():
        async with _embedded_postgres(progress) as embedded_url:
            yield _Place(make_url(embedded_url), thrown_away=True, remark=" (embedded)")
    else:
        progress.say("There is no embedded PostgreSQL for this platform: the demo runs on SQLite instead.")
        with _temporary_file() as path:
            remark = ", as there is no embedded PostgreSQL for this platform"
            yield _Place(URL.create("sqlite+aiosqlite", database=str(path)), thrown_away=True, remark=remark)


def parse_url(url: str) -> URL:
    """Return a user's database URL with an asyncio driver in it.

    Raises:
        DemoError: it is no URL, or not one of a database that the demo knows. The message does not repeat it: it may
            hold a password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise DemoError(
            "--database-url is not a database URL: it looks like postgresql://user:password@host:5432/database, or "
            "sqlite:///file.db."
        ) from None
    backend, _, driver = parsed.drivername.partition("+")
    backend = {"postgres": "postgresql"}.get(backend, backend)
    if backend not in _ASYNC_DRIVERS:
        raise DemoError(
            "--database-url names a database that the demo does not know: it runs on PostgreSQL and SQLite."
        )
    drivers = _ASYNC_DRIVERS[backend]
    if driver in _SYNC_DRIVERS[backend]:
        driver = drivers[0]
    elif driver not in drivers:
        raise DemoError(f"--database-url names a driver that the demo does not know: use {backend}+{drivers[0]}://.")
    parsed = parsed.set(drivername=f"{backend}+{driver}")
    if driver == "asyncpg" and "sslmode" in parsed.query:
        # asyncpg's name for libpq's parameter.
        mode = parsed.query["sslmode"]
        parsed = parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
    return parsed


@asynccontextmanager
async def _embedded_postgres(progress: Progress) -> AsyncIterator[str]:
    # A password, as other users of this machine can reach the port, too.
    server = EmbeddedPostgres(password=secrets.token_hex(16))
    starting = asyncio.ensure_future(asyncio.to_thread(server.start))
    try:
        with progress.step("Starting PostgreSQL ..."):
            try:
                await asyncio.shield(starting)
            except EmbeddedPostgresError as exc:
                raise DemoError(f"{exc} Pass a --database-url, or --database-url sqlite:// for SQLite.") from exc
        yield server.url()
    finally:
        with progress.step("Stopping PostgreSQL ..."):
            await see_through(_stop(server, starting))


async def _stop(server: EmbeddedPostgres, starting: asyncio.Future[None]) -> None:
    # A start that is under way ends by this; one that had not even begun then is ended by the second.
    await asyncio.to_thread(server.stop)
    await asyncio.wait([starting])
    starting.exception()
    await asyncio.to_thread(server.stop)


@contextmanager
def _temporary_file() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="ctxdb-demo-"))
    try:
        yield directory / "demo.db"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _file(path: Path) -> Iterator[bool]:
    """Yield whether there is no such file yet; then it goes again at the end of the block."""
    is_new = not path.exists()
    try:
        yield is_new
    finally:
        if is_new:
            path.unlink(missing_ok=True)


def _create_observer(rendered: str, url: URL) -> AsyncEngine:
    try:
        return create_engine(rendered)
    except ImportError:
        driver = url.get_driver_name()
        default = _ASYNC_DRIVERS[url.get_backend_name()][0]
        raise DemoError(
            f"The driver {driver} is not installed: install it, or use {url.get_backend_name()}+{default}://."
        ) from None


async def _connect(engine: AsyncEngine, url: URL) -> str:
    """Return what the database is, with its version."""
    sqlite = url.get_backend_name() == "sqlite"
    try:
        if sqlite:
            # Fails here and not in the driver's thread, which would outlast the event loop with the error's remains.
            sqlite3.connect(url.database or "", uri=bool(url.query.get("uri"))).close()
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS), engine.connect() as connection:
            version = await connection.scalar(text("SELECT sqlite_version()" if sqlite else "SHOW server_version"))
    except TimeoutError:
        raise DemoError(f"{_name(url)} did not answer within {CONNECT_TIMEOUT_SECONDS} seconds.") from None
    except Exception as exc:
        raise DemoError(f"{_name(url)} cannot be reached: {_reason(exc, url)}") from exc
    # "18.1 (Debian 18.1-1)" says more than the demo's title has room for.
    return f"{'SQLite' if sqlite else 'PostgreSQL'} {str(version).split(' ', 1)[0]}"


@asynccontextmanager
async def _tables(engine: AsyncEngine, place: _Place) -> AsyncIterator[None]:
    creating = asyncio.ensure_future(_create_tables(engine, place.url))
    try:
        # This runs to its end although it is cancelled: else nobody would know whether there are tables to drop.
        await see_through(creating)
        yield
    finally:
        if not place.thrown_away and creating.exception() is None:
            await _drop_tables(engine, place.url)


async def _create_tables(engine: AsyncEngine, url: URL) -> None:
    try:
        async with engine.begin() as connection:
            existing = await connection.run_sync(_existing_tables)
            if not existing:
                await connection.run_sync(Base.metadata.create_all, checkfirst=False)
    except Exception as exc:
        raise DemoError(f"The demo's tables cannot be created on {_name(url)}: {_reason(exc, url)}") from exc
    if existing:
        raise DemoError(
            f"{_name(url)} holds tables of the demo already: another demo is running there, or one was killed. In the "
            f"latter case, run: DROP TABLE {', '.join(existing)};"
        )


def _existing_tables(connection: Connection) -> list[str]:
    names = set(inspect(connection).get_table_names())
    return [table.name for table in reversed(Base.metadata.sorted_tables) if table.name in names]


async def _drop_tables(engine: AsyncEngine, url: URL) -> None:
    async def drop() -> None:
        async with engine.begin() as connection:
            if url.get_backend_name() == "postgresql":
                # Another program may read the tables in a transaction of its own.
                await connection.execute(text(f"SET LOCAL lock_timeout = '{DROP_TIMEOUT_SECONDS}s'"))
            await connection.run_sync(Base.metadata.drop_all)

    try:
        await see_through(drop())
    except Exception as exc:
        names = ", ".join(table.name for table in reversed(Base.metadata.sorted_tables))
        raise DemoError(f"The demo's tables {names} are left on {_name(url)}: {_reason(exc, url)}") from exc


async def _dispose(engine: AsyncEngine) -> None:
    await see_through(engine.dispose())


def _name(url: URL) -> str:
    """Return what to call the database: nothing of its URL that could be secret."""
    if url.get_backend_name() == "sqlite":
        return f"SQLite ({url.database})"
    return f"PostgreSQL at {url.host or 'localhost'}:{url.port or 5432}"


def _reason(exc: Exception, url: URL) -> str:
    """Return what the driver says, in one line without the password."""
    original = getattr(exc, "orig", None) or exc
    if isinstance(original, OSError) and original.errno is not None and original.errno > 0:
        # asyncio's own text is "[Errno 111] Connect call failed ('127.0.0.1', 1)".
        return f"{os.strerror(original.errno)}."
    reason = (str(original).strip().splitlines() or [type(original).__name__])[0]
    if url.password:
        reason = reason.replace(str(url.password), "***")
    return f"{reason.rstrip('.')}."
