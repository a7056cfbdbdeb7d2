"""Databases for the tests, and what must hold on them after each."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from ctxdb_core import DBConnect, db_session
from ctxdb_pgstatus.testing import EmbeddedPostgres

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
    in_use: set[ConnectionPoolEntry] = field(default_factory=set)

    @property
    def is_postgresql(self) -> bool:
        return self.server is not None

    @property
    def checked_out(self) -> int:
        """How many connections are in use right now, those of engines that were disposed of included."""
        return len(self.in_use)

    def connect(self, **options: Any) -> DBConnect:
        """Return a `DBConnect` with a pool of five, whose connections are counted."""
        return DBConnect(lambda host: self.watch_new(**options), host="127.0.0.1")

    def watch_new(self, **options: Any) -> AsyncEngine:
        """Return a new engine, with a pool of five, whose connections are counted."""
        if self.is_postgresql:
            options = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 30, **options}
        engine = create_async_engine(self.url, **options)
        if self.is_postgresql and "connect_args" not in options:
            _tell_what_is_known(engine)
        return self.watch(engine)

    def watch(self, engine: AsyncEngine) -> AsyncEngine:
        def connected(*args: object) -> None:
            self.connections += 1
            self.prepare_connection(args[0])

        def checked_out(connection: object, record: ConnectionPoolEntry, *args: object) -> None:
            self.checkouts += 1
            self.in_use.add(record)

        def checked_in(connection: object, record: ConnectionPoolEntry) -> None:
            self.in_use.discard(record)

        event.listen(engine.sync_engine, "connect", connected)
        event.listen(engine.sync_engine, "checkout", checked_out)
        event.listen(engine.sync_engine, "checkin", checked_in)
        self.engines.append(engine)
        return engine

    def prepare_connection(self, connection: Any) -> None:
        """Set up a driver's connection that has just been made."""
        if not self.is_postgresql:
            connection.cursor().execute("PRAGMA foreign_keys = ON")
            # A commit does not wait for the disk, which the file need not reach.
            connection.cursor().execute("PRAGMA synchronous = OFF")

    async def names(self, table: str = "item", column: str = "name") -> list[str]:
        """Return what another connection sees in `table` right now."""
        rows = await self.query(f"SELECT {column} FROM {table} ORDER BY {column}")
        return [row[0] for row in rows]

    async def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement on another connection, in a transaction of its own."""
        if self.server is not None:
            result = _observe(self.server, self.name).execute(sql)
            return result.fetchall() if result.description else []
        with closing(sqlite3.connect(make_url(self.url).database or "")) as file:
            rows = file.execute(sql).fetchall()
            file.commit()
            return rows

    def backends(self, condition: str) -> list[str]:
        """Return the last queries of this database's server processes that fulfil `condition`."""
        return [row[0] for row in self._select_backends("query", condition)]

    def backend_pids(self, condition: str) -> list[int]:
        """Return this database's server processes that fulfil `condition`."""
        return [row[0] for row in self._select_backends("pid", condition)]

    def terminate_backends(self, condition: str = "true") -> int:
        """Kill this database's server processes that fulfil `condition`, and return how many these were."""
        return len(self._select_backends("pg_terminate_backend(pid, 5000)", condition))

    def _select_backends(self, column: str, condition: str) -> list[tuple[Any, ...]]:
        assert self.server is not None
        result = _observe(self.server, "postgres").execute(
            f"SELECT {column} FROM pg_stat_activity WHERE datname = %s AND application_name <> %s AND ({condition})",
            [self.name, _OBSERVER],
        )
        return result.fetchall()

    @contextmanager
    def held_commits(self) -> Iterator[None]:
        """Let each COMMIT that follows an INSERT into `item` wait on the server until the block ends."""
        assert self.server is not None
        observer = _observe(self.server, self.name)
        observer.execute("SELECT pg_advisory_lock(1)")
        observer.execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END $$; "
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slow()"
        )
        try:
            yield
        finally:
            # The connection counts its locks. One that another test has left would hold every commit, so all of them
            # are released.
            observer.execute("SELECT pg_advisory_unlock_all()")

    async def commit_is_held(self) -> None:
        """Wait until a COMMIT waits for the end of `held_commits`."""
        await eventually(lambda: bool(self.backends("query ~ '^COMMIT' AND wait_event = 'advisory'")), "no commit")

    @property
    def _held(self) -> int:
        pools = [engine.pool for engine in self.engines]
        return sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))

    async def assert_quiet(self) -> None:
        """Assert that nothing of the test is left on the database."""
        await eventually(lambda: self.checked_out == 0, lambda: f"{self.checked_out} connections are still checked out")
        await eventually(lambda: self._held == 0, lambda: f"the pools count {self._held} connections as checked out")
        if self.is_postgresql:
            await eventually(
                lambda: not self.backends("state <> 'idle'"),
                lambda: f"still at work on the server: {self.backends('state <> $$idle$$')}",
            )


