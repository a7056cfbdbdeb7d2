"""What happened in the last minutes: each host's lag, for the plots, and the last changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ctxdb_pgstatus.status import ClusterStatus

__all__ = ["Change", "History", "Sample", "changes_between"]

_CHANGES = 20


@dataclass(frozen=True, slots=True)
class Sample:
    """The lag of one host at one time.

    Attributes:
        at: when (UTC).
        lag_ms: the lag in milliseconds; ``None`` if it was not known, or the host was dead, or no replica.
    """

    at: datetime
    lag_ms: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """Something that became different.

    Attributes:
        at: when it was noticed (UTC).
        text: what, in words.
    """

    at: datetime
    text: str


class History:
    """Keeps samples for as long as the plots reach back, and the last changes."""

    def __init__(self, span: timedelta = timedelta(minutes=5)) -> None:
        self.span = span
        self._samples: dict[str, deque[Sample]] = {}
        self._changes: deque[Change] = deque(maxlen=_CHANGES)
        self._last: datetime | None = None
        self.changes_in_all: int = 0

    def add(self, status: ClusterStatus) -> None:
        """Take a sample of each host, unless this status has been sampled already."""
        if status.at == self._last:
            return
        self._last = status.at
        for host in status.hosts:
            samples = self._samples.setdefault(host.host, deque())
            is_replica = host.alive and host.role == "replica"
            samples.append(Sample(status.at, host.lag_ms if is_replica else None))
            while samples and samples[0].at < status.at - self.span:
                samples.popleft()

    def note(self, old: ClusterStatus, new: ClusterStatus) -> None:
        """Note what differs between two statuses: to be called at each change."""
        for text in changes_between(old, new):
            self._changes.appendleft(Change(new.at, text))
            self.changes_in_all += 1

    def samples(self, host: str) -> Sequence[Sample]:
        """Return the samples of a host, the oldest first."""
        return tuple(self._samples.get(host, ()))

    def changes(self) -> Sequence[Change]:
        """Return the last changes, the latest first."""
        return tuple(self._changes)


def changes_between(old: ClusterStatus, new: ClusterStatus) -> list[str]:
    """Return in words what differs in who is alive, in which role, and who is the master."""
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
