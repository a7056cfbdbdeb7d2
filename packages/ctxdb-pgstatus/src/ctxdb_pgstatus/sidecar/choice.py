"""`Choice`: which replica an endpoint names, by lag, by WAL position and by distance, each in its turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from ctxdb_pgstatus.locality import Locality
from ctxdb_pgstatus.reading import LagLimits
from ctxdb_pgstatus.status import SYNC_CONDITIONS, ClusterStatus, HostStatus, SyncCondition, responsive

__all__ = ["Choice"]


class Choice:
    """Chooses replicas, each in its turn; the master if no replica will do.

    Of the replicas that will do, those are preferred whose last poll was answered; of these, the nearest are chosen.
    """

    def __init__(self, locality: Locality) -> None:
        self._locality = locality
        self._turns = {condition: count() for condition in SYNC_CONDITIONS}
        # The status of the last call, and the replicas that were found in it, for each way to be in sync.
        self._status: ClusterStatus | None = None
        self._found: dict[SyncCondition | None, Sequence[HostStatus]] = {}

    def replica(self, status: ClusterStatus, condition: SyncCondition | None, limits: LagLimits | None) -> str | None:
        """Return a replica's name; the master's if no replica will do; ``None`` without a master."""
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
        """Return the name of the replica that is the fewest bytes behind, of several the first; else the master's."""
        known = [host for host in status.replicas() if host.lag_bytes is not None and limits.admit(host, "bytes")]
        hosts = responsive(known)
        if not hosts:
            return status.master
        return min(hosts, key=lambda host: host.lag_bytes or 0).host

    def _best(self, hosts: Sequence[HostStatus]) -> Sequence[HostStatus]:
        return self._locality.nearest(responsive(hosts))
