"""`Recorder`: follows the connections of databases, by SQLAlchemy's events and by watching units of work."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, MutableMapping
from time import perf_counter
from typing import Any
from weakref import WeakSet, ref

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core import ArgumentTypeError, DBConnect
from ctxdb_core.adapters import UnitOfWork, acquiring_code, follow_dialect, running_unit, without_secrets
from ctxdb_inspector._records import HoldRecord, UnitRecord, describe

__all__ = ["PoolTrack", "Recorder"]

_KEPT_UNITS = 500
_KEPT_WARNINGS = 100
_KEPT_SAMPLES = 300
_SAMPLE_SECONDS = 1.0
_LONGEST_WARNING = 1000

_HOLD = "ctxdb.inspector.hold"
"""Where a pool's record of a connection, and so `Connection.info`, has the `HoldRecord`; each recorder adds its id."""


class PoolTrack:
    """The connections to one host of one database, over the last minutes."""

    __slots__ = ("held", "host", "name", "peak", "samples")

    def __init__(self, name: str, host: str) -> None:
        self.name = name
        self.host = host
        self.held = 0
        self.peak = 0
        """How many were held at once, at the most, since the last sample."""
        self.samples: deque[tuple[float, int, int, int]] = deque(maxlen=_KEPT_SAMPLES)
        """Time, the most that were in use, idle, waiting tasks."""


