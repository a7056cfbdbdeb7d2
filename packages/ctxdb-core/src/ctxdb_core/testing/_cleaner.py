"""`TableCleaner`: undoes what a test has really committed, in the tables that it has changed."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncConnection

from ctxdb_core._databases.connect import DBConnect, check_database
from ctxdb_core.testing._driver import check_driver, driver_of
from ctxdb_core.testing._errors import CleanUpError
from ctxdb_core.testing._postgres_tables import PostgresTables
from ctxdb_core.testing._sqlite_tables import SQLiteTables
from ctxdb_core.testing._tables import Tables

_KINDS: dict[str, type[Tables]] = {"postgresql": PostgresTables, "sqlite": SQLiteTables}


class TableCleaner:
    """Empties the tables that tests have changed, and puts the rows back that were there before; a context manager.

    It finds these tables by itself, whoever has changed them: an application in another process, a trigger, a
    cascading delete. All other tables cost next to nothing.

    Args:
        db: the database.

    Raises:
        CleanUpError: as `clean`; and the database is one in memory, which other connections cannot reach.
    """

    # Cleaning can fire triggers that write again.
    _ATTEMPTS = 3

    def __init__(self, db: DBConnect) -> None:
        check_database(db)
        self._db = db

    async def __aenter__(self) -> Self:
        engine = await self._db.engine()
        check_driver(engine.sync_engine)
        if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
            raise CleanUpError("A database in memory is gone with its connection: use a file, or shared_transaction().")
        self._connection: AsyncConnection = await engine.connect()
        try:
            await self._connection.execution_options(isolation_level="AUTOCOMMIT")
            raw: Any = await self._connection.get_raw_connection()
            self._tables = _KINDS[engine.dialect.name](driver_of(engine.sync_engine, raw.dbapi_connection))
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
        # It is in a state of its own, with temporary tables: not one for the pool.
        await self._connection.invalidate()
        await self._connection.close()

    async def clean(self) -> list[str]:
        """Undo what was committed since the cleaner was entered, or since the last time; return the tables' names.

        Raises:
            CleanUpError: a table is locked by a transaction that is still open, or the rows that were there cannot be
                put back.
        """
        found: list[str] = []
        for _ in range(self._ATTEMPTS):
            changed = await self._tables.changed()
            if not changed and not self._tables.sequences_moved:
                return sorted(found)
            found += [table for table in changed if table not in found]
            await self._tables.restore(changed)
            if self._tables.is_silent:
                return sorted(found)
        raise CleanUpError(
            f"Tables change as often as they are cleaned: {', '.join(await self._tables.changed())}. Is something "
            "still writing, or does a trigger?"
        )
