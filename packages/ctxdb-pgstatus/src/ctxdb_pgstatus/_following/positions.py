"""`Positions`: up to which WAL positions the running code has written, which its next reads have to see.

The flow: a commit leaves the position after it by `note`; `required` tells a reader which position its replica must
have replayed; `see_on` remembers that a replica has. `current_positions` holds the `Positions` of the running code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from typing import Any
from weakref import ref

from ctxdb_core.adapters import before_gather
from ctxdb_pgstatus.source import HostSource

__all__ = [
    "DEFAULT_MAX_AGE",
    "UNKNOWN_POSITION",
    "Positions",
    "current_positions",
    "knows_timeline",
    "learn_timeline",
    "positions_wanted",
    "want_positions",
]

DEFAULT_MAX_AGE = 300.0
"""For how many seconds a write is remembered."""

UNKNOWN_POSITION = (1 << 64) - 1
"""Stands for a write whose position is not known. No replica has replayed this position, so the master is read from."""

_AT_ONCE_SECONDS = 10.0
"""Two requests whose commits are at most so far apart are taken for requests that one client may have sent at once."""


class _Written:
    """Up to where a cluster was written.

    Attributes:
        source: the cluster.
        host: the master that took the write; ``None`` if a client has brought the position along.
        position: the WAL position in bytes after the commit.
        timeline: the timeline of that WAL; 0 if it is not known.
        at: when this became known, by ``time.monotonic()``.
        replayed: by hosts, the position that a host was found to have replayed, and when its server was started
            (``None`` if that was not known).
    """

    __slots__ = ("at", "host", "position", "replayed", "source", "timeline")

    def __init__(self, source: HostSource, host: str | None, position: int, timeline: int) -> None:
        self.source = source
        self.host = host
        self.position = position
        self.timeline = timeline
        self.at = time.monotonic()
        self.replayed: dict[str, tuple[int, datetime | None]] = {}


class Positions:
    """What the code of one request has written; outside of requests, the code of one task."""

    __slots__ = ("__weakref__", "_limits", "_of_children", "_own", "_parent", "_task")

    def __init__(self) -> None:
        # The keys of these three are the ids of sources. There is hardly ever more than one source.
        self._limits: dict[int, tuple[float, float]] = {}
        self._own: dict[int, _Written] = {}
        # What tasks have written that this code has started, and tasks of these.
        self._of_children: dict[int, _Written] = {}
        # Returns the task that the positions are of; ``None`` for those of a request, which all of its tasks share.
        self._task: Callable[[], object] | None = None
        # Returns the positions of the code that has started this task.
        self._parent: Callable[[], Positions | None] = lambda: None

    @classmethod
    def of_task(cls) -> Positions:
        """Return the positions of the running code: those of its request, or else those of the current task.

        A task begins with what the code that started it had written by then. What the task writes later, the next reads
        of that code have to see as well; but not those of other tasks that the same code has started. So two requests
        have nothing to do with each other, although both have inherited the context in which their server was started.
        """
        found = current_positions.get()
        task = asyncio.current_task()
        if found is not None and (found._task is None or found._task() is task):  # noqa: SLF001 - its own class
            return found
        positions = cls()
        positions._task = ref(task) if task is not None else lambda: None
        if found is not None:
            positions._own = dict(found._own)  # noqa: SLF001 - its own class
            positions._parent = ref(found)
        current_positions.set(positions)
        return positions

    def limit(self, source: HostSource, *, max_age: float, wait: float) -> None:
        """Set how long the writes on one cluster count.

        Args:
            source: the cluster.
            max_age: for how many seconds a write is remembered.
            wait: for how many seconds to wait for a replica that has replayed a write.
        """
        self._limits[id(source)] = max_age, wait

    def wait_for(self, source: HostSource) -> float | None:
        """Return for how many seconds to wait for a replica; ``None`` if `limit` has set nothing for this cluster."""
        limits = self._limits.get(id(source))
        return None if limits is None else limits[1]

    def bring(self, source: HostSource, position: int, timeline: int = 0) -> None:
        """Let reads see a position that the client of a request has brought along, with its timeline."""
        self._own[id(source)] = _Written(source, None, position, timeline)

    def note(self, source: HostSource, host: str, position: int, timeline: int = 0) -> None:
        """Remember a commit.

        Args:
            source: the cluster.
            host: the master, on which the commit was made.
            position: a WAL position behind the commit record.
            timeline: the timeline of that position; 0 if it is not known. Then it is taken for the latest one of which
                the source is known to know.
        """
        timeline = timeline or _known_timeline(source)
        _note(self._own, source, host, position, timeline)
        _note_latest(source, host, position, timeline)
        parent = self._parent()
        while parent is not None:
            _note(parent._of_children, source, host, position, timeline)  # noqa: SLF001 - its own class
            parent = parent._parent()  # noqa: SLF001 - its own class

    def required(self, source: HostSource) -> int | None:
        """Return the position that a reader has to see; ``None`` if nothing was written of late."""
        written = self._written(source)
        return None if written is None else written.position

    def timeline(self, source: HostSource) -> int:
        """Return the timeline of the position that a reader has to see; 0 if it is not known."""
        written = self._written(source)
        return 0 if written is None else written.timeline

    @property
    def are_empty(self) -> bool:
        """Whether nothing was written, on any cluster."""
        return not self._own and not self._of_children

    def is_seen_on(self, source: HostSource, host: str, server: datetime | None = None) -> bool:
        """Return whether a reader may go to `host`: nothing was written, or `see_on` has said that `host` has it.

        Args:
            source: the cluster.
            host: the host.
            server: when the server was started that the reader's connection leads to, if there is one: another server
                by this name, or the same one after a crash, may have replayed less than the one that `see_on` was told
                of.
        """
        written = None if self.are_empty else self._written(source)
        if written is None:
            return True
        position, seen_on = written.replayed.get(host, (-1, None))
        return position >= written.position and (server is None or seen_on in (None, server))

    def see_on(self, source: HostSource, host: str, position: int, server: datetime | None) -> None:
        """Remember that the server of `host` which was started at `server` has replayed `position`."""
        written = self._written(source)
        if written is not None:
            written.replayed[host] = position, server

    def written_by(self, source: HostSource) -> int | None:
        """Return the position that the client of this request has to see from now on; ``None`` if nothing was written.

        Commits that this process has made meanwhile for other requests are included, as these may be of the same
        client. A browser that writes by two requests at once keeps the cookie of the response that comes last, and that
        response may be the one of the earlier commit.
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
        of_children = self._current(self._of_children, source)
        if own is None or of_children is None:
            return own or of_children
        if own.host == of_children.host:
            return max(own, of_children, key=_position)
        # Positions of different masters do not compare: the later write counts.
        return max(own, of_children, key=_time)

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


