"""Which tables of a SQLite database a test has changed, and how they become again what they were."""

# ruff: noqa: S608 - names come quoted from the schema, and cannot be parameters

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from pathlib import Path

from sqlalchemy import URL

from ctxdb_core._databases.url import sqlite_file
from ctxdb_core.testing import _tables
from ctxdb_core.testing._driver import Driver
from ctxdb_core.testing._errors import CleanUpError
from ctxdb_core.testing._marks import is_sqlite_of_tests
from ctxdb_core.testing._statement import literal
from ctxdb_core.testing._tables import Tables, refuse_busy, refuse_unmarked

_TABLES = (
    "SELECT name, sql LIKE 'CREATE VIRTUAL%' FROM sqlite_master "
    "WHERE type = 'table' AND substr(name, 1, 7) <> 'sqlite_'"
)
_SEQUENCES = "SELECT name, seq FROM sqlite_sequence ORDER BY name"


class SQLiteTables(Tables):
    """The tables of a SQLite file."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._kept: dict[str, tuple[str, str]] = {}
        self._version: int | None = None
        self._sequences: list[tuple[str, int]] = []

    async def check_for_tests(self, named: Collection[str], url: URL) -> None:
        """Raise `WrongDatabaseError` unless something says that the file is for tests."""
        file = sqlite_file(url)
        assert file is not None
        if not is_sqlite_of_tests(file, named):
            raise refuse_unmarked(file.name, "or by the file's name")
        self._file = file.resolve()

    async def remember(self) -> None:
        """Copy the rows that there are, and note where the sequences are."""
        before = await self._data_version()
        await self._copy()
        # SQLite does not tell who is connected, but the files when they were written.
        age = time.time() - max(file.stat().st_mtime for file in self._files())
        if age < _tables.QUIET_SECONDS:
            await asyncio.sleep(_tables.QUIET_SECONDS - max(age, 0))
        self._version = await self._data_version()
        if self._version != before:
            raise refuse_busy(self._file.name, "")

    def _files(self) -> list[Path]:
        log = self._file.with_name(f"{self._file.name}-wal")
        return [self._file, log] if log.exists() else [self._file]

    async def _copy(self) -> None:
        # Of this connection alone, and outside of a transaction only: no order has to be kept.
        await self.driver.run("PRAGMA foreign_keys = OFF")
        for number, table in enumerate(await self.changed()):
            copy = f"temp.ctxdb_copy_{number}"
            columns = await self.driver.fetch(f"SELECT name, hidden FROM pragma_table_xinfo({literal(table)})")
            names = ", ".join(_identifier(name) for name, hidden in columns if not hidden)
            await self.driver.run(f"CREATE TABLE {copy} AS SELECT {names} FROM main.{_identifier(table)}")
            self._kept[table] = copy, names
        self._sequences = await self._read_sequences()

    async def changed(self) -> list[str]:
        """Return the tables with rows that were not there, or without some that were."""
        if self._version is not None and await self._data_version() == self._version:
            # No other connection has committed anything (SQLite, "PRAGMA data_version").
            self.sequences_moved = False
            return []
        queries = []
        for table, is_virtual in await self.driver.fetch(_TABLES):
            if is_virtual:
                raise CleanUpError(f"The virtual table {table} is not understood here: use shared_transaction().")
            name = f"main.{_identifier(table)}"
            condition = f"EXISTS (SELECT 1 FROM {name})"
            if table in self._kept:
                copy, columns = self._kept[table]
                now, then = f"SELECT {columns} FROM {name}", f"SELECT {columns} FROM {copy}"
                condition = (
                    f"EXISTS ({now} EXCEPT {then}) OR EXISTS ({then} EXCEPT {now}) "
                    f"OR (SELECT count(*) FROM {name}) <> (SELECT count(*) FROM {copy})"
                )
            queries.append(f"SELECT {literal(table)} WHERE {condition}")
        changed = [row[0] for row in await self.driver.fetch(" UNION ALL ".join(queries))] if queries else []
        if self._version is not None:
            self.sequences_moved = await self._read_sequences() != self._sequences
            if not changed and not self.sequences_moved:
                self._version = await self._data_version()
        return changed

    async def restore(self, tables: list[str]) -> None:
        """Empty `tables`, put the copied rows back, and set the sequences."""
        statements = [f"DELETE FROM main.{_identifier(table)}" for table in tables]
        for table in tables:
            if table in self._kept:
                copy, columns = self._kept[table]
                statements.append(f"INSERT INTO main.{_identifier(table)} ({columns}) SELECT {columns} FROM {copy}")
        if await self._has_sequences():
            statements.append("DELETE FROM sqlite_sequence")
            statements += [
                f"INSERT INTO sqlite_sequence VALUES ({literal(name)}, {last})" for name, last in self._sequences
            ]
        try:
            await self.driver.run("BEGIN IMMEDIATE")
            await self.driver.run(*statements, "COMMIT")
        except Exception as exc:
            if self.driver.in_transaction:
                await self.driver.run("ROLLBACK")
            raise CleanUpError(
                f"{', '.join(tables) or 'The sequences'} could not be cleaned: {exc}. If the database was locked, the "
                "test has left a transaction open."
            ) from exc

    async def _data_version(self) -> int:
        ((version,),) = await self.driver.fetch("PRAGMA data_version")
        return int(version)

    async def _has_sequences(self) -> bool:
        return bool(await self.driver.fetch("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'"))

    async def _read_sequences(self) -> list[tuple[str, int]]:
        if not await self._has_sequences():
            return []
        return [(name, last) for name, last in await self.driver.fetch(_SEQUENCES)]


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
