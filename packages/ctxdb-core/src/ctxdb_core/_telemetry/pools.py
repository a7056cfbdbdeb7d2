"""`PoolFollower`: how long connections are waited for, made and used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any
from weakref import WeakSet

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._databases.status import PoolStatus
from ctxdb_core._databases.url import pool_name
from ctxdb_core._sqlalchemy.private import follow_dialect, follow_raw_connection
from ctxdb_core._telemetry.units import check_databases

__all__ = ["PoolFollower", "PoolTotal"]


class PoolTotal:
    """The numbers of all pools of one name: each event loop has a pool of its own."""

    __slots__ = ("idle", "idle_limit", "in_use", "limit", "waiting")

    def __init__(self) -> None:
        self.in_use = self.idle = self.waiting = 0
        self.limit: int | None = 0
        """How many connections there may be; ``None`` without a limit."""
        self.idle_limit: int | None = 0
        """How many of them are kept while they are idle; ``None`` without a limit."""

    def add(self, pool: PoolStatus) -> None:
        """Add the numbers of a pool."""
        self.in_use += pool.in_use
        self.idle += pool.idle
        self.waiting += pool.waiting
        self.limit = None if self.limit is None or pool.limit is None else self.limit + pool.limit
        self.idle_limit = (
            None if self.idle_limit is None or pool.idle_limit is None else self.idle_limit + pool.idle_limit
        )


class PoolFollower:
    """Follows the pools of databases, those of blocks of `DBConnect.overridden` among them.

    A subclass overrides the methods that are told what happens. They are called for each connection that the
    application takes, and must not wait for anything. All times are in seconds.

    Raises:
        ArgumentTypeError: there is no database, or one is no `DBConnect`.
    """

    def __init__(self, dbs: Iterable[DBConnect]) -> None:
        self._dbs = check_databases(dbs)
        self.is_active = True
        self._key = f"ctxdb.taken.{id(self)}"
        # A database in memory has one engine for all event loops.
        self._engines: WeakSet[Engine] = WeakSet()
        # The engines of several event loops may have one dialect.
        self._dialects: WeakSet[Dialect] = WeakSet()
        for db in self._dbs:
            db.on_engine(self._follow, overridden=True)

    def stop(self) -> None:
        """Tell nothing more. The listeners stay on the engines, and do nothing."""
        self.is_active = False

    def totals(self) -> dict[str, PoolTotal]:
        """Return the numbers of the pools, by their names."""
        totals: dict[str, PoolTotal] = {}
        for db in self._dbs:
            for pool in db.status().pools:
                totals.setdefault(pool.name, PoolTotal()).add(pool)
        return totals

    def connection_taken(self, pool: str, waited: float) -> None:
        """Be told that a connection was taken, after so long a wait."""

    def connection_returned(self, pool: str, used: float) -> None:
        """Be told that a connection was given back, or thrown away, after so long a use."""

    def connection_made(self, pool: str, took: float) -> None:
        """Be told that a connection to the server was opened."""

    def connection_timed_out(self, pool: str) -> None:
        """Be told that no connection was free within the pool's time-out."""

    def _follow(self, host: str, engine: AsyncEngine) -> None:
        sync_engine = engine.sync_engine
        if sync_engine in self._engines:
            return
        self._engines.add(sync_engine)
        name, key = pool_name(engine.url), self._key

        def take(original: Callable[[], PoolProxiedConnection]) -> PoolProxiedConnection:
            if not self.is_active:
                return original()
            asked = perf_counter()
            try:
                connection = original()
            except PoolTimeoutError:
                self.connection_timed_out(name)
                raise
            taken = perf_counter()
            info = connection.record_info
            if info is not None:
                info[key] = taken
            self.connection_taken(name, taken - asked)
            return connection

        def note_return(dbapi_connection: object, entry: ConnectionPoolEntry) -> None:
            info = entry.record_info
            taken = None if info is None else info.pop(key, None)
            if taken is not None and self.is_active:
                self.connection_returned(name, perf_counter() - taken)

        def connect(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            asked = perf_counter()
            connection = original(*args, **kwargs)
            if self.is_active:
                self.connection_made(name, perf_counter() - asked)
            return connection

        follow_raw_connection(sync_engine, take)
        if sync_engine.dialect not in self._dialects:
            self._dialects.add(sync_engine.dialect)
            follow_dialect(sync_engine.dialect, "connect", connect)
        event.listen(sync_engine, "checkin", note_return)
