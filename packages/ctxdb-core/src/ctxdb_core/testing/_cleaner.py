"""`TableCleaner`: undoes what a test has really committed, in the tables that it has changed."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncConnection

from ctxdb_core._databases.connect import DBConnect, check_database
from ctxdb_core._databases.url import sqlite_file
from ctxdb_core.testing._driver import check_driver, driver_of, follow_backends
from ctxdb_core.testing._errors import CleanUpError
from ctxdb_core.testing._postgres_tables import PostgresTables
from ctxdb_core.testing._sqlite_tables import SQLiteTables
from ctxdb_core.testing._tables import Tables

_KINDS: dict[str, type[Tables]] = {"postgresql": PostgresTables, "sqlite": SQLiteTables}


class TableCleaner:
    """Empties the tables that tests have changed, and puts the rows back that were there before; a context manager.

    It finds these tables by itself, also if an application in another process, a trigger or a cascading delete has
    changed them. All other tables cost next to nothing.

    It refuses a database that may not be one of tests. One of these has to mark the database as one of tests:

    - its name, of which "test" begins a word, as in ``shop_test`` (SQLite: that of its file);
    - its place, for a SQLite file in the directory for temporary files;
    - its mark, which `create_database` leaves, and ``COMMENT ON DATABASE shop_ci IS 'ctxdb: test database'``;
    - `test_databases`.

    Args:
        db: the database.
        test_databases: the names of databases that are for tests, although nothing else says so.

    Raises:
        WrongDatabaseError: nothing says that the database is for tests; or, when the cleaner is entered, sessions of
            others write to it, or another run of tests cleans it. Nothing has been changed in it.
        CleanUpError: as `clean`; and the database is one in memory, which other connections cannot reach.
    """

    # Cleaning can fire triggers that write again.
    _ATTEMPTS = 3

    def __init__(self, db: DBConnect, *, test_databases: str | Collection[str] = ()) -> None:
        check_database(db)
        self._db = db
        self._test_databases = {test_databases} if isinstance(test_databases, str) else set(test_databases)

    async def __aenter__(self) -> Self:
        follow_backends(self._db)
        engine = await self._db.engine()
        check_driver(engine.sync_engine)
        if engine.dialect.name == "sqlite" and sqlite_file(engine.url) is None:
            raise CleanUpError("A database in memory is gone with its connection: use a file, or shared_transaction().")
        self._connection: AsyncConnection = await engine.connect()
        try:
            await self._connection.execution_options(isolation_level="AUTOCOMMIT")
            raw: Any = await self._connection.get_raw_connection()
            self._tables = _KINDS[engine.dialect.name](driver_of(engine.sync_engine, raw.dbapi_connection))
            await self._tables.check_for_tests(self._test_databases, engine.url)
            await self._tables.remember()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        if hasattr(self, "_tables"):
            self._tables.forget()
        # The connection has temporary tables and settings of its own: it must not go back to the pool.
        await self._connection.invalidate()
        await self._connection.close()

    async def clean(self) -> list[str]:
        """Undo what was committed since the cleaner was entered, or since the last time; return the tables' names.

        Raises:
            CleanUpError: a transaction that has written is still open, or the rows that were there cannot be put back.
            WrongDatabaseError: sessions of others write to the database while it is cleaned.
        """
        found: list[str] = []
        for attempt in range(self._ATTEMPTS):
            changed = await self._tables.changed()
            if not changed and not self._tables.sequences_moved:
                return sorted(found)
            if not attempt:
                changed = await self._tables.check_writers(changed)
            found += [table for table in changed if table not in found]
            await self._tables.restore(changed)
            if self._tables.is_silent:
                return sorted(found)
        raise CleanUpError(
            f"Tables change as often as they are cleaned: {', '.join(await self._tables.changed())}. Stop what "
            "is still writing to them, a trigger for instance."
        )
