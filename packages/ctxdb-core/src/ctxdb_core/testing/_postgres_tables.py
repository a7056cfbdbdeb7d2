"""Which tables of a PostgreSQL database a test has changed, and how they become again what they were.

The statistics of PostgreSQL would tell, but each server process reports its own with up to a second's delay. The files
tell at once, and for every process: a table that is empty and not bloated has no page, and an INSERT into it makes one,
also if it is rolled back. So one look at the sizes leaves only few tables, of which is asked whether they have rows.

For tables that had rows to begin with, a copy is kept. Each row carries the number of the transaction that wrote it
(``xmin``): a row that is younger than the copy, or another number of rows, is a change.

Rows are removed by DELETE: TRUNCATE makes new files for each table and its indexes, and takes several milliseconds for
each where the DELETE of a test's few rows takes some microseconds.
"""

# ruff: noqa: S608 - names come quoted from the catalogue, and cannot be parameters

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from sqlalchemy import URL

from ctxdb_core.testing import _tables
from ctxdb_core.testing._driver import Driver, app_backends, own_backends
from ctxdb_core.testing._errors import CleanUpError, WrongDatabaseError
from ctxdb_core.testing._marks import MARK, names_a_test
from ctxdb_core.testing._statement import literal
from ctxdb_core.testing._tables import Tables, refuse_busy, refuse_unmarked

# A table that is emptied by DELETE keeps its pages, which every look at it has to pass.
_BLOATED_PAGES = 128

LOCK_TIMEOUT = "5s"

WRITER_SECONDS = 5.0
"""How long transactions that have written are waited for."""

_POLL_SECONDS = 0.02

_WATCH_SECONDS = 0.2
"""How long a database is watched in which another program's session has been at work when it is cleaned."""

# A key of advisory locks that no other program uses: "ctxdb" in ASCII.
_LOCK_KEY = 0x6374786462

_NO_TRIGGERS = "SET LOCAL session_replication_role = replica"

