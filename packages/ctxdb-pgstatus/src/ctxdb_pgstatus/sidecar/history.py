"""`History`: the lags of the last minutes and the last changes, for the status page."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ctxdb_pgstatus.status import ClusterStatus

__all__ = ["Change", "History", "LagSample", "changes_between"]

# How many changes are kept.
_CHANGES = 20


@dataclass(frozen=True, slots=True)
class LagSample:
    """The lag of one host at one time.

    Attributes:
        at: the time (UTC).
        lag_ms: the lag in milliseconds; ``None`` if it was not known, or if the host was dead or no replica.
    """

    at: datetime
    lag_ms: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the cluster.

    Attributes:
        at: when the change was noticed (UTC).
        text: the change in words.
    """

    at: datetime
    text: str


class History:
    """Keeps the last changes, and the lags of each host for as long as the plots reach back.

    Args:
        span: how far the plots reach back.
    """

    def __init__(self, span: timedelta = timedelta(minutes=5)) -> None:
        self.span = span
        self._samples: dict[str, deque[LagSample]] = {}
        self._changes: deque[Change] = deque(maxlen=_CHANGES)
        self._last: datetime | None = None
        self.changes_in_all: int = 0

    def add(self, status: ClusterStatus) -> None:
        """Take a sample of each host, unless this status has been sampled already."""
        if status.at == self._last:
            return
        self._last = status.at
        for name in self._samples.keys() - {host.host for host in status.hosts}:
            # The host has left the list of hosts.
            del self._samples[name]
        for host in status.hosts:
            samples = self._samples.setdefault(host.host, deque())
            is_replica = host.alive and host.role == "replica"
            samples.append(LagSample(status.at, host.lag_ms if is_replica else None))
            # The clock may have been set back since the first sample.
            while not status.at - self.span <= samples[0].at <= status.at:
                samples.popleft()

    def note(self, old: ClusterStatus, new: ClusterStatus) -> None:
        """Note the changes between two statuses. A monitor calls this at each change (``HostMonitor.on_change``)."""
        for text in changes_between(old, new):
            self._changes.appendleft(Change(new.at, text))
            self.changes_in_all += 1

    def samples(self, host: str) -> Sequence[LagSample]:
        """Return the samples of a host, the oldest first."""
        return tuple(self._samples.get(host, ()))

    def changes(self) -> Sequence[Change]:
        """Return the last changes, the latest first."""
        return tuple(self._changes)


def changes_between(old: ClusterStatus, new: ClusterStatus) -> list[str]:
    """Return in words how two statuses differ: in the hosts that are alive, their roles, and the master."""
    texts = []
    before = {host.host: host for host in old.hosts}
    for host in new.hosts:
        was = before.get(host.host)
        if was is None or (was.alive, was.role) == (host.alive, host.role):
            continue
        if not host.alive:
            texts.append(f"{host.host} does not answer" + (f": {host.error}" if host.error else ""))
        elif not was.alive:
            texts.append(f"{host.host} answers as a {host.role}")
        else:
            texts.append(f"{host.host} has become a {host.role}")
    if new.master != old.master:
        texts.append("there is no master" if new.master is None else f"{new.master} is the master")
    return texts
