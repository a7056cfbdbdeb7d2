"""What a shared transaction asks of the drivers beneath SQLAlchemy: savepoints, and what a COMMIT would check."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._sqlalchemy.private import raise_translated
from ctxdb_core.testing._errors import SharedTransactionError

own_backends: set[int] = set()
"""The server processes of PostgreSQL that serve the testing tools of this process."""

app_backends: set[int] = set()
"""The server processes that serve the application in this process, on databases that `follow_backends` was given."""


class Driver:
    """The connection that is shared, seen from beneath.

    Args:
        dbapi_connection: SQLAlchemy's adapted connection.
        connection: the driver's own.
    """

    aborts_on_error = True
    """Whether a statement that fails makes all others of its transaction fail."""

    has_settings = True
    """Whether there is SET LOCAL."""

    def __init__(self, dbapi_connection: Any, connection: Any) -> None:
        self.dbapi_connection = dbapi_connection
        self.connection = connection

    @property
    def in_transaction(self) -> bool:
        """Whether the outer transaction is still there."""
        raise NotImplementedError

    @property
    def backend_pid(self) -> int | None:
        """The server process that serves the connection; ``None`` where there is no server."""
        return None

    async def begin(self) -> None:
        """Begin the outer transaction, and read what `commit` is going to need."""

    async def run(self, *statements: str) -> None:
        """Run statements that return nothing, in one round trip if that is possible."""
        raise NotImplementedError

    async def fetch(self, query: str) -> list[Any]:
        """Return the rows of a query."""
        raise NotImplementedError

    async def commit(self, savepoint: str, *before: str) -> None:
        """Release `savepoint`, unless a COMMIT would be refused now: deferred constraints are checked first.

        Args:
            savepoint: its name.
            *before: statements to be run between the check and the release.
        """
        raise NotImplementedError

    async def set_read_only(self, *, on: bool, savepoint: bool) -> None:
        """Have writes refused, or not any more; `savepoint` tells whether a savepoint has just been set."""
        raise NotImplementedError

    async def interrupt(self) -> None:
        """Stop the statement that is running."""
        raise NotImplementedError

    def forget_schema(self) -> None:
        """Forget what was read of the schema, as the schema has changed."""


class _Postgres(Driver):
    _deferred: str | None = None

    async def commit(self, savepoint: str, *before: str) -> None:
        # The constraints that are deferred by default become so again, and only those: SET CONSTRAINTS ALL DEFERRED
        # would hold the checks of INITIALLY IMMEDIATE ones back, too.
        if self._deferred is None:
            rows = await self.fetch(
                "SELECT DISTINCT quote_ident(nspname) || '.' || quote_ident(conname) FROM pg_constraint "
                "JOIN pg_namespace ON pg_namespace.oid = connamespace WHERE condeferred"
            )
            self._deferred = ", ".join(row[0] for row in rows)
        again = [f"SET CONSTRAINTS {self._deferred} DEFERRED"] if self._deferred else []
        await self.run("SET CONSTRAINTS ALL IMMEDIATE", *before, f"RELEASE SAVEPOINT {savepoint}", *again)

    async def set_read_only(self, *, on: bool, savepoint: bool) -> None:
        # The read-only mode ends with the savepoint by itself (PostgreSQL, "SET TRANSACTION").
        if on and savepoint:
            await self.run("SET TRANSACTION READ ONLY")

    def forget_schema(self) -> None:
        self._deferred = None


class _Asyncpg(_Postgres):
    @property
    def backend_pid(self) -> int | None:
        return None if self.connection.is_closed() else int(self.connection.get_server_pid())

    @property
    def in_transaction(self) -> bool:
        return not self.connection.is_closed() and bool(self.connection.is_in_transaction())

    async def run(self, *statements: str) -> None:
        try:
            await self.connection.execute("; ".join(statements))
        except Exception as exc:  # noqa: BLE001 - translated into what SQLAlchemy expects of a DBAPI
            raise_translated(self.dbapi_connection, exc)

    async def fetch(self, query: str) -> list[Any]:
        rows: list[Any] = await self.connection.fetch(query)
        return rows


class _Psycopg(_Postgres):
    @property
    def backend_pid(self) -> int | None:
        return None if self.connection.closed else int(self.connection.info.backend_pid)

    @property
    def in_transaction(self) -> bool:
        return not self.connection.closed and self.connection.info.transaction_status.name != "IDLE"

    async def run(self, *statements: str) -> None:
        # Several statements at once cannot be prepared.
        await self.connection.execute("; ".join(statements), prepare=False)

    async def fetch(self, query: str) -> list[Any]:
        cursor = await self.connection.execute(query)
        rows: list[Any] = await cursor.fetchall()
        return rows


class _Aiosqlite(Driver):
    aborts_on_error = False
    has_settings = False

    @property
    def in_transaction(self) -> bool:
        return bool(self.connection.in_transaction)

    async def begin(self) -> None:
        # The driver begins a transaction before INSERT, UPDATE and DELETE alone (sqlite3, "Transaction control"): a
        # SAVEPOINT before that would be the outermost one, whose release commits.
        if not self.in_transaction:
            await self.run("BEGIN")
        ((self._checks_foreign_keys,),) = await self.fetch("PRAGMA foreign_keys")
        self._violations = await self.fetch("PRAGMA foreign_key_check") if self._checks_foreign_keys else []

    async def run(self, *statements: str) -> None:
        for statement in statements:
            cursor = await self.connection.execute(statement)
            await cursor.close()

    async def commit(self, savepoint: str, *before: str) -> None:
        # Deferred foreign keys are checked by the release of the outermost savepoint only (SQLite, "SAVEPOINT").
        if self._checks_foreign_keys and len(await self.fetch("PRAGMA foreign_key_check")) > len(self._violations):
            raise self.dbapi_connection.dbapi.IntegrityError("FOREIGN KEY constraint failed")
        await self.run(*before, f"RELEASE SAVEPOINT {savepoint}")

    async def set_read_only(self, *, on: bool, savepoint: bool) -> None:
        await self.run(f"PRAGMA query_only = {'ON' if on else 'OFF'}")

    async def interrupt(self) -> None:
        await self.connection.interrupt()

    async def fetch(self, query: str) -> list[Any]:
        cursor = await self.connection.execute(query)
        rows = list(await cursor.fetchall())
        await cursor.close()
        return rows


_DRIVERS: dict[str, type[Driver]] = {
    "asyncpg": _Asyncpg,
    "psycopg": _Psycopg,
    "psycopg_async": _Psycopg,
    "aiosqlite": _Aiosqlite,
}


def check_driver(engine: Engine) -> None:
    """Raise an error if the driver of `engine` is not known here."""
    if engine.dialect.driver not in _DRIVERS:
        raise SharedTransactionError(
            f"The testing tools know {', '.join(_DRIVERS)}, and not {engine.dialect.driver}: use one of these."
        )


def driver_of(engine: Engine, dbapi_connection: Any) -> Driver:
    """Return the driver of a connection that `engine` has opened."""
    return _DRIVERS[engine.dialect.driver](dbapi_connection, engine.dialect.get_driver_connection(dbapi_connection))


def backend_pid_of(engine: Engine, dbapi_connection: Any) -> int | None:
    """Return the server process of a connection of `engine`; ``None`` if its driver cannot tell."""
    return driver_of(engine, dbapi_connection).backend_pid if engine.dialect.driver in _DRIVERS else None


_followed: WeakSet[DBConnect] = WeakSet()
_followed_engines: WeakSet[Engine] = WeakSet()


def follow_backends(db: DBConnect) -> None:
    """Take the connections that `db` opens from now on for those of the application in this process."""
    if db not in _followed:
        _followed.add(db)
        db.on_engine(_follow_engine)


def _follow_engine(host: str, engine: AsyncEngine) -> None:
    kind = _DRIVERS.get(engine.dialect.driver)
    if kind is None or engine.sync_engine in _followed_engines:
        return
    _followed_engines.add(engine.sync_engine)

    @event.listens_for(engine.sync_engine, "connect")
    def note_backend(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        pid = kind(dbapi_connection, record.driver_connection).backend_pid
        if pid is not None:
            app_backends.add(pid)