# What the dialect of an engine asked the server with its first connection, by driver and server.
_known: dict[tuple[str, str | None, int | None], dict[str, Any]] = {}


def _tell_what_is_known(engine: AsyncEngine) -> None:
    """Spare a new engine the questions about the server's version and defaults that an earlier engine has asked.

    Most tests make an engine, for which these questions take longer than its connection does.
    """
    dialect = engine.sync_engine.dialect
    server = (dialect.driver, engine.url.host, engine.url.port)
    ask = dialect.initialize
    # Before any question: a test may interrupt the first ones, and what these have found counts as well.
    before = dict(vars(dialect))

    def initialize(connection: Connection) -> None:
        if server not in _known:
            ask(connection)
            _known[server] = {
                name: value
                for name, value in vars(dialect).items()
                if isinstance(value, (bool, str, tuple)) and value != before.get(name)
            }
        vars(dialect).update(_known[server])

    vars(dialect)["initialize"] = initialize


async def insert(db: DBConnect, name: str) -> AsyncSession:
    """Write a row through the current unit of work's session, which is returned."""
    session = await db_session(db)
    await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})
    return session


async def insert_row_that_fails_at_commit(db: DBConnect) -> None:
    """Write a row that the database refuses at COMMIT."""
    session = await db_session(db)
    await session.execute(text("INSERT INTO child VALUES ('nobody')"))


async def eventually(condition: Callable[[], bool], message: str | Callable[[], str], seconds: float = 20.0) -> None:
    """Wait until `condition` holds, which other processes, or the next steps of other tasks, bring about."""
    deadline = asyncio.get_running_loop().time() + seconds
    pause = 0.001
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(message if isinstance(message, str) else message())
        await asyncio.sleep(pause)
        # What takes long is not asked for all the time: many conditions are queries, and other tests run meanwhile.
        pause = min(2 * pause, 0.05)


@asynccontextmanager
async def fresh_database(
    kind: str, server: EmbeddedPostgres, make_directory: Callable[[], Path]
) -> AsyncIterator[Database]:
    """Provide a database with the tests' tables, and nothing in them."""
    if kind == "sqlite":
        path = make_directory() / "test.db"
        with closing(sqlite3.connect(path)) as file:
            file.executescript(f"PRAGMA synchronous = OFF; BEGIN; {'; '.join(TABLES)}; COMMIT")
        yield Database(f"sqlite+aiosqlite:///{path}", "test.db", None)
        return
    name = _clean.pop() if _clean else None
    if name is None:
        name = f"test_{uuid4().hex[:12]}"
        _observe(server, "postgres").execute(f'CREATE DATABASE "{name}"')
        await _create_tables(Database(server.url(kind, name), name, server))
    try:
        yield Database(server.url(kind, name), name, server)
    except BaseException:
        _observe(server, name).close()
        _observe(server, "postgres").execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        raise
    _observe(server, name).execute("SELECT pg_temp.clean()")
    _clean.append(name)


# Empty databases to be used again: creating one takes longer than most tests.
_clean: list[str] = []

# The suite's own connections, by database: opening one takes longer than its queries do.
_observers: dict[str, psycopg.Connection[tuple[Any, ...]]] = {}

_OBSERVER = "tests"

# A function keeps the plans of its statements, which take longer to make than to execute.
# A connection of a test may be left: psycopg closes one that a cancelled task was making when its garbage is collected.
# The next test on this database would count it as its own.
# On tables as small as these, TRUNCATE takes ten times as long as DELETE.
_CLEAN = """
CREATE FUNCTION pg_temp.clean() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid();
    DELETE FROM item;
    DELETE FROM child;
    DELETE FROM parent;
    DROP FUNCTION IF EXISTS slow CASCADE;
END $$
"""


def _observe(server: EmbeddedPostgres, database: str) -> psycopg.Connection[tuple[Any, ...]]:
    observer = _observers.get(database)
    if observer is None or observer.closed:
        dsn = server.url("psycopg", database).replace("+psycopg", "")
        # Without the notices about a function that is not there to be dropped.
        options = "-c client_min_messages=warning"
        observer = psycopg.connect(dsn, autocommit=True, application_name=_OBSERVER, options=options)
        observer.execute(_CLEAN)
        _observers[database] = observer
    return observer


def close_observers() -> None:
    """Close the suite's own connections, before the server goes."""
    while _observers:
        _observers.popitem()[1].close()


async def _create_tables(database: Database) -> None:
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        for statement in TABLES:
            await connection.execute(text(statement))
    await engine.dispose()