_USERS_OWN = (
    "nspname !~ '^pg_' AND nspname <> 'information_schema' AND relpersistence <> 't' AND NOT EXISTS ("
    "SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'e')"
)
# Partitions are tables as any other. The tables that they are partitions of have no rows.
_STATE = (
    "SELECT relkind = 'r', quote_ident(nspname) || '.' || quote_ident(relname), "
    "CASE relkind WHEN 'r' THEN pg_relation_size(pg_class.oid) / current_setting('block_size')::int8 "
    "WHEN 'S' THEN pg_sequence_last_value(pg_class.oid) END, has_table_privilege(pg_class.oid, 'SELECT') "
    "FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    f"WHERE relkind IN ('r', 'S') AND {_USERS_OWN}"
)
# Who is connected, how many seconds ago it did something last (NULL: this role may not know), and whether it has a
# transaction open that has written: only those hold a lock on a transaction ID of their own. Not autovacuum, nor other
# processes of the server, which have no user.
_OTHERS = (
    "SELECT pid, usename::text, coalesce(application_name, ''), "
    "CASE state WHEN 'active' THEN 0 ELSE extract(epoch FROM clock_timestamp() - state_change) END::float8, "
    "pid IN (SELECT pid FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted) "
    "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND usename IS NOT NULL"
)
_LOCK_HOLDERS = (
    "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    f"AND classid::int8 = {_LOCK_KEY >> 32} AND objid::int8 = {_LOCK_KEY & 0xFFFFFFFF}"
)
_FOREIGN_KEYS = (
    "SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(c.relname), "
    "quote_ident(fn.nspname) || '.' || quote_ident(fc.relname) FROM pg_constraint "
    "JOIN pg_class c ON c.oid = conrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
    "JOIN pg_class fc ON fc.oid = confrelid JOIN pg_namespace fn ON fn.oid = fc.relnamespace "
    "WHERE contype = 'f' AND conrelid <> confrelid"
)
# The partitions that have rows: not those that are partitioned themselves.
_PARTITIONS = (
    "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), "
    "quote_ident(pn.nspname) || '.' || quote_ident(pc.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = "
    "c.relnamespace LEFT JOIN pg_partition_tree(c.oid) p ON p.isleaf AND p.relid <> c.oid "
    "LEFT JOIN pg_class pc ON pc.oid = p.relid LEFT JOIN pg_namespace pn ON pn.oid = pc.relnamespace "
    "WHERE c.relkind = 'p'"
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
        self._readable: set[str] = set()
        """The sequences that this role may look into."""
        self._starts: dict[str, int] = {}
        """The first values of the sequences that had not been used yet."""
        self._pages: dict[str, int] = {}
        self._partitions: dict[str, set[str]] = {}
        """Of each partitioned table, those of its partitions that have rows."""
        self._moved: list[tuple[str, int | None]] = []
        self._name = ""
        self._backend_pid: int | None = None
        self._trusted: set[int] = set()
        """The server processes of other programs that were watched, and did not write."""

    async def check_for_tests(self, named: Collection[str], url: URL) -> None:
        """Raise `WrongDatabaseError` unless the database is for tests, and for this run of them alone."""
        ((self._name, comment, quoted),) = await self.driver.fetch(
            "SELECT datname::text, coalesce(shobj_description(oid, 'pg_database'), ''), quote_ident(datname) "
            "FROM pg_database WHERE datname = current_database()"
        )
        if not (self._name in named or names_a_test(self._name) or comment.startswith(MARK)):
            raise refuse_unmarked(self._name, f"or in the database by `COMMENT ON DATABASE {quoted} IS '{MARK}'`")
        await self._lock()
        self._backend_pid = self.driver.backend_pid
        if self._backend_pid is not None:
            own_backends.add(self._backend_pid)

    def forget(self) -> None:
        """Take writes of this server process for those of other programs from now on."""
        if self._backend_pid is not None:
            own_backends.discard(self._backend_pid)

    async def _lock(self) -> None:
        """Let no other process clean this database, until the connection is closed."""
        ((is_free,),) = await self.driver.fetch(f"SELECT pg_try_advisory_lock({_LOCK_KEY})")
        if is_free:
            return
        holders = {pid for (pid,) in await self.driver.fetch(_LOCK_HOLDERS)}
        if not holders <= own_backends:
            raise WrongDatabaseError(
                f"Another run of tests has a TableCleaner on the database {self._name!r}: each would empty the tables "
                "of the other. Give each run, and each worker of pytest-xdist, a database of its own (`worker_url`)."
            )

    async def remember(self) -> None:
        """Copy the rows that there are, and note where the sequences are."""
        await self.driver.run(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        writers = [other for other in await self._others() if other.has_written]
        if left := await self._wait_for(writers):
            raise refuse_busy(self._name, f" ({_names_of(left)})")
        await self._look()
        self._last_values = dict(self._sequences)
        await self._note_starts()
        self.is_silent = await self._try(_NO_TRIGGERS)
        await self._copy()
        others = await self._others()
        # The application's own sessions count as well: a part of it may be at work already.
        age = min((other.age for other in others), default=_tables.QUIET_SECONDS)
        if age < _tables.QUIET_SECONDS:
            # A session that writes now and then does so again in this time.
            await asyncio.sleep(_tables.QUIET_SECONDS - age)
            if await self.changed() or self.sequences_moved:
                raise refuse_busy(self._name, f" ({_names_of(others)})")

    async def check_writers(self, changed: list[str]) -> list[str]:
        """Wait for transactions that have written, and watch other programs that have been at work just now."""
        others = await self._others()
        if writers := [other for other in others if other.has_written]:
            if left := await self._wait_for(writers):
                raise CleanUpError(
                    "The tables could not be cleaned, as the test has left a transaction open that has written to the "
                    f"database ({_names_of(left)}). End it in the test."
                )
            changed = await self.changed()
        active = [
            other
            for other in others
            if other.age < _tables.QUIET_SECONDS and other.pid not in app_backends and other.pid not in self._trusted
        ]
        if active:
            before = await self._versions(changed)
            await asyncio.sleep(_WATCH_SECONDS)
            if set(await self.changed()) - set(changed) or await self._versions(changed) != before:
                raise refuse_busy(self._name, f" ({_names_of(active)})")
            self._trusted.update(other.pid for other in active)
        return changed

    async def _versions(self, tables: Collection[str]) -> list[tuple[Any, ...]]:
        """Return what differs after each commit that has written to `tables`."""
        queries = [
            f"SELECT {literal(table)}, count(*), max(xmin::text::int8), sum(xmin::text::int8) FROM ONLY {table}"
            for table in tables
        ]
        return sorted(map(tuple, await self.driver.fetch(" UNION ALL ".join(queries)))) if queries else []

    async def _others(self) -> list[_Other]:
        """Return the sessions on this database that are not the testing tools' own."""
        rows = await self.driver.fetch(_OTHERS)
        return [
            _Other(pid, user, application, 0.0 if age is None else age, has_written=has_written)
            for pid, user, application, age, has_written in rows
            if pid not in own_backends
        ]

    async def _wait_for(self, writers: list[_Other]) -> list[_Other]:
        """Wait until `writers` have ended their transactions; return the writers that have not when time is up."""
        deadline = time.monotonic() + WRITER_SECONDS
        while writers and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
            writing = {other.pid for other in await self._others() if other.has_written}
            writers = [other for other in writers if other.pid in writing]
        return writers

    async def _note_starts(self) -> None:
        queries = [
            f"SELECT {literal(name)}, last_value FROM {name} WHERE NOT is_called"
            for name, last in self._sequences.items()
            if last is None and name in self._readable
        ]
        rows = await self.driver.fetch(" UNION ALL ".join(queries)) if queries else []
        self._starts = {row[0]: row[1] for row in rows}

    async def _copy(self) -> None:
        await self.driver.run("BEGIN")
        (((xid),),) = await self.driver.fetch("SELECT pg_current_xact_id()::xid::text")
        for number, table in enumerate(await self._with_rows()):
            copy = f"pg_temp.ctxdb_copy_{number}"
            ((columns,),) = await self.driver.fetch(_COLUMNS.format(table=table.replace("'", "''")))
            columns = columns or ""
            await self.driver.run(f"CREATE TEMP TABLE ctxdb_copy_{number} AS SELECT {columns} FROM ONLY {table}")
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
            # The triggers of foreign keys are silent, too: no order has to be kept.
            statements += [_NO_TRIGGERS, *(f"DELETE FROM ONLY {table}" for table in tables)]
        elif tables:
            tables = await self._ordered(tables)
            # A partitioned table has no rows of its own, but must be named where it refers to others.
            whole = [table for table, partitions in self._partitions.items() if partitions <= {*tables}]
            statements.append(f"TRUNCATE {', '.join([*(f'ONLY {table}' for table in tables), *whole])}")
        kept = [(table, self._kept[table]) for table in tables if table in self._kept]
        statements += [
            f"INSERT INTO {table} ({copy.columns}) OVERRIDING SYSTEM VALUE SELECT {copy.columns} FROM {copy.name}"
            if copy.columns
            else f"INSERT INTO {table} SELECT FROM {copy.name}"
            for table, copy in kept
        ]
        statements += [self._reset(name, last) for name, last in self._moved]
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

    def _reset(self, sequence: str, last: int | None) -> str:
        """Return the statement that lets a sequence go on after `last`, or begin as it was to."""
        name = literal(sequence)
        if last is not None:
            return f"SELECT setval({name}, {last}, true)"
        # A sequence that is new begins at its start.
        start = self._starts.get(sequence, f"(SELECT seqstart FROM pg_sequence WHERE seqrelid = {name}::regclass)")
        return f"SELECT setval({name}, {start}, false)"

    async def _look(self) -> None:
        """Read the sizes of the tables, and the last values of the sequences."""
        self._pages, self._sequences, self._readable = {}, {}, set()
        for is_table, name, number, is_readable in await self.driver.fetch(_STATE):
            if is_table:
                self._pages[name] = number or 0
            else:
                self._sequences[name] = number
                if is_readable:
                    self._readable.add(name)
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
                    f"SELECT {literal(table)} FROM ONLY {table} HAVING count(*) <> {copy.rows} "
                    f"OR bool_or(age(xmin) < age('{copy.xid}'::xid))"
                )
            elif pages:
                queries.append(f"SELECT {literal(table)} WHERE EXISTS (SELECT FROM ONLY {table})")
        return [row[0] for row in await self.driver.fetch(" UNION ALL ".join(queries))] if queries else []

    async def _ordered(self, tables: list[str]) -> list[str]:
        """Return `tables` and the tables that refer to them, each after the tables that it refers to itself."""
        partitions: dict[str, set[str]] = {}
        for table, partition in await self.driver.fetch(_PARTITIONS):
            partitions.setdefault(table, set()).update({partition} - {None})
        self._partitions = partitions
        references = {
            (child, parent)
            for children, parents in await self.driver.fetch(_FOREIGN_KEYS)
            for child in partitions.get(children, {children})
            for parent in partitions.get(parents, {parents})
            if child != parent
        }
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


@dataclass
class _Copy:
    name: str
    columns: str
    """The columns that can be written, as a list in SQL; empty if there are none."""
    rows: int
    xid: str


@dataclass(frozen=True)
class _Other:
    """A session of another program on the same database."""

    pid: int
    user: str
    application: str
    age: float
    """How many seconds ago it did something."""
    has_written: bool
    """Whether it has a transaction open that has written."""


def _names_of(others: Collection[_Other]) -> str:
    names = [
        f"server process {other.pid} of user {other.user!r}"
        + (f", application {other.application!r}" if other.application else "")
        for other in others
    ]
    return "; ".join(names)


def _failure(what: str, done: str, exc: Exception) -> CleanUpError:
    return CleanUpError(
        f"{what} could not be {done}: {exc}. If a lock was waited for, the test has left a transaction open. If rows "
        "could not be put back, the role of this DBConnect may not set session_replication_role, and foreign keys "
        "stand in their way."
    )
