"""Which replica an endpoint answers: by lag, by WAL position, by nearness, and each in its turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from ctxdb_pgstatus.locality import Locality
from ctxdb_pgstatus.reading import LagLimits
from ctxdb_pgstatus.status import ClusterStatus, HostStatus, SyncCondition

__all__ = ["Choice"]


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

    def replica(self, status: ClusterStatus, condition: SyncCondition | None, limits: LagLimits | None) -> str | None:
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

    def most_in_sync(self, status: ClusterStatus, limits: LagLimits) -> str | None:
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
