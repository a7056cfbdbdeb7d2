"""`Answer`: what a host says of itself; and `Server`: which server it is that answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

__all__ = ["Answer", "Server", "Slot", "Subscription"]


@dataclass(frozen=True, slots=True)
class Server:
    """One run of one PostgreSQL server, from its start to its end, by whatever name it is reached.

    Attributes:
        started_at: when the server's postmaster started (``pg_postmaster_start_time()``), to the microsecond: no two
            servers of a cluster are expected to share this time.
        system_identifier: identifies the database cluster (``pg_control_system()``). The standbys of a primary share
            it, and no other cluster has it. ``None`` if the monitor's role may not read it.
        address: the address of the server's end of the connection; ``None`` for a Unix socket.
        port: the port of the server's end of the connection; ``None`` for a Unix socket.
    """

    started_at: datetime
    system_identifier: int | None = None
    address: str | None = None
    port: int | None = None

    def is_run_of(self, other: Server) -> bool:
        """Return whether both are the same run of one server. The address by which it was reached does not matter."""
        systems = {self.system_identifier, other.system_identifier} - {None}
        return self.started_at == other.started_at and len(systems) <= 1

    def is_restart_of(self, other: Server) -> bool:
        """Return whether this may be another run of the same server: it has the same address, port and cluster."""
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
        is_active: whether a subscriber receives by the slot now.
        confirmed: the publisher's WAL position up to which the subscriber has confirmed to have everything
            (``confirmed_flush_lsn``).
    """

    is_active: bool
    confirmed: int | None


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription of a logical subscriber. All positions are positions of the publisher's WAL.

    Attributes:
        slot: the name of the subscription's slot on the publisher.
        applied: the end of the last commit that the subscriber has applied; ``None`` if the monitor's role may not read
            that.
        reported: the position that the apply worker last reported to the publisher; ``None`` if no worker runs.
        has_all_tables: whether the initial copy of every table has ended.
    """

    slot: str
    applied: int | None
    reported: int | None = None
    has_all_tables: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host said of itself.

    Attributes:
        in_recovery: whether the host is a standby.
        timeline: the timeline that the host writes, or receives; ``None`` if the host does not tell.
        position: the WAL position in bytes that a primary has inserted, or a standby has replayed; ``None`` if the
            standby has replayed nothing since its start, or the host does not tell.
        replay_age_ms: how many milliseconds ago the commit was made that a standby replayed last. The commit's time is
            by the primary's clock, and the time of the answer by the standby's.
        asked_at: when the host was asked, by the event loop's clock.
        answered_at: when its answer had come, by the same clock.
        highest_known_timeline: the highest timeline whose history file the host has, though the host may not replay
            that timeline; ``None`` if this was not looked for.
        replayed_commit_at: when the commit was made that a standby replayed last, by the primary's clock, in seconds
            since 1970.
        clock: the time of the answer by the host's own clock, in seconds since 1970.
        takes_writes: whether a primary lets clients write. It does not if it is fenced, by
            ``default_transaction_read_only`` in its configuration.
        standbys: how many standbys receive the host's WAL.
        lag_ms: a replica's lag in milliseconds if the service itself tells it, as Amazon Aurora does; such a host tells
            no position.
        received: the WAL position up to which a standby has received, and which it may not have replayed yet.
        slots: the logical replication slots of a primary, by their names, if they are asked for.
        subscriptions: the subscriptions of a logical subscriber, if they are asked for.
        server: the server that answered; ``None`` if that is not known.
    """

    in_recovery: bool
    timeline: int | None
    position: int | None
    replay_age_ms: float | None
    asked_at: float
    highest_known_timeline: int | None = None
    replayed_commit_at: float | None = None
    clock: float | None = None
    takes_writes: bool = True
    standbys: int = 0
    lag_ms: float | None = None
    received: int | None = None
    slots: Mapping[str, Slot] = field(default_factory=dict)
    subscriptions: tuple[Subscription, ...] = ()
    server: Server | None = None
    answered_at: float = math.inf
