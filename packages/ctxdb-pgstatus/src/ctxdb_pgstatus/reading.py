"""`LagLimits` and `ReadRule`: which replicas will do for a reader, and which of them are preferred."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from ctxdb_pgstatus.status import HostStatus, SyncCondition, nearest, responsive

__all__ = ["LagLimits", "ReadRule"]


@dataclass(frozen=True, slots=True)
class LagLimits:
    """How far a replica may be behind.

    Attributes:
        lag_ms: the highest lag in milliseconds; ``None`` for the monitor's own limit.
        lag_bytes: the highest lag in bytes; ``None`` for the monitor's own limit.
        among: the names of the replicas to choose from; ``None`` for all.
    """

    lag_ms: int | None = None
    lag_bytes: int | None = None
    among: Container[str] | None = None

    def admit(self, host: HostStatus, condition: SyncCondition | None) -> bool:
        """Return whether `host` is within the limits.

        Args:
            host: a replica.
            condition: by which lag `host` has to be in sync. With ``None``, each limit that is given has to be kept;
                the monitor's own limits do not count.
        """
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
    """Which replicas will do for a reader, and which of them are preferred.

    Attributes:
        sync: by which lag a replica has to be in sync; ``None`` if every living replica will do.
        max_lag_ms: up to which lag in milliseconds a replica will do, in the place of the source's own limit. Without
            `sync`, this is a condition of its own.
        max_lag_bytes: up to which lag in bytes a replica will do, likewise.
        near: returns how far a host is, as ``Locality.distance`` does. Of the replicas that will do, the nearest are
            taken.
        fallback: whether the master is read from where no replica will do.
    """

    sync: SyncCondition | None = None
    max_lag_ms: int | None = None
    max_lag_bytes: int | None = None
    near: Callable[[str], int] | None = None
    fallback: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the rule says no more than `sync`, which every `HostSource` understands."""
        return self == ReadRule(self.sync)

    def admits(self, replica: HostStatus) -> bool:
        """Return whether the lag of a replica is within the limits of the rule."""
        return LagLimits(self.max_lag_ms, self.max_lag_bytes).admit(replica, self.sync)

    def best(self, replicas: Iterable[HostStatus]) -> list[str]:
        """Return the names of the replicas that will do and are nearest, in the order of `replicas`.

        A replica whose last poll has failed is among them only if that holds for all replicas that will do.
        """
        fit = responsive([replica for replica in replicas if self.admits(replica)])
        if self.near is not None:
            fit = nearest(fit, self.near)
        return [replica.host for replica in fit]
