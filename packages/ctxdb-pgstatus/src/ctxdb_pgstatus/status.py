"""`ClusterStatus`: all that is known of a cluster at one moment.

It is immutable. A newer status takes its place as a whole, so that any thread may read it without a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

__all__ = [
    "SYNC_CONDITIONS",
    "ClusterStatus",
    "Fault",
    "HostStatus",
    "Promotion",
    "Role",
    "SyncCondition",
    "nearest",
    "responsive",
]

Role = Literal["master", "replica"]
"""What a host says that it is: ``"master"`` for a primary, ``"replica"`` for a standby, which is in recovery."""

SyncCondition = Literal["time", "bytes", "time_or_bytes", "time_and_bytes"]
"""By which lag a replica has to be in sync."""

SYNC_CONDITIONS: tuple[SyncCondition | None, ...] = (None, *get_args(SyncCondition))
"""Each condition; ``None`` is that of every living replica."""

Fault = Literal["stranger", "shared_name", "rival", "stale"]
"""Why a living host is not what it says:

- ``"stranger"``: the host is of another cluster.
- ``"shared_name"``: several servers take turns behind the host's name.
- ``"rival"``: the host is a primary on the same timeline as another primary.
- ``"stale"``: the host is a primary on a timeline that a promotion has left.
"""


@dataclass(frozen=True, slots=True)
class Promotion:
    """How much of a timeline a host had replayed when it was promoted, or followed a promoted host to a new timeline.

    Attributes:
        timeline: the timeline that the host has left.
        position: the WAL position in bytes up to which the host had replayed that timeline at least.
    """

    timeline: int
    position: int


@dataclass(frozen=True, slots=True)
class HostStatus:
    """One host, as it was at its last poll.

    Attributes:
        host: the host's name, as the user wrote it.
        alive: whether the host answers, or refuses the monitor and so shows that it is there. A host that has just
            begun to fail counts as alive until it has failed `max_fails` times, or kept silent for a poll interval.
        role: what the host says that it is, or said last; ``None`` if the host is not alive, or has not told yet. Two
            hosts may both say "master": `ClusterStatus.master` names the true master.
        timeline: the timeline that the host writes, or receives.
        position: the WAL position in bytes up to which a master has inserted, or a replica has replayed.
        lag_ms: how far a replica is behind in milliseconds; 0 for the master; ``None`` if unknown.
        lag_bytes: how far a replica is behind in bytes; 0 for the master; ``None`` if unknown.
        since: the time (UTC) from which on the host has been dead, or alive in this role.
        error: the last error of a poll, without secrets, also if the host is alive again; ``None`` if no poll failed.
        in_sync_by_time: whether `lag_ms` is within the monitor's limit.
        in_sync_by_bytes: whether `lag_bytes` is within the monitor's limit.
        takes_reads: whether readers are sent to the host if it is a replica.
        fault: why the host is not what it says; ``None`` if it is.
        system_identifier: identifies the database cluster that the host serves (``pg_control_system()``); ``None`` if
            unknown.
        started_at: when the host's server was started. A change of this time tells that another server answers by the
            name, or that the server has restarted.
        promotion: how much of its former timeline the host had replayed when it left that; ``None`` if no such change
            was seen.
        possible_dead: whether the host counts as alive although the last attempt to ask it has failed.
    """

    host: str
    alive: bool
    role: Role | None
    since: datetime
    timeline: int | None = None
    position: int | None = None
    lag_ms: int | None = None
    lag_bytes: int | None = None
    error: str | None = None
    in_sync_by_time: bool = False
    in_sync_by_bytes: bool = False
    takes_reads: bool = True
    fault: Fault | None = None
    system_identifier: int | None = None
    started_at: datetime | None = None
    possible_dead: bool = False
    promotion: Promotion | None = None

    def in_sync(self, condition: SyncCondition | None) -> bool:
        """Return whether the host is in sync by `condition`; every host is if that is ``None``."""
        match condition:
            case None:
                return True
            case "time":
                return self.in_sync_by_time
            case "bytes":
                return self.in_sync_by_bytes
            case "time_or_bytes":
                return self.in_sync_by_time or self.in_sync_by_bytes
            case "time_and_bytes":
                return self.in_sync_by_time and self.in_sync_by_bytes


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What is known of a cluster at one moment.

    Attributes:
        hosts: all hosts, in the order in which they were named.
        master: the master's name; ``None`` if there is no master.
        at: when this status was put together (UTC).
    """

    hosts: tuple[HostStatus, ...]
    master: str | None
    at: datetime
    _replicas: dict[SyncCondition | None, tuple[HostStatus, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        replicas = [host for host in self.hosts if host.alive and host.role == "replica" and host.takes_reads]
        for each in SYNC_CONDITIONS:
            self._replicas[each] = tuple(host for host in replicas if host.in_sync(each))

    def replicas(self, condition: SyncCondition | None = None) -> tuple[HostStatus, ...]:
        """Return the living replicas that take reads and are in sync by `condition`, in the order of `hosts`."""
        return self._replicas[condition]


def responsive(hosts: Sequence[HostStatus]) -> Sequence[HostStatus]:
    """Return the hosts out of `hosts` whose last poll was answered; all of them if that holds for none."""
    return [host for host in hosts if not host.possible_dead] or hosts


def nearest(hosts: Sequence[HostStatus], distance: Callable[[str], int]) -> Sequence[HostStatus]:
    """Return the hosts out of `hosts` whose distance is the least. `distance` is given their names."""
    distances = [distance(host.host) for host in hosts]
    return [host for host, each in zip(hosts, distances, strict=True) if each == min(distances)]
