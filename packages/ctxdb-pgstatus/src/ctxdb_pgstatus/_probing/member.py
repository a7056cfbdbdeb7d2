"""`Member`: a host of a `HostMonitor`, with what is known of its lag."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

from ctxdb_pgstatus._probing.answer import Answer, Server
from ctxdb_pgstatus._probing.lag import Lag, Reference
from ctxdb_pgstatus._probing.watch import Watch
from ctxdb_pgstatus.status import Fault, HostStatus

__all__ = ["Member"]


class Member:
    """A host of a `HostMonitor`, and how far the host is behind if it is a replica.

    Attributes:
        watch: asks the host.
        takes_reads: whether readers are sent to the host if it is a replica.
        may_be_promoted: whether the host may become the master.
        is_subscriber: whether the host receives the cluster's data by logical replication. Such a host is a primary of
            its own, and counts as a replica.
        warned_of: the warnings about the host that were logged and are not to be repeated.
        lag: how far the host is behind.
        in_sync_by_time: whether the lag in time is within the limit.
        in_sync_by_bytes: whether the lag in bytes is within the limit.
        ahead_on: the timeline on which the host has replayed WAL that the master does not have (see
            `Judge.compare_with_master`); ``None`` if it has not.
        is_judged: whether the host's lag has been judged since its server was first seen.
        unconfirmed: the reference behind which the host seems to have fallen, while no later answer has confirmed that
            (see `Judge.judge`); ``None`` if it does not seem so.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.takes_reads = True
        self.may_be_promoted = True
        self.is_subscriber = False
        self._as_replica: Answer | None = None
        self.warned_of: set[Literal["timeline", "nofailover", "ahead"]] = set()
        self._task: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self.forget_lag()

    @property
    def answer(self) -> Answer | None:
        """What the host said last; for a subscriber, the answer of the replica that it counts as.

        See `compare_with_publisher` for the latter.
        """
        return self._as_replica if self.is_subscriber else self.watch.answer

    @property
    def position(self) -> int | None:
        """The WAL position that the host has replayed, or inserted; ``None`` if that may not hold any more.

        It may not hold if the name may lead to another server by now, or the server may have been restarted: a standby
        begins its replay at an earlier position again.
        """
        answer = self.answer
        return answer.position if answer is not None and self.watch.has_same_server else None

    def compare_with_publisher(self, publisher: Answer | None) -> None:
        """Find out which position and timeline of the publisher's WAL a subscriber has.

        A subscriber has WAL and timelines of its own. Of the publisher's WAL, it has what it has applied by the
        subscription that is the furthest behind. Three positions tell of a subscription: what was applied, what its
        worker has reported, and what is confirmed to its slot. Each of them is a lower bound, so the highest counts.
        While the initial copy of a table is under way, none of them holds for that table. The timeline is the
        publisher's as long as all slots are in use.

        Args:
            publisher: what the master said last; ``None`` without a master.
        """
        answer = self.watch.answer
        if answer is None:
            self._as_replica = None
            return
        positions: list[int | None] = []
        is_receiving = True
        for subscription in answer.subscriptions:
            slot = None if publisher is None else publisher.slots.get(subscription.slot)
            # Without a slot of that name on the master, the subscription is to another cluster, and does not count.
            if slot is not None:
                is_receiving = is_receiving and slot.is_active
                told = (subscription.applied, subscription.reported, slot.confirmed)
                known = [position for position in told if position is not None and subscription.has_all_tables]
                positions.append(max(known, default=None))
        complete = [position for position in positions if position is not None]
        has_all = bool(positions) and len(complete) == len(positions)
        self._as_replica = replace(
            answer,
            in_recovery=True,
            position=min(complete) if has_all else None,
            timeline=publisher.timeline if publisher is not None and is_receiving and has_all else None,
            replay_age_ms=None,
            replayed_commit_at=None,
            highest_known_timeline=None,
        )

    @property
    def is_started(self) -> bool:
        """Whether the host is being asked."""
        return self._task is not None

    def start(self) -> None:
        """Begin to ask the host."""
        self._task = asyncio.create_task(self.watch.run(), name=f"HostMonitor {self.watch.address.name}")

    def stop(self) -> list[asyncio.Task[None]]:
        """End the task and the connections; return the task, which has to be waited for, if the host is being asked."""
        # The connection is dropped before the task is cancelled. Else asyncpg would ask the server, over a new
        # connection, to cancel the query, and the server may be frozen.
        self.watch.close()
        if self._task is None:
            return []
        self._task.cancel()
        return [self._task]

    def note_server(self, server: Server | None) -> None:
        """Note which server has answered. If it is not the one before, nothing is known of its lag."""
        before, self._server = self._server, server
        if before is not None and server is not None and not server.is_run_of(before):
            self.forget_lag()

    def forget_lag(self) -> None:
        """Forget how far the host is behind."""
        self.lag = Lag()
        self.in_sync_by_time = False
        self.in_sync_by_bytes = False
        self.ahead_on: int | None = None
        self.is_judged = False
        self.unconfirmed: Reference | None = None

    def dead_status(self) -> HostStatus:
        """Return the status of the host as one that does not answer."""
        watch = self.watch
        return HostStatus(host=watch.address.name, alive=False, role=None, since=watch.since, error=watch.error)

    def status(self, master: str | None, fault: Fault | None) -> HostStatus:
        """Return the status of the host.

        Args:
            master: the master's name.
            fault: why the host is not what it says.
        """
        watch = self.watch
        answer = self.answer
        server = watch.server
        if not watch.alive:
            return self.dead_status()
        if answer is None:
            return HostStatus(host=watch.address.name, alive=True, role=None, since=watch.since, error=watch.error)
        is_master = watch.address.name == master
        return HostStatus(
            host=watch.address.name,
            alive=True,
            role="replica" if answer.in_recovery else "master",
            since=watch.since,
            timeline=answer.timeline,
            position=answer.position,
            lag_ms=0 if is_master else self.lag.milliseconds,
            lag_bytes=0 if is_master else self.lag.bytes,
            error=watch.error,
            in_sync_by_time=is_master or self.in_sync_by_time,
            in_sync_by_bytes=is_master or self.in_sync_by_bytes,
            takes_reads=self.takes_reads and fault != "stranger",
            fault=fault,
            system_identifier=None if server is None else server.system_identifier,
            started_at=None if server is None else server.started_at,
            promotion=self.watch.promotion,
            possible_dead=watch.failures > 0 or watch.refusals > 0,
        )
