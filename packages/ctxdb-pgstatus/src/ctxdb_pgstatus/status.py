"""What is known of a cluster at one moment: immutable, replaced as a whole, and so read without a lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

__all__ = ["ClusterStatus", "Fault", "HostStatus", "Promotion", "Role", "SyncCondition"]

Role = Literal["master", "replica"]
"""What a host is: ``"master"`` takes writes, ``"replica"`` is in recovery."""

SyncCondition = Literal["time", "bytes", "time_or_bytes", "time_and_bytes"]
"""By which lag a replica has to be in sync."""


Fault = Literal["stranger", "shared_name", "rival", "stale"]
"""Why a living host is not what it says: it is of another cluster; several servers take turns behind its name; it takes
writes on the same timeline as another one; or it says "master" on a timeline that a promotion has left."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """What a host had replayed before it went on on another timeline.

    Attributes:
        timeline: the timeline before.
        position: up to where at least, in bytes.
    """

    timeline: int
    position: int


@dataclass(frozen=True, slots=True)
class HostStatus:
    """One host, as it was at its last poll.

    Attributes:
        host: its name, as the user wrote it.
        alive: whether it answers, or refuses the monitor and so shows that it is there. One that has just begun to fail
            counts as alive until it has failed `max_fails` times, or kept silent for a poll interval.
        role: what it says it is, or said last; ``None`` if it is not alive, or has not told yet. Two hosts may both say
            "master": `ClusterStatus.master` is the true one.
        timeline: the timeline that it writes, or receives.
        position: the WAL position in bytes: what a master has inserted, what a replica has replayed.
        lag_ms: how far a replica is behind in milliseconds; 0 for the master; ``None`` if unknown.
        lag_bytes: how far a replica is behind in bytes; 0 for the master; ``None`` if unknown.
        since: since when it has been alive, or not, in this role (UTC).
        error: the last error of a poll, without secrets, also if the host is alive again; ``None`` if there was none.
        in_sync_by_time: whether `lag_ms` is within the monitor's limit.
        in_sync_by_bytes: whether `lag_bytes` is within the monitor's limit.
        takes_reads: whether readers are sent to it if it is a replica.
        fault: why it is not what it says; ``None`` if it is.
        system_identifier: that of the database cluster that it serves; ``None`` if unknown.
        started_at: when its server was started: another time, and it is another server, or has restarted.
        promotion: what it had replayed when it was promoted last, if that was seen.
        possible_dead: whether it counts as alive, and has not answered since it last did: it may be about to count as
            dead.
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
        """Return whether `condition` holds; ``None`` always does."""
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
    """All hosts of a cluster, in the order in which they were named.

    Attributes:
        hosts: each host.
        master: the one true master's name; ``None`` if there is none.
        at: when this was put together (UTC).
    """

    hosts: tuple[HostStatus, ...]
    master: str | None
    at: datetime
    _replicas: dict[SyncCondition | None, tuple[HostStatus, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        replicas = [host for host in self.hosts if host.alive and host.role == "replica" and host.takes_reads]
        conditions: Sequence[SyncCondition | None] = (None, "time", "bytes", "time_or_bytes", "time_and_bytes")
        self._replicas.update({each: tuple(host for host in replicas if host.in_sync(each)) for each in conditions})

    def replicas(self, condition: SyncCondition | None = None) -> tuple[HostStatus, ...]:
        """Return the living replicas that take reads and are in sync by `condition`, in their order."""
        return self._replicas[condition]
