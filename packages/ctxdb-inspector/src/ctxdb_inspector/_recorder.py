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
from collections.abc import Callable, Iterable, MutableMapping
from time import perf_counter
from typing import Any
from weakref import WeakSet, ref

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core import ArgumentTypeError, DBConnect, PoolStatus
from ctxdb_core.adapters import RequestUnit, UnitOfWork, acquiring_place, follow_dialect, running_unit, without_secrets
from ctxdb_inspector._pool_track import KEPT_SAMPLES, PoolTrack
from ctxdb_inspector._records import HoldRecord, UnitRecord, describe

__all__ = ["Recorder"]

_KEPT_UNITS = 500
_KEPT_WARNINGS = 100
_SAMPLE_SECONDS = 1.0
_LONGEST_WARNING = 1000

_HOLD = "ctxdb.inspector.hold"
"""Where a pool's record of a connection, and so `Connection.info`, has the `HoldRecord`; each recorder adds its id."""


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
        self._dialects: WeakSet[Dialect] = WeakSet()
        """Those that are followed: the engines of several event loops may have one."""
        self._latest: Callable[[], object] = lambda: None
        """Returns the connection that was taken last, as long as it is in use."""
        self._live: dict[str, UnitRecord] = {}
        self._ended: deque[UnitRecord] = deque(maxlen=_KEPT_UNITS)
        self._held: dict[ConnectionPoolEntry, tuple[HoldRecord, UnitRecord | None]] = {}
        """The connections that are out, with the unit of work whose code has taken each."""
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
            if proxy is self._latest():
                # Told already: an engine for another event loop has the listeners of the first one, and its own; and
                # several databases may have one pool.
                return
            self._latest = ref(proxy)
            taken = now()
            unit = running_unit()
            record = None if unit is None else self._record(unit)
            entry.info[key] = hold = HoldRecord(pool, acquiring_place(), taken)
            held[entry] = hold, record
            if record is not None:
                record.holds.append(hold)
            pool.changed = taken
            pool.held += 1
            if pool.held > pool.peak:
                self._note_peak(pool)

        def checkin(dbapi_connection: object, entry: ConnectionPoolEntry) -> None:
            found = held.pop(entry, None)
            if found is not None:
                # The hold in the connection's `info` is replaced when the connection is taken again.
                found[0].returned = returned = now()
                if returned >= pool.next_sample:
                    self._sample()
                pool.held -= 1

        def execute(
            original: Any, cursor: Any, statement: str, parameters: Any, context: ExecutionContext | None = None
        ) -> None:
            try:
                hold = context.root_connection.info.get(key)  # type: ignore[union-attr]  # as below
            except (AttributeError, NotImplementedError):
                # There is no context; or SQLAlchemy asks the server of a new engine by a connection of another kind.
                hold = None
            if hold is None:
                original(cursor, statement, parameters, context)
                return
            hold.statement = statement
            hold.statements += 1
            hold.has_begun = True
            hold.running_since = now()
            try:
                original(cursor, statement, parameters, context)
            finally:
                hold.running_since = None

        def execute_no_params(
            original: Any, cursor: Any, statement: str, context: ExecutionContext | None = None
        ) -> None:
            execute(lambda cursor, statement, _, context: original(cursor, statement, context), cursor, statement, (),
                    context)  # fmt: skip

        def commit(original: Any, connection: Any) -> None:
            try:
                hold = connection.info.get(key)
            except NotImplementedError:
                hold = None
            if hold is None:
                original(connection)
                return
            hold.commit_at = now()
            hold.outcome = "committing"
            original(connection)
            hold.has_begun = False
            hold.outcome = "committed"

        def rollback(original: Any, connection: Any) -> None:
            try:
                hold = connection.info.get(key)
            except NotImplementedError:
                hold = None
            # A pool also rolls back what it is given; nothing has begun then.
            if hold is not None and hold.has_begun:
                hold.has_begun = False
                hold.commit_at = hold.commit_at or now()
                if hold.outcome != "commit failed":
                    hold.outcome = "rolled back"
            original(connection)

        def handle_error(context: ExceptionContext) -> None:
            conn = context.connection
            hold = None if conn is None or conn.invalidated or conn.closed else conn.info.get(key)
            if hold is not None:
                hold.running_since = None
                hold.error = describe(context.sqlalchemy_exception or context.original_exception)
                if hold.outcome == "committing":
                    hold.outcome = "commit failed"

        event.listen(engine.sync_engine, "checkout", checkout)
        event.listen(engine.sync_engine, "checkin", checkin)
        event.listen(engine.sync_engine, "handle_error", handle_error)
        dialect = engine.sync_engine.dialect
        if dialect in self._dialects:
            return
        self._dialects.add(dialect)
        follow_dialect(dialect, "do_execute", execute)
        follow_dialect(dialect, "do_executemany", execute)
        follow_dialect(dialect, "do_execute_no_params", execute_no_params)
        follow_dialect(dialect, "do_commit", commit)
        follow_dialect(dialect, "do_rollback", rollback)

    def _record(self, unit: UnitOfWork) -> UnitRecord:
        for watcher in unit.watchers:
            if type(watcher) is UnitRecord and watcher.owner is self:
                return watcher
        record = UnitRecord(unit, self, self._end)
        unit.watch(record)
        if self._request_key is not None and isinstance(unit, RequestUnit) and isinstance(unit.origin, MutableMapping):
            unit.origin[self._request_key] = record
        self._live[record.id] = record
        return record

    def _end(self, record: UnitRecord) -> None:
        record.sequence = self._last = next(self._sequence)
        self._live.pop(record.id, None)
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

    # Samples are taken when a connection is given back, at most one each second, and for open pages. Only a pool
    # that has no connection left is sampled by the clock: the tasks that wait for it cause no event.

    def _note_peak(self, pool: PoolTrack) -> None:
        pool.peak = pool.held
        if pool.changed >= pool.next_sample:
            # The first sample tells the limit.
            self._sample()
        if pool.limit is not None and pool.held >= pool.limit:
            self.sample_while_read()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sample()
        is_exhausted = any(pool.limit is not None and pool.held >= pool.limit for pool in list(self._pools.values()))
        if is_exhausted or self.readers:
            loop.call_later(_SAMPLE_SECONDS, self._tick, loop)
        else:
            self._sampling = None

    def sample_while_read(self) -> None:
        """Sample by the clock, for a reader who has come, or for a pool that has no connection left."""
        with self._lock:
            if self._sampling is not None and not self._sampling.is_closed():
                return
            self._sampling = loop = asyncio.get_running_loop()
        loop.call_soon(self._tick, loop)

    def _sample(self) -> None:
        now = perf_counter()
        for index, db in enumerate(self._dbs):
            numbers: dict[str, PoolStatus] = {}
            for status in db.status().pools:
                numbers[status.host] = status
            for (of, host), pool in list(self._pools.items()):
                if of == index:
                    self._sample_pool(pool, numbers.get(host), now)

    def _sample_pool(self, pool: PoolTrack, status: PoolStatus | None, now: float) -> None:
        idle, waiting = (0, 0) if status is None else (status.idle, status.waiting)
        if status is not None:
            pool.limit = status.limit
        # The numbers of the pool have been the same since its last change.
        last = max(pool.changed, now - KEPT_SAMPLES * _SAMPLE_SECONDS)
        if pool.samples:
            last = max(last, pool.samples[-1][0])
        while pool.held and last + 1.5 * _SAMPLE_SECONDS < now:
            last += _SAMPLE_SECONDS
            pool.samples.append((last, pool.held, idle, 0))
        pool.samples.append((now, max(pool.peak, pool.held), idle, waiting))
        pool.peak = pool.held
        pool.next_sample = now + _SAMPLE_SECONDS

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
            "pools": self._pool_states(3 if since else KEPT_SAMPLES),
            "units": [unit.as_json(self._on_wall) for unit in units],
            "others": [
                hold.as_json(unit, self._on_wall)
                for hold, unit in list(self._held.values())
                # What a unit that has ended has left is not among the units of an update.
                if unit is None or unit.ended is not None
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
