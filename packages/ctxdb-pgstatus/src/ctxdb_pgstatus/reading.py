"""`Limits` and `ReadRule`: which replicas a reader is content with, and which of them it likes best."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from ctxdb_pgstatus.status import HostStatus, SyncCondition

__all__ = ["Limits", "ReadRule"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a replica may be behind.

    Attributes:
        lag_ms: the highest lag in milliseconds; ``None`` for the monitor's own limit.
        lag_bytes: the highest lag in bytes; ``None`` for the monitor's own limit.
        among: the replicas to choose from; ``None`` for all.
    """

    lag_ms: int | None = None
    lag_bytes: int | None = None
    among: Container[str] | None = None

    def admit(self, host: HostStatus, condition: SyncCondition | None) -> bool:
        """Return whether `host` will do; without a condition, a limit that is not given does not count."""
        if self.among is not None and host.host not in self.among:
            return False
        match condition:
            case None:
                return (self.lag_ms is None or self.by_time(host)) and (self.lag_bytes is None or self.by_bytes(host))
            case "time":
                return self.by_time(host)
            case "bytes":
                return self.by_bytes(host)
            case "time_or_bytes":
                return self.by_time(host) or self.by_bytes(host)
            case "time_and_bytes":
                return self.by_time(host) and self.by_bytes(host)

    def by_time(self, host: HostStatus) -> bool:
        """Return whether `host` is in sync by time."""
        if self.lag_ms is None:
            return host.in_sync_by_time
        return host.lag_ms is not None and host.lag_ms <= self.lag_ms

    def by_bytes(self, host: HostStatus) -> bool:
        """Return whether `host` is in sync by bytes."""
        if self.lag_bytes is None:
            return host.in_sync_by_bytes
        return host.lag_bytes is not None and host.lag_bytes <= self.lag_bytes


@dataclass(frozen=True, slots=True)
class ReadRule:
    """Which replicas a reader is content with, and which of them it likes best.

    Attributes:
        sync: by which lag they have to be in sync; ``None`` for any that lives.
        max_lag_ms: up to which lag in milliseconds, in the place of the source's own limit. Without `sync`, it is a
            condition of its own.
        max_lag_bytes: the same in bytes.
        near: returns how far a host is, such as ``Locality.distance``: of those that will do, the nearest are taken.
        fallback: whether the master is read from where no replica will do.
    """

    sync: SyncCondition | None = None
    max_lag_ms: int | None = None
    max_lag_bytes: int | None = None
    near: Callable[[str], int] | None = None
    fallback: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing but `sync`, which every source understands."""
        return self == ReadRule(self.sync)

    def admits(self, replica: HostStatus) -> bool:
        """Return whether a replica is fresh enough."""
        return Limits(self.max_lag_ms, self.max_lag_bytes).admit(replica, self.sync)

    def best(self, replicas: Iterable[HostStatus]) -> list[str]:
        """Return the names of those that will do and are nearest, in their order.

        One that has failed to answer since its last answer is among them only if all others have.
        """
        fit = [replica for replica in replicas if self.admits(replica)]
        fit = [replica for replica in fit if not replica.possible_dead] or fit
        if self.near is None:
            return [replica.host for replica in fit]
        distances = {replica.host: self.near(replica.host) for replica in fit}
        nearest = min(distances.values(), default=0)
        return [host for host, distance in distances.items() if distance == nearest]
