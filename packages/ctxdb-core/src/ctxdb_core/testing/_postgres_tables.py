"""Which tables of a PostgreSQL database a test has changed, and how they become again what they were.

The statistics of PostgreSQL would tell, but each server process reports its own with up to a second's delay. The files
tell at once, and for every process: a table that is empty and not bloated has no page, and an INSERT into it makes one,
also if it is rolled back. So one look at the sizes leaves only few tables, of which is asked whether they have rows.

For tables that had rows to begin with, a copy is kept. Each row carries the number of the transaction that wrote it
(``xmin``): one that is younger than the copy, or another number of rows, is a change.

Rows are removed by DELETE: TRUNCATE makes new files for each table and its indexes, and takes several milliseconds for
each where the DELETE of a test's few rows takes some microseconds.
"""

# ruff: noqa: S608 - names come quoted from the catalogue, and cannot be parameters

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from typing import Any

from ctxdb_core.testing._driver import Driver
from ctxdb_core.testing._errors import CleanUpError
from ctxdb_core.testing._tables import Tables

# Emptied by DELETE, a table keeps its pages, which every look at it has to pass.
_BLOATED_PAGES = 128

LOCK_TIMEOUT = "5s"

_NO_TRIGGERS = "SET LOCAL session_replication_role = replica"

_USERS_OWN = (
    "nspname !~ '^pg_' AND nspname <> 'information_schema' AND relpersistence <> 't' AND NOT EXISTS ("
    "SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'e')"
)
_STATE = (
    "SELECT relkind = 'r', pg_class.oid::int8, quote_ident(nspname) || '.' || quote_ident(relname), "
    "CASE relkind WHEN 'r' THEN pg_relation_size(pg_class.oid) / current_setting('block_size')::int8 "
    "ELSE pg_sequence_last_value(pg_class.oid) END "
    "FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    f"WHERE relkind IN ('r', 'S') AND {_USERS_OWN}"
)
_FOREIGN_KEYS = (
    "SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(c.relname), "
    "quote_ident(fn.nspname) || '.' || quote_ident(fc.relname) FROM pg_constraint "
    "JOIN pg_class c ON c.oid = conrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
    "JOIN pg_class fc ON fc.oid = confrelid JOIN pg_namespace fn ON fn.oid = fc.relnamespace "
    "WHERE contype = 'f' AND conrelid <> confrelid"
)
_COLUMNS = (
    "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute "
    "WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''"
)


