"""What a host says of itself, and which server it was that said so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

__all__ = ["Answer", "Server", "Slot", "Subscription"]


@dataclass(frozen=True, slots=True)
class Server:
    """One run of one PostgreSQL server, whatever names lead to it.

    Attributes:
        started_at: when its postmaster started: to the microsecond, so that no two servers of a cluster share it.
        system_identifier: the cluster's, which its standbys share and no other cluster has; ``None`` if the monitor's
            role may not read it.
        address: where the server thinks it was reached; ``None`` if it was by a Unix socket.
        port: the port there.
    """

    started_at: datetime
    system_identifier: int | None = None
    address: str | None = None
    port: int | None = None

    def is_run_of(self, other: Server) -> bool:
        """Return whether both are the same run of the same server; the way by which it was reached does not matter."""
        systems = {self.system_identifier, other.system_identifier} - {None}
        return self.started_at == other.started_at and len(systems) <= 1

    def is_restart_of(self, other: Server) -> bool:
        """Return whether this may be another run of the same server: at the same place, with the same data."""
        return (self.system_identifier, self.address, self.port) == (
            other.system_identifier,
            other.address,
            other.port,
        )

    def __str__(self) -> str:
        place = "a Unix socket" if self.address is None else f"{self.address}, port {self.port}"
        return f"{place}, started {self.started_at.isoformat(timespec='seconds')}"


@dataclass(frozen=True, slots=True)
class Slot:
    """A logical replication slot of a publisher.

    Attributes:
        is_active: whether a subscriber receives by it now.
        confirmed: up to where the subscriber has confirmed that it has everything.
    """

    is_active: bool
    confirmed: int | None


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription of a logical subscriber.

    Attributes:
        slot: the name of its slot on the publisher.
        applied: up to where it has applied the publisher's commits; ``None`` if the monitor's role may not read that.
        reported: up to where its worker has told the publisher that it has everything; ``None`` if none is at work.
        has_all_tables: whether no table is being copied.
    """

    slot: str
    applied: int | None
    reported: int | None = None
    has_all_tables: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host said of itself.

    Attributes:
        in_recovery: whether it is a replica.
        timeline: the timeline that it writes, or receives; ``None`` if it does not tell.
        position: the WAL position that it has inserted, or replayed; ``None`` if it has replayed nothing, or does not
            tell.
        replay_age_ms: how long ago, by its own clock and that of the primary, the commit was made that a replica
            replayed last.
        asked_at: when it was asked, by the event loop's clock.
        heard_of: the highest timeline whose history it has, though it may not replay it; ``None`` if not looked for.
        replayed_commit_at: when the commit was made that a replica replayed last, by the primary's clock, in seconds
            since 1970.
        clock: the time by its own clock, in seconds since 1970.
        takes_writes: whether a primary lets clients write; one that is fenced by ``default_transaction_read_only`` in
            its configuration does not.
        standbys: how many standbys are attached to it.
        lag_ms: a replica's lag in milliseconds where the service itself tells it (Amazon Aurora); it then has no
            position.
        received: the WAL position up to which a replica has received, and may have still to replay.
        slots: the logical replication slots of a primary, by their names, where they are asked for.
        subscriptions: those of a logical subscriber, where they are asked for.
        server: which server it was; ``None`` if that is not known.
    """

    in_recovery: bool
    timeline: int | None
    position: int | None
    replay_age_ms: float | None
    asked_at: float
    heard_of: int | None = None
    replayed_commit_at: float | None = None
    clock: float | None = None
    takes_writes: bool = True
    standbys: int = 0
    lag_ms: float | None = None
    received: int | None = None
    slots: Mapping[str, Slot] = field(default_factory=dict)
    subscriptions: tuple[Subscription, ...] = ()
    server: Server | None = None