class Recorder:
    """Remembers the last units of work that have taken connections of `dbs`, and the warnings of ctxdb.

    Args:
        dbs: what to look at.
        request_key: where a request is to hold its `UnitRecord`, for a framework whose adapter does not tell watchers
            of the start of a response.

    Raises:
        ArgumentTypeError: one of `dbs` is no `DBConnect`, or there is none.
    """

    def __init__(self, dbs: Iterable[DBConnect], request_key: Any = None) -> None:
        self._request_key = request_key
        self._dbs = tuple(dbs)
        if not self._dbs:
            raise ArgumentTypeError("Name the databases to look at: `inspector(db)`.")
        for db in self._dbs:
            if not isinstance(db, DBConnect):
                raise ArgumentTypeError(f"The inspector looks at `DBConnect`s, not at {type(db).__name__}.")
        self._key = f"{_HOLD}.{id(self)}"
        self._pools: dict[tuple[int, str], PoolTrack] = {}
        self._engines: WeakSet[Engine] = WeakSet()
        self._live: dict[str, UnitRecord] = {}
        self._ended: deque[UnitRecord] = deque()
        self._held: dict[int, HoldRecord] = {}
        self._warnings: deque[dict[str, Any]] = deque(maxlen=_KEPT_WARNINGS)
        self._sequence = itertools.count(1)
        self._last = 0
        self._wall = time.time() - perf_counter()
        self._sampling: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self.readers = 0
        """How many look at the page: pools are sampled for them, also while nothing is done."""
        _Warnings.install(self)
        for index, db in enumerate(self._dbs):
            self._follow(index, db)

    # --- listening ----------------------------------------------------------------------------------------------------

    def _follow(self, index: int, db: DBConnect) -> None:
        def listen(host: str, engine: AsyncEngine) -> None:
            # A database in memory has one engine for all event loops.
            if engine.sync_engine not in self._engines:
                self._engines.add(engine.sync_engine)
                self._listen(self._pool(index, without_secrets(host)), engine)

        db.on_engine(listen, overridden=True)

    def _pool(self, index: int, host: str) -> PoolTrack:
        track = self._pools.get((index, host))
        if track is None:
            name = host if len(self._dbs) == 1 else f"{index + 1}: {host}"
            track = self._pools[index, host] = PoolTrack(name, host)
        return track

    def _listen(self, pool: PoolTrack, engine: AsyncEngine) -> None:
        # Closures, and no attributes that are looked up: these run for each statement of the application.
        key, held, now = self._key, self._held, perf_counter

        def checkout(dbapi_connection: object, entry: ConnectionPoolEntry, proxy: object) -> None:
            taken = now()
            where = acquiring_code()
            unit = running_unit()
            record = None if unit is None else self._record(unit, where)
            hold = HoldRecord(pool, record, where, taken)
            if record is not None:
                record.holds.append(hold)
            entry.info[key] = held[id(entry)] = hold
            pool.held += 1
            if pool.held > pool.peak:
                pool.peak = pool.held
            if self._sampling is None or self._sampling.is_closed():
                self._sample_soon()

        def checkin(dbapi_connection: object, entry: ConnectionPoolEntry) -> None:
            hold = held.pop(id(entry), None)
            if hold is not None:
                pool.held -= 1
                hold.returned = now()
                hold.running_since = None
                hold.is_committing = False
                entry.info.pop(key, None)

        def hold_of(connection: Any) -> HoldRecord | None:
            try:
                hold: HoldRecord | None = connection.info.get(key)
            except NotImplementedError:
                # Before the first use of an engine, SQLAlchemy asks its server by a connection of another kind.
                return None
            return hold

        def execute(original: Any, cursor: Any, statement: str, *rest: Any, **options: Any) -> None:
            # The execution context is the last argument of each of the three methods.
            context = options.get("context") or (rest[-1] if rest else None)
            hold = None if context is None else hold_of(context.root_connection)
            if hold is None:
                original(cursor, statement, *rest, **options)
                return
            hold.statement = statement
            hold.statements += 1
            hold.has_begun = True
            hold.is_committing = False
            hold.running_since = now()
            try:
                original(cursor, statement, *rest, **options)
            finally:
                hold.running_since = None

        def commit(original: Any, connection: Any) -> None:
            hold = hold_of(connection)
            if hold is not None:
                hold.commit_at = now()
                hold.is_committing = True
                hold.has_begun = False
                hold.outcome = "committed"
            original(connection)
            if hold is not None:
                hold.is_committing = False

        def rollback(original: Any, connection: Any) -> None:
            # A pool also rolls back what it is given; nothing has begun then.
            hold = hold_of(connection)
            if hold is not None and (hold.has_begun or hold.is_committing):
                hold.commit_at = hold.commit_at or now()
                hold.is_committing = False
                hold.has_begun = False
                if hold.outcome != "commit failed":
                    hold.outcome = "rolled back"
            original(connection)

        def handle_error(context: ExceptionContext) -> None:
            conn = context.connection
            hold = None if conn is None or conn.invalidated or conn.closed else conn.info.get(key)
            if hold is not None:
                hold.running_since = None
                hold.error = describe(context.sqlalchemy_exception or context.original_exception)
                if hold.is_committing:
                    hold.is_committing = False
                    hold.outcome = "commit failed"

        event.listen(engine.sync_engine, "checkout", checkout)
        event.listen(engine.sync_engine, "checkin", checkin)
        event.listen(engine.sync_engine, "handle_error", handle_error)
        dialect = engine.sync_engine.dialect
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            follow_dialect(dialect, name, execute)
        follow_dialect(dialect, "do_commit", commit)
        follow_dialect(dialect, "do_rollback", rollback)

    def _record(self, unit: UnitOfWork, where: tuple[str, int, str]) -> UnitRecord:
        for watcher in unit.watchers:
            if type(watcher) is UnitRecord and watcher.owner is self:
                return watcher
        record = UnitRecord(unit, where[2], self, self._end)
        unit.watch(record)
        if self._request_key is not None and isinstance(unit.origin, MutableMapping):
            unit.origin[self._request_key] = record
        self._live[record.id] = record
        return record

    def _end(self, record: UnitRecord) -> None:
        record.sequence = self._last = next(self._sequence)
        self._live.pop(record.id, None)
        if len(self._ended) >= _KEPT_UNITS:
            # A unit and its holds know each other: without this, each would wait for the garbage collector.
            forgotten = self._ended.popleft()
            forgotten.holds = [hold for hold in forgotten.holds if hold.returned is None]
        self._ended.append(record)

    def note_warning(self, record: logging.LogRecord) -> None:
        """Remember a warning or an error that ctxdb has logged."""
        unit = running_unit()
        self._last = next(self._sequence)
        self._warnings.append(
            {
                "sequence": self._last,
                "at": record.created,
                "level": record.levelname.lower(),
                "text": record.getMessage()[:_LONGEST_WARNING],
                "unit": None if unit is None else unit.id,
            }
        )

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _sample_soon(self) -> None:
        with self._lock:
            loop = asyncio.get_running_loop()
            self._sampling = loop
        self._sample()
        loop.call_later(_SAMPLE_SECONDS, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sample()
        if self._held or self.readers:
            loop.call_later(_SAMPLE_SECONDS, self._tick, loop)
        else:
            self._sampling = None

    def sample_while_read(self) -> None:
        """Begin to sample, for a reader who has come."""
        if self._sampling is None or self._sampling.is_closed():
            self._sample_soon()

    def _sample(self) -> None:
        now = perf_counter()
        for index, db in enumerate(self._dbs):
            numbers: dict[str, tuple[int, int]] = {}
            for pool in db.status().pools:
                idle, waiting = numbers.get(pool.host, (0, 0))
                numbers[pool.host] = idle + pool.idle, waiting + pool.waiting
            for (of, host), track in list(self._pools.items()):
                if of == index:
                    track.samples.append((now, max(track.peak, track.held), *numbers.get(host, (0, 0))))
                    track.peak = track.held

    # --- showing ------------------------------------------------------------------------------------------------------

    def _on_wall(self, at: float | None) -> float | None:
        return None if at is None else round(self._wall + at, 6)

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """Return what the page shows, ready for JSON.

        Args:
            since: the ``sequence`` of an earlier snapshot: what had ended before it is left out.
        """
        last = self._last
        units = [*self._live.values(), *(unit for unit in list(self._ended) if unit.sequence > since)]
        return {
            "worker": {"host": socket.gethostname(), "pid": os.getpid()},
            "now": round(time.time(), 6),
            "sequence": last,
            "pools": self._pool_states(3 if since else _KEPT_SAMPLES),
            "units": [unit.as_json(self._on_wall) for unit in units],
            "others": [
                hold.as_json(self._on_wall)
                for hold in list(self._held.values())
                # What a unit that has ended has left is not among the units of an update.
                if hold.unit is None or hold.unit.ended is not None
            ],
            "warnings": [warning for warning in list(self._warnings) if warning["sequence"] > since],
        }

    def unit(self, unit_id: str) -> dict[str, Any] | None:
        """Return what is known of one unit of work; ``None`` if that is nothing, or nothing any more."""
        record = self._live.get(unit_id)
        if record is None:
            record = next((unit for unit in list(self._ended) if unit.id == unit_id), None)
        return None if record is None else record.as_json(self._on_wall)

    def _pool_states(self, samples: int) -> list[dict[str, Any]]:
        states = []
        statuses = [db.status() for db in self._dbs]
        for (index, host), track in list(self._pools.items()):
            pools = [pool for pool in statuses[index].pools if pool.host == host]
            limits = [pool.limit for pool in pools]
            states.append(
                {
                    "name": track.name,
                    "in_use": track.held,
                    "idle": sum(pool.idle for pool in pools),
                    "waiting": sum(pool.waiting for pool in pools),
                    "limit": sum(limit or 0 for limit in limits) if limits and None not in limits else None,
                    "samples": [
                        [self._on_wall(at), in_use, idle, waiting]
                        for at, in_use, idle, waiting in list(track.samples)[-samples:]
                    ],
                }
            )
        return states


class _Warnings(logging.Handler):
    """Hands on what ctxdb warns of, as long as the recorder is needed."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(logging.WARNING)
        self._recorder = ref(recorder, self._remove)

    @classmethod
    def install(cls, recorder: Recorder) -> None:
        logging.getLogger("ctxdb").addHandler(cls(recorder))

    def _remove(self, reference: object) -> None:
        logging.getLogger("ctxdb").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        recorder = self._recorder()
        # `ctxdb.units` tells how units of work end, which the page shows anyway.
        if recorder is not None and record.name == "ctxdb":
            recorder.note_warning(record)