def _note(known: dict[int, _Written], source: HostSource, host: str, position: int, timeline: int) -> None:
    written = known.get(id(source))
    # Positions of different masters do not compare, and a write that only the old master had may be lost: the new one
    # replaces it. So does it replace a position that the client has brought along, which is older than this commit.
    if written is not None and written.host == host:
        position = max(position, written.position)
    known[id(source)] = _Written(source, host, position, timeline)


def _position(written: _Written) -> int:
    return written.position


def _time(written: _Written) -> float:
    return written.at


class _ReadSource:
    """A source whose replicas are read from.

    Attributes:
        find: returns the source; ``None`` if it is gone.
        latest: the last commit of this process that was noted for the source.
        timeline: the highest timeline of which the source is known to know.
    """

    __slots__ = ("find", "latest", "timeline")

    def __init__(self, find: Callable[[], Any]) -> None:
        self.find = find
        self.latest: _Written | None = None
        self.timeline = 0


# The sources whose replicas are read from. Without a reader, no commit is asked for its position. A source may be any
# object, and need not be hashable: so this is a list, and its entries are compared by identity.
_read_sources: list[_ReadSource] = []


def want_positions(source: HostSource) -> None:
    """Have each later commit on this cluster leave its position, as replicas of the cluster are going to be read."""
    _read_sources[:] = [each for each in _read_sources if each.find() is not None]
    if positions_wanted(source):
        return
    try:
        _read_sources.append(_ReadSource(ref(source)))
    except TypeError:
        # The object allows no weak reference.
        _read_sources.append(_ReadSource(lambda: source))


def _note_latest(source: HostSource, host: str, position: int, timeline: int) -> None:
    if position == UNKNOWN_POSITION:
        # It would send the reads of all clients to the master.
        return
    for each in _read_sources:
        if each.find() is source:
            latest = each.latest
            if latest is None or latest.host != host or latest.position <= position:
                each.latest = _Written(source, host, position, timeline)
    learn_timeline(source, timeline)


def knows_timeline(source: HostSource, timeline: int) -> bool:
    """Return whether `learn_timeline` was called for `source` with this timeline, or a later one."""
    return _known_timeline(source) >= timeline


def _known_timeline(source: HostSource) -> int:
    return next((each.timeline for each in _read_sources if each.find() is source), 0)


def learn_timeline(source: HostSource, timeline: int) -> None:
    """Note that `source` knows of a timeline: a commit was made on it, or the hosts were asked since one was."""
    for each in _read_sources:
        if each.find() is source:
            each.timeline = max(each.timeline, timeline)


def _latest_of(source: HostSource) -> _Written | None:
    return next((each.latest for each in _read_sources if each.find() is source), None)


def _begin_before_gather() -> None:
    """Give the code that is about to gather tasks `Positions` of its own, so that theirs find a parent to report to."""
    if _read_sources:
        Positions.of_task()


before_gather(_begin_before_gather)


def positions_wanted(source: HostSource) -> bool:
    """Return whether `want_positions` was called for `source`."""
    return any(each.find() is source for each in _read_sources)
