"""Which replica an endpoint answers: by lag, by WAL position, by nearness, and each in its turn."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from ctxdb_pgstatus.status import ClusterStatus, HostStatus, SyncCondition

__all__ = ["Choice", "Limits", "Locality"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request asks of a replica.

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
class Locality:
    """Where the hosts are, and where the sidecar is.

    Attributes:
        dcs: the data centre of each host.
        geos: the region of each host.
        current_dc: the data centre whose replicas are preferred; ``None`` for no preference.
        current_geo: the region whose replicas are preferred after those; ``None`` for no preference.
    """

    dcs: Mapping[str, str | None] = field(default_factory=dict)
    geos: Mapping[str, str | None] = field(default_factory=dict)
    current_dc: str | None = None
    current_geo: str | None = None

    def distance(self, host: str) -> int:
        """Return 0 for a host of the same data centre, 1 for one of the same region, else 2."""
        if self.current_dc is not None and self.dcs.get(host) == self.current_dc:
            return 0
        if self.current_geo is not None and self.geos.get(host) == self.current_geo:
            return 1
        return 2

    def nearest(self, hosts: Sequence[HostStatus]) -> Sequence[HostStatus]:
        """Return those of `hosts` that are nearest, in their order."""
        if self.current_dc is None and self.current_geo is None:
            return hosts
        best = min((self.distance(host.host) for host in hosts), default=0)
        return [host for host in hosts if self.distance(host.host) == best]


class Choice:
    """Chooses replicas, each in its turn; the master where none will do.

    Of those that will do, a replica that has failed to answer since its last answer is chosen only if all others have;
    and of those, the nearest.
    """

    def __init__(self, locality: Locality) -> None:
        self._locality = locality
        conditions: tuple[SyncCondition | None, ...] = (None, "time", "bytes", "time_or_bytes", "time_and_bytes")
        self._turns = {condition: count() for condition in conditions}
        # What was found for the status that was last asked about.
        self._status: ClusterStatus | None = None
        self._found: dict[SyncCondition | None, Sequence[HostStatus]] = {}

    def replica(self, status: ClusterStatus, condition: SyncCondition | None, limits: Limits | None) -> str | None:
        """Return a replica's name, the master's if none will do, ``None`` without a master."""
        if limits is not None:
            hosts = self._best([host for host in status.replicas() if limits.admit(host, condition)])
        else:
            if self._status is not status:
                self._status = status
                self._found = {each: self._best(status.replicas(each)) for each in self._turns}
            hosts = self._found[condition]
        if not hosts:
            return status.master
        return hosts[next(self._turns[condition]) % len(hosts)].host

    def most_in_sync(self, status: ClusterStatus, limits: Limits) -> str | None:
        """Return the replica that is the fewest bytes behind; of several the first."""
        known = [host for host in status.replicas() if host.lag_bytes is not None and limits.admit(host, "bytes")]
        hosts = _responsive(known)
        if not hosts:
            return status.master
        return min(hosts, key=lambda host: host.lag_bytes or 0).host

    def _best(self, hosts: Sequence[HostStatus]) -> Sequence[HostStatus]:
        return self._locality.nearest(_responsive(hosts))


def _responsive(hosts: Sequence[HostStatus]) -> Sequence[HostStatus]:
    return [host for host in hosts if not host.possible_dead] or hosts
