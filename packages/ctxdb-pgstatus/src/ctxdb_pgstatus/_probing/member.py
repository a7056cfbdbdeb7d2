"""`Member`: a host of a monitor, and what is known of its lag."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ctxdb_pgstatus._probing.answer import Answer, Server
from ctxdb_pgstatus._probing.lag import Lag, Sample
from ctxdb_pgstatus._probing.watch import Watch
from ctxdb_pgstatus.status import Fault, HostStatus

__all__ = ["Member"]


class Member:
    """A host of a `HostMonitor`, and how far it is behind if it is a replica.

    Attributes:
        watch: asks the host.
        takes_reads: whether readers are sent to it if it is a replica.
        may_be_promoted: whether it may become the master.
        is_subscriber: whether it receives the cluster's data by logical replication: it is a primary of its own, and
            counts as a replica.
        was_warned_of: whether a warning was logged that is not to be repeated.
        lag: how far it is behind.
        in_sync_by_time: whether its lag in time is within the limit.
        in_sync_by_bytes: whether its lag in bytes is within the limit.
        is_judged: whether it has been compared with the master since it was met.
        doubt: what it seems not to have, without being said to lack it; since when.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.takes_reads = True
        self.may_be_promoted = True
        self.is_subscriber = False
        self._of_subscriber: Answer | None = None
        self.was_warned_of = False
        self._task: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self.forget_lag()

    @property
    def answer(self) -> Answer | None:
        """What the host has said last; of a subscriber, what that amounts to (see `subscribe`)."""
        return self._of_subscriber if self.is_subscriber else self.watch.answer

    @property
    def position(self) -> int | None:
        """What it is known to have replayed, or inserted; nothing, if that may not hold any more."""
        answer = self.answer
        return answer.position if answer is not None and self.watch.is_certain else None

    def subscribe(self, publisher: Answer | None) -> None:
        """Compare what a subscriber has said with what its publisher has.

        A subscriber has its own WAL and its own timelines. What it has of the publisher's is what it has applied of
        each subscription, or has confirmed to the slot; on the publisher's timeline, as long as the slot is in use. As
        long as a table is being copied, it is not known what that has.

        Args:
            publisher: what the master has said last.
        """
        answer = self.watch.answer
        if answer is None:
            self._of_subscriber = None
            return
        positions: list[int | None] = []
        is_receiving = True
        for subscription in answer.subscriptions:
            slot = None if publisher is None else publisher.slots.get(subscription.slot)
            # A subscription to something else than this cluster is none of its business.
            if slot is not None:
                is_receiving = is_receiving and slot.is_active
                told = (subscription.applied, subscription.reported, slot.confirmed)
                known = [position for position in told if position is not None and subscription.has_all_tables]
                positions.append(max(known, default=None))
        complete = [position for position in positions if position is not None]
        has_all = bool(positions) and len(complete) == len(positions)
        self._of_subscriber = replace(
            answer,
            in_recovery=True,
            position=min(complete) if has_all else None,
            timeline=publisher.timeline if publisher is not None and is_receiving and has_all else None,
            replay_age_ms=None,
            replayed_commit_at=None,
            heard_of=None,
        )

    @property
    def is_started(self) -> bool:
        """Whether the host is being asked."""
        return self._task is not None

    def start(self) -> None:
        """Begin to ask the host."""
        self._task = asyncio.create_task(self.watch.run(), name=f"HostMonitor {self.watch.address.name}")

    async def stop(self) -> None:
        """End the task and the connections."""
        # First, as a query that is cancelled would ask the server to cancel it.
        self.watch.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def meet(self, server: Server | None) -> None:
        """Take in which server has answered: what was known of another one's lag says nothing of it."""
        before, self._server = self._server, server
        if before is not None and server is not None and not server.is_run_of(before):
            self.forget_lag()

    def forget_lag(self) -> None:
        """Know nothing of how far it is behind."""
        self.lag = Lag()
        self.in_sync_by_time = False
        self.in_sync_by_bytes = False
        self.is_judged = False
        self.doubt: Sample | None = None

    def dead_status(self) -> HostStatus:
        """Return what is known of a host that does not answer."""
        watch = self.watch
        return HostStatus(host=watch.address.name, alive=False, role=None, since=watch.since, error=watch.error)

    def status(self, master: str | None, fault: Fault | None) -> HostStatus:
        """Return what is known of the host.

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
