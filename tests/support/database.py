"""Databases for the tests, and what must hold on them after each."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from ctxdb_core import DBConnect, db_session
from ctxdb_demo.embedded_postgres import EmbeddedPostgres

TABLES = (
    "CREATE TABLE item (name VARCHAR(40) PRIMARY KEY)",
    "CREATE TABLE parent (name VARCHAR(40) PRIMARY KEY)",
    # Checked at COMMIT, on both databases.
    "CREATE TABLE child (parent VARCHAR(40) REFERENCES parent (name) DEFERRABLE INITIALLY DEFERRED)",
)


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    name: Mapped[str] = mapped_column(primary_key=True)


@dataclass
class Database:
    """A fresh database with the tests' tables, watched through every connection that is made to it."""

    url: str
    name: str
    server: EmbeddedPostgres | None
    checkouts: int = 0
    connections: int = 0
    engines: list[AsyncEngine] = field(default_factory=list)

    @property
    def is_postgresql(self) -> bool:
        return self.server is not None

    @property
    def checked_out(self) -> int:
        """How many connections are in use right now."""
        pools = [engine.pool for engine in self.engines]
        return sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))

    def connect(self, **options: Any) -> DBConnect:
        """Return a `DBConnect` with a pool of five, whose connections are counted."""
        return DBConnect(lambda host: self.watch_new(**options), host="127.0.0.1")

    def watch_new(self, **options: Any) -> AsyncEngine:
        """Return a new engine, with a pool of five, whose connections are counted."""
        if self.is_postgresql:
            options = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 10, **options}
        return self.watch(create_async_engine(self.url, **options))

    def watch(self, engine: AsyncEngine) -> AsyncEngine:
        def connected(*args: object) -> None:
            self.connections += 1
            if not self.is_postgresql:
                args[0].cursor().execute("PRAGMA foreign_keys = ON")  # type: ignore[attr-defined]

        def checked_out(*args: object) -> None:
            self.checkouts += 1

        event.listen(engine.sync_engine, "connect", connected)
        event.listen(engine.sync_engine, "checkout", checked_out)
        self.engines.append(engine)
        return engine

    async def names(self, table: str = "item", column: str = "name") -> list[str]:
        """Return what another connection sees in `table` right now."""
        rows = await self.query(f"SELECT {column} FROM {table} ORDER BY {column}")
        return [row[0] for row in rows]

    async def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, which leaves no trace."""
        if self.server is not None:
            with psycopg.connect(_dsn(self.server, self.name), autocommit=True) as connection:
                result = connection.execute(sql)
                return result.fetchall() if result.description else []
        with closing(sqlite3.connect(make_url(self.url).database or "")) as file:
            rows = file.execute(sql).fetchall()
            file.commit()
            return rows

    def backends(self, condition: str) -> list[str]:
        """Return the last queries of this database's server processes that fulfil `condition`."""
        assert self.server is not None
        with psycopg.connect(_dsn(self.server, "postgres"), autocommit=True) as connection:
            rows = connection.execute(
                f"SELECT query FROM pg_stat_activity WHERE datname = %s AND ({condition})",
                [self.name],
            ).fetchall()
        return [row[0] for row in rows]

    def terminate_backends(self, condition: str = "true") -> int:
        """Kill this database's server processes that fulfil `condition`, and return how many these were."""
        assert self.server is not None
        with psycopg.connect(_dsn(self.server, "postgres"), autocommit=True) as connection:
            return connection.execute(
                f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s AND ({condition})",
                [self.name],
            ).rowcount

    async def assert_quiet(self) -> None:
        """Assert that nothing of the test is left on the database."""
        await eventually(lambda: self.checked_out == 0, f"{self.checked_out} connections are still checked out")
        if self.is_postgresql:
            await eventually(
                lambda: not self.backends("state <> 'idle'"),
                lambda: f"still at work on the server: {self.backends('state <> $$idle$$')}",
            )


async def insert(db: DBConnect, name: str) -> AsyncSession:
    """Write a row through the current unit of work's session, which is returned."""
    session = await db_session(db)
    await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})
    return session


async def insert_orphan(db: DBConnect) -> None:
    """Write a row that the database refuses at COMMIT."""
    session = await db_session(db)
    await session.execute(text("INSERT INTO child VALUES ('nobody')"))


async def eventually(condition: Callable[[], bool], message: str | Callable[[], str], seconds: float = 5.0) -> None:
    """Wait until `condition` holds: for what other processes, or other tasks' next steps, have to do."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(message if isinstance(message, str) else message())
        await asyncio.sleep(0.005)


@asynccontextmanager
async def fresh_database(kind: str, server: EmbeddedPostgres, directory: Path) -> AsyncIterator[Database]:
    """Provide a database with the tests' tables, and nothing in them."""
    if kind == "sqlite":
        database = Database(f"sqlite+aiosqlite:///{directory / 'test.db'}", "test.db", None)
        await _create_tables(database)
        yield database
        return
    with psycopg.connect(_dsn(server, "postgres"), autocommit=True) as admin:
        name = _clean.pop() if _clean else None
        if name is None:
            name = f"test_{uuid4().hex[:12]}"
            admin.execute(f'CREATE DATABASE "{name}"')
            await _create_tables(Database(server.url(kind, name), name, server))
        try:
            yield Database(server.url(kind, name), name, server)
        except BaseException:
            admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
            raise
    with psycopg.connect(_dsn(server, name), autocommit=True) as connection:
        connection.execute("TRUNCATE item, parent, child; DROP FUNCTION IF EXISTS slow CASCADE")
    _clean.append(name)


# Databases as they were created: making one takes longer than most tests.
_clean: list[str] = []


def _dsn(server: EmbeddedPostgres, database: str) -> str:
    return server.url("psycopg", database).replace("+psycopg", "")


async def _create_tables(database: Database) -> None:
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        for statement in TABLES:
            await connection.execute(text(statement))
    await engine.dispose()
