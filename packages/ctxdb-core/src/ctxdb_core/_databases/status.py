"""`DBStatus`: what a `DBConnect` is doing now, for health endpoints, tests and tools."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.database import Database
from ctxdb_core._databases.loop_engine import LoopEngine
from ctxdb_core._databases.url import pool_name, without_secrets
from ctxdb_core._sqlalchemy.private import pool_numbers

__all__ = ["DBStatus", "OpenUnit", "PoolStatus", "UnitStatus", "open_units", "status_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """The connections of one engine: a `DBConnect` has an engine for each host and event loop that uses it."""

    host: str
    """Without any password."""
    name: str
    """Server, port and database; the pools of one database on several event loops have the same."""
    in_use: int
    """How many connections are held."""
    idle: int
    """How many lie in the pool, connected and ready."""
    waiting: int
    """How many tasks wait for a connection."""
    limit: int | None
    """How many connections there may be; ``None`` without a limit."""
    idle_limit: int | None
    """How many of them are kept while they are idle; ``None`` without a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStatus:
    """A unit of work that has a session open."""

    id: str
    """The same as in `UnitOfWork.id`; no other unit of this process, and most likely of any other one, has it."""
    request: str | None
    """Method and path of the request that the unit belongs to; ``None`` outside of requests."""
    open_for: float
    """Seconds since it opened its first session."""
    in_transaction: bool
    """Whether its session on this database has begun a transaction, and so may hold a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DBStatus:
    """What `DBConnect.status` returns."""

    host: str | None
    """Where new sessions go to; ``None`` before the first `connect`."""
    pools: tuple[PoolStatus, ...]
    """One for each engine that is in use: none before the first session."""
    units: tuple[UnitStatus, ...]
    """The units of work of this process with a session on this database, the oldest first."""


class OpenUnit(Protocol):
    """What a status wants to know of a unit of work, which is a layer above this one."""

    @property
    def sessions(self) -> Mapping[Any, AsyncSession]:
        """Its open sessions, by their databases."""

    @property
    def opened(self) -> float | None:
        """When it opened its first session, by `time.perf_counter`; ``None`` before that."""

    @property
    def id(self) -> str:
        """The unit's id: see `UnitStatus.id`."""

    @property
    def request(self) -> str | None:
        """Method and path of its request."""

    def source_of(self, db: Any) -> Database:
        """Return the database whose session the unit uses where its code asks for `db`."""


open_units: set[ref[Any]] = set()
"""Leads to the units of work that have opened a session and have not ended; a unit that is thrown away leaves it."""


def status_of(db: Database, engines: Collection[LoopEngine]) -> DBStatus:
    """Return the status of `db`, of which these are the engines."""
    return DBStatus(
        host=None if db.host is None else without_secrets(db.host),
        pools=tuple(
            PoolStatus(
                host=without_secrets(engine.host),
                name=pool_name(engine.engine.url),
                **pool_numbers(engine.engine.pool)._asdict(),
            )
            for engine in engines
            if not engine.loop.is_closed()
        ),
        units=tuple(_unit_statuses(db)),
    )


def _unit_statuses(db: Database) -> Iterable[UnitStatus]:
    now = perf_counter()
    # Copied first: other threads have units of their own.
    units: list[OpenUnit] = [unit for reference in tuple(open_units) if (unit := reference()) is not None]
    for unit in sorted(units, key=lambda unit: unit.opened or now):
        session = next((each for asked, each in tuple(unit.sessions.items()) if unit.source_of(asked) is db), None)
        if session is not None:
            yield UnitStatus(
                id=unit.id,
                request=unit.request,
                open_for=now - (unit.opened or now),
                in_transaction=session.sync_session.in_transaction(),
            )
