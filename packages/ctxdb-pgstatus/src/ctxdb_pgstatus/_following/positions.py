"""`Positions`: the WAL positions that the running code has written up to, and that its next reads have to see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import ref

from ctxdb_core.adapters import before_gather
from ctxdb_pgstatus.source import HostSource

__all__ = [
    "DEFAULT_MAX_AGE",
    "UNKNOWN_POSITION",
    "Positions",
    "current_positions",
    "positions_wanted",
    "want_positions",
]

DEFAULT_MAX_AGE = 300.0
"""For how many seconds a write is remembered."""

UNKNOWN_POSITION = (1 << 64) - 1
"""Something was written, at a position that is not known: only the master is sure to have it."""


_AT_ONCE_SECONDS = 10.0
"""Within this time, requests of one client are taken to run at once."""


class _Written:
    """Up to where one cluster was written."""

    __slots__ = ("at", "host", "position", "replayed", "source")

    def __init__(self, source: HostSource, host: str | None, position: int) -> None:
        self.source = source
        self.host = host
        self.position = position
        self.at = time.monotonic()
        self.replayed: dict[str, int] = {}
        """Up to where hosts were found to have replayed it."""


class Positions:
    """What the code of one request has written, or of one task that serves none."""

    __slots__ = ("__weakref__", "_limits", "_of_others", "_own", "_parent", "_task")

    def __init__(self) -> None:
        # All of clusters by their identity: there is hardly ever more than one.
        self._limits: dict[int, tuple[float, float]] = {}
        self._own: dict[int, _Written] = {}
        self._of_others: dict[int, _Written] = {}
        self._task: Callable[[], object] | None = None
        self._parent: Callable[[], Positions | None] = lambda: None

    @classmethod
    def of_task(cls) -> Positions:
        """Return those of the running code; of the current task, if it serves no request that has them.

        A task that was started by another one begins with what that one had written. What it writes, the other one's
        next reads have to see as well; but not what its brothers do. So requests have nothing to do with each other
        although all of them have inherited the context that their server was started in.
        """
        found = current_positions.get()
        task = asyncio.current_task()
        if found is not None and (found._task is None or found._task() is task):  # noqa: SLF001 - its own
            return found
        positions = cls()
        positions._task = ref(task) if task is not None else lambda: None
        if found is not None:
            positions._own = dict(found._own)  # noqa: SLF001 - its own
            positions._parent = ref(found)
        current_positions.set(positions)
        return positions

    def limit(self, source: HostSource, *, max_age: float, wait: float) -> None:
        """Set how long the writes on one cluster count.

        Args:
            source: the cluster.
            max_age: for how many seconds a write is remembered.
            wait: for how many seconds to wait for a replica that has replayed it.
        """
        self._limits[id(source)] = max_age, wait

    def wait_for(self, source: HostSource) -> float | None:
        """Return for how many seconds to wait for a replica; ``None`` if that is left to the reader."""
        limits = self._limits.get(id(source))
        return None if limits is None else limits[1]

    def bring(self, source: HostSource, position: int) -> None:
        """Take up a position that the client of a request has brought along."""
        self._own[id(source)] = _Written(source, None, position)

    def note(self, source: HostSource, host: str, position: int) -> None:
        """Remember a commit.

        Args:
            source: which cluster it was made on.
            host: the master.
            position: one after its commit record.
        """
        _note(self._own, source, host, position)
        _note_latest(source, host, position)
        parent = self._parent()
        while parent is not None:
            _note(parent._of_others, source, host, position)  # noqa: SLF001 - its own
            parent = parent._parent()  # noqa: SLF001 - its own

    def required(self, source: HostSource) -> int | None:
        """Return the position that a reader has to see; ``None`` if nothing was written that is not too old."""
        written = self._written(source)
        return None if written is None else written.position

    @property
    def are_empty(self) -> bool:
        """Whether nothing was written, wherever that might have been."""
        return not self._own and not self._of_others

    def is_seen_on(self, source: HostSource, host: str) -> bool:
        """Return whether nothing is required of `host`, or `see_on` has said that it has it."""
        written = None if self.are_empty else self._written(source)
        return written is None or written.replayed.get(host, -1) >= written.position

    def see_on(self, source: HostSource, host: str, position: int) -> None:
        """Remember that `host` has replayed `position`."""
        written = self._written(source)
        if written is not None:
            written.replayed[host] = position

    def written_by(self, source: HostSource) -> int | None:
        """Return the position that the client of this request has to see from now on; ``None`` if nothing was written.

        The commits that this process has made meanwhile for others are included: they may have been the same client's.
        A browser that writes by two requests at once keeps the cookie of the response that comes last, which may be
        that of the earlier commit.
        """
        written = self._written(source)
        if written is None or written.host is None:
            return None
        latest = _latest_of(source)
        if latest is None or latest.host != written.host or time.monotonic() - latest.at > _AT_ONCE_SECONDS:
            return written.position
        return max(written.position, latest.position)

    def _written(self, source: HostSource) -> _Written | None:
        own = self._current(self._own, source)
        others = self._current(self._of_others, source)
        if own is None or others is None:
            return own or others
        if own.host == others.host:
            return max(own, others, key=_position)
        return max(own, others, key=_time)

    def _current(self, known: dict[int, _Written], source: HostSource) -> _Written | None:
        if not known:
            return None
        written = known.get(id(source))
        max_age = self._limits[id(source)][0] if id(source) in self._limits else DEFAULT_MAX_AGE
        if written is not None and time.monotonic() - written.at > max_age:
            known.pop(id(source), None)
            return None
        return written


current_positions: ContextVar[Positions | None] = ContextVar("ctxdb_pgstatus_positions", default=None)
"""The `Positions` of the running code. A task inherits those of the code that has started it."""


def _note(known: dict[int, _Written], source: HostSource, host: str, position: int) -> None:
    written = known.get(id(source))
    # Positions of different masters are not comparable: what only the old one had may be lost. And what a client has
    # brought along, it had before this commit.
    if written is not None and written.host == host:
        position = max(position, written.position)
    known[id(source)] = _Written(source, host, position)


def _position(written: _Written) -> int:
    return written.position


def _time(written: _Written) -> float:
    return written.at


class _Wanted:
    """A source whose replicas are read from, and the last commit that was noted for it."""

    __slots__ = ("find", "latest")

    def __init__(self, find: Callable[[], Any]) -> None:
        self.find = find
        self.latest: _Written | None = None


# A source may be any object: it is kept by weak reference where it allows that, and compared by identity.
_wanted: list[_Wanted] = []


def want_positions(source: HostSource) -> None:
    """Have the commits that are made on this cluster from now on leave their positions."""
    _wanted[:] = [each for each in _wanted if each.find() is not None]
    if positions_wanted(source):
        return
    try:
        _wanted.append(_Wanted(ref(source)))
    except TypeError:
        _wanted.append(_Wanted(lambda: source))


def _note_latest(source: HostSource, host: str, position: int) -> None:
    if position == UNKNOWN_POSITION:
        return
    for each in _wanted:
        if each.find() is source:
            latest = each.latest
            if latest is None or latest.host != host or latest.position <= position:
                each.latest = _Written(source, host, position)


def _latest_of(source: HostSource) -> _Written | None:
    return next((each.latest for each in _wanted if each.find() is source), None)


def _begin_before_gather() -> None:
    """Let the positions of gathered tasks reach the code that waits for them, even if it has written nothing before."""
    if _wanted:
        Positions.of_task()


before_gather(_begin_before_gather)


def positions_wanted(source: HostSource) -> bool:
    """Return whether `want_positions` was called for `source`."""
    return any(each.find() is source for each in _wanted)
