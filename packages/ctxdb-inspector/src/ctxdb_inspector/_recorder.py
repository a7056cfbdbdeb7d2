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

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core import ArgumentTypeError, DBConnect, PoolStatus
from ctxdb_core.adapters import (
    RequestUnit,
    UnitOfWork,
    running_unit,
    without_secrets,
)
from ctxdb_inspector._connection_events import follow_connections
from ctxdb_inspector._pool_track import KEPT_SAMPLES, PoolTrack
from ctxdb_inspector._records import LONGEST_REQUEST, HoldRecord, UnitRecord

__all__ = ["Recorder"]

_KEPT_UNITS = 500
_MOST_LIVE = 300
"""How many units that are at work are shown, those first that hold a connection."""
_KEPT_WARNINGS = 100
_SAMPLE_SECONDS = 1.0
_LONGEST_WARNING = 1000


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
        self._pools: dict[tuple[int, str], PoolTrack] = {}
        self._engines: WeakSet[Engine] = WeakSet()
        self.live: set[UnitRecord] = set()
        self.ended: deque[UnitRecord] = deque(maxlen=_KEPT_UNITS)
        self._warnings: deque[dict[str, Any]] = deque(maxlen=_KEPT_WARNINGS)
        self._last = 0
        """The highest number of a warning, or of a unit that was shown after its end."""
        self._wall = time.time() - perf_counter()
        """What makes times of the clock on the wall of those of `perf_counter`."""
        self._sampling: asyncio.AbstractEventLoop | None = None
        """The event loop that takes a sample each second; ``None`` while that is not needed."""
        # Its holder may enter it again: garbage is collected in between, and a leak that is found so is logged.
        self._lock = threading.RLock()
        self.readers = 0
        """How many pages are open: pools are sampled for them, also while no connection is used."""
        _Warnings.install(self)
        for index, db in enumerate(self._dbs):
            self._follow(index, db)

    # --- listening ----------------------------------------------------------------------------------------------------

    def _follow(self, index: int, db: DBConnect) -> None:
        def listen(host: str, engine: AsyncEngine) -> None:
            # A database in memory has one engine for all event loops.
            if engine.sync_engine not in self._engines:
                self._engines.add(engine.sync_engine)
                follow_connections(engine, self._pool(index, without_secrets(host)), self)

        db.on_engine(listen, overridden=True)

    def _pool(self, index: int, host: str) -> PoolTrack:
        track = self._pools.get((index, host))
        if track is None:
            name = host if len(self._dbs) == 1 else f"{index + 1}: {host}"
            track = self._pools[index, host] = PoolTrack(name, host)
        return track

    def follow_unit(self, unit: UnitOfWork, hold: HoldRecord, opened: float | None) -> None:
        """Follow a unit of work that has taken its first connection.

        Args:
            unit: the unit of work.
            hold: what is known of the connection.
            opened: when the unit has opened its first session, if it has.
        """
        hold.unit = record = UnitRecord()
        record.owner = self
        record.unit = ref(unit)
        record.id, request = unit.identify()
        record.request = request if request is None or len(request) <= LONGEST_REQUEST else request[:LONGEST_REQUEST]
        record.started = opened or hold.taken
        record.holds = (hold,)
        unit.watch(record, self)
        if self._request_key is not None and isinstance(unit, RequestUnit) and isinstance(unit.origin, MutableMapping):
            unit.origin[self._request_key] = record
        self.live.add(record)

    def note_warning(self, record: logging.LogRecord) -> None:
        """Remember a warning or an error that ctxdb has logged."""
        unit = running_unit()
        warning = {
            "at": record.created,
            "level": record.levelname.lower(),
            "text": record.getMessage()[:_LONGEST_WARNING],
            "unit": None if unit is None else unit.id,
        }
        with self._lock:
            self._last += 1
            self._warnings.append({"sequence": self._last, **warning})

    # --- sampling -----------------------------------------------------------------------------------------------------

    # Samples are taken when a connection is given back, at most one each second, and for open pages. Only a pool
    # that has no connection left is sampled by the clock: the tasks that wait for it cause no event.

    def note_peak(self, pool: PoolTrack, now: float) -> None:
        """Note that more connections of a pool are in use than at any time since the last sample."""
        pool.peak = len(pool.held)
        if now >= pool.next_sample:
            # The first sample tells the limit.
            self.sample()
        if pool.limit is not None and len(pool.held) >= pool.limit:
            self.sample_while_read()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self.sample()
        is_exhausted = any(
            pool.limit is not None and len(pool.held) >= pool.limit for pool in list(self._pools.values())
        )
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

    def sample(self) -> None:
        """Sample all pools, and look for units of work that were thrown away."""
        now = perf_counter()
        # Few units are never ended: to look for them here costs less than a callback of the reference to each unit.
        for record in list(self.live):
            record.note_if_lost()
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
        # The numbers of the pool have been the same since a connection was taken last.
        taken = max((hold.taken for hold in list(pool.held.values())), default=now)
        last = max(taken, now - KEPT_SAMPLES * _SAMPLE_SECONDS)
        if pool.samples:
            last = max(last, pool.samples[-1][0])
        held = len(pool.held)
        while held and last + 1.5 * _SAMPLE_SECONDS < now:
            last += _SAMPLE_SECONDS
            pool.samples.append((last, held, idle, 0))
        pool.samples.append((now, max(pool.peak, held), idle, waiting))
        pool.peak = held
        pool.next_sample = now + _SAMPLE_SECONDS

    # --- showing ------------------------------------------------------------------------------------------------------

    def _on_wall(self, at: float | None) -> float | None:
        return None if at is None else round(self._wall + at, 6)

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """Return what the page shows, ready for JSON.

        Args:
            since: the ``sequence`` of an earlier snapshot: what had ended before it is left out.
        """
        live, ended, last = self._units()
        shown = live
        if len(live) > _MOST_LIVE:
            shown = sorted(live, key=_importance)[:_MOST_LIVE]
        return {
            "worker": {"host": socket.gethostname(), "pid": os.getpid()},
            "now": round(time.time(), 6),
            "sequence": last,
            "pools": self._pool_states(3 if since else KEPT_SAMPLES),
            "at_work": len(live),
            "units": [
                unit.as_json(self._on_wall) for unit in (*shown, *(each for each in ended if each.sequence > since))
            ],
            "others": [
                hold.as_json(hold.unit, self._on_wall)
                for pool in list(self._pools.values())
                for hold in list(pool.held.values())
                # A unit that has ended is in one update alone, and a connection that it has not given back in each.
                if hold.unit is None or hold.unit.ended is not None
            ],
            "warnings": [warning for warning in list(self._warnings) if warning["sequence"] > since],
        }

    def _units(self) -> tuple[list[UnitRecord], list[UnitRecord], int]:
        """Return the units that are at work, those that have ended, and the highest number that was given.

        A unit gets its number when it is first shown after its end.
        """
        for record in list(self.live):
            record.note_if_lost()
        with self._lock:
            ended = list(self.ended)
            fresh = itertools.takewhile(lambda unit: unit.sequence == 0, reversed(ended))
            for unit in reversed(list(fresh)):
                self._last += 1
                unit.sequence = self._last
            return list(self.live), ended, self._last

    def unit(self, unit_id: str) -> dict[str, Any] | None:
        """Return what is known of one unit of work; ``None`` if that is nothing, or nothing any more."""
        live, ended, _ = self._units()
        record = next((unit for unit in (*live, *ended) if unit.id == unit_id), None)
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
                    "in_use": len(track.held),
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


def _importance(unit: UnitRecord) -> tuple[bool, float]:
    """Return what sorts units of work: those that hold a connection for the longest, then the newest ones."""
    held = [hold.taken for hold in list(unit.holds) if hold.returned is None]
    return (False, min(held)) if held else (True, -unit.started)


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