class PostgresTables(Tables):
    """The tables of a PostgreSQL database."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._sequences: dict[str, int | None] = {}
        self._kept: dict[str, _Copy] = {}
        self._last_values: dict[str, int | None] = {}
        self._pages: dict[str, int] = {}
        self._moved: list[tuple[str, int | None]] = []

    async def remember(self) -> None:
        """Copy the rows that there are, and note where the sequences are."""
        await self.driver.run(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        await self._look()
        self._last_values = dict(self._sequences)
        self.is_silent = await self._try(_NO_TRIGGERS)
        await self.driver.run("BEGIN")
        (((xid),),) = await self.driver.fetch("SELECT pg_current_xact_id()::xid::text")
        for number, table in enumerate(await self._with_rows()):
            copy = f"pg_temp.ctxdb_copy_{number}"
            ((columns,),) = await self.driver.fetch(_COLUMNS.format(table=table.replace("'", "''")))
            await self.driver.run(f"CREATE TEMP TABLE ctxdb_copy_{number} AS SELECT {columns} FROM {table}")
            ((rows,),) = await self.driver.fetch(f"SELECT count(*) FROM {copy}")
            self._kept[table] = _Copy(copy, columns, rows, xid)
        await self.driver.run("COMMIT")

    async def changed(self) -> list[str]:
        """Return the tables with rows that were not there, or without some that were."""
        try:
            await self._look()
            self.sequences_moved = bool(self._moved)
            return await self._with_rows()
        except Exception as exc:
            raise _failure("The tables", "looked at", exc) from exc

    async def restore(self, tables: list[str]) -> None:
        """Empty `tables`, put the copied rows back, and set the sequences."""
        statements = []
        if self.is_silent:
            # Also those of foreign keys: no order has to be kept.
            statements += [_NO_TRIGGERS, *(f"DELETE FROM {table}" for table in tables)]
        elif tables:
            tables = await self._ordered(tables)
            statements.append(f"TRUNCATE {', '.join(tables)}")
        kept = [(table, self._kept[table]) for table in tables if table in self._kept]
        statements += [
            f"INSERT INTO {table} ({copy.columns}) OVERRIDING SYSTEM VALUE SELECT {copy.columns} FROM {copy.name}"
            for table, copy in kept
        ]
        statements += [
            f"SELECT setval({_literal(name)}, {last or _START.format(name=_literal(name))}, {last is not None})"
            for name, last in self._moved
        ]
        try:
            await self.driver.run("BEGIN", *statements, *([] if kept else ["COMMIT"]))
            if kept:
                ((xid,),) = await self.driver.fetch("SELECT pg_current_xact_id()::xid::text")
                await self.driver.run("COMMIT")
                for _, copy in kept:
                    copy.xid = xid
        except Exception as exc:
            await self.driver.run("ROLLBACK")
            raise _failure(", ".join(tables) or "The sequences", "cleaned", exc) from exc
        self._moved = []
        for table in tables:
            if self.is_silent and self._pages.get(table, 0) > _BLOATED_PAGES:
                await self.driver.run(f"VACUUM {table}")

    async def _look(self) -> None:
        """See how large the tables are, and where the sequences."""
        self._pages, self._sequences = {}, {}
        for is_table, _, name, number in await self.driver.fetch(_STATE):
            if is_table:
                self._pages[name] = number or 0
            else:
                self._sequences[name] = number
        # A sequence that is new begins at its start.
        self._moved = [
            (name, self._last_values.get(name))
            for name, last in self._sequences.items()
            if last != self._last_values.get(name)
        ]

    async def _with_rows(self) -> list[str]:
        queries = []
        for table, pages in self._pages.items():
            copy = self._kept.get(table)
            if copy is not None:
                queries.append(
                    f"SELECT {_literal(table)} FROM {table} HAVING count(*) <> {copy.rows} "
                    f"OR bool_or(age(xmin) < age('{copy.xid}'::xid))"
                )
            elif pages:
                queries.append(f"SELECT {_literal(table)} WHERE EXISTS (SELECT FROM {table})")
        return [row[0] for row in await self.driver.fetch(" UNION ALL ".join(queries))] if queries else []

    async def _ordered(self, tables: list[str]) -> list[str]:
        """Return `tables` and those that refer to them, each after those that it refers to itself."""
        references = [(child, parent) for child, parent in await self.driver.fetch(_FOREIGN_KEYS)]
        found = set(tables)
        while more := {child for child, parent in references if parent in found} - found:
            found |= more
        graph: dict[str, set[str]] = {table: set() for table in found}
        for child, parent in references:
            if child in found and parent in found:
                graph[child].add(parent)
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError:
            return sorted(found)

    async def _try(self, statement: str) -> bool:
        await self.driver.run("BEGIN")
        try:
            await self.driver.run(statement)
        except Exception:  # noqa: BLE001 - that is the answer
            return False
        finally:
            await self.driver.run("ROLLBACK")
        return True


class _Copy:
    def __init__(self, name: str, columns: str, rows: int, xid: str) -> None:
        self.name = name
        self.columns = columns
        self.rows = rows
        self.xid = xid


_START = "(SELECT seqstart FROM pg_sequence WHERE seqrelid = {name}::regclass)"


def _failure(what: str, done: str, exc: Exception) -> CleanUpError:
    return CleanUpError(
        f"{what} could not be {done}: {exc}. If a lock was waited for, the test has left a transaction open. If rows "
        "could not be put back, the role of this DBConnect may not set session_replication_role, and foreign keys "
        "stand in their way."
    )


def _literal(text: Any) -> str:
    return "'" + str(text).replace("'", "''") + "'"
