"""`Judge`: which replicas are in sync with the master or, before there is a master, with the most advanced standby."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace

from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.lag import Reference
from ctxdb_pgstatus._probing.member import Member

__all__ = ["TRANSIT_SECONDS", "Judge"]

logger = logging.getLogger("ctxdb_pgstatus")

TRANSIT_SECONDS = 0.02
"""How long WAL may be on its way from the master to a replica: if both are asked meanwhile, that WAL is no lag."""

# Answers to questions that were asked within this time are compared as if they had been asked at once.
_SAME_ROUND_SECONDS = 0.25


class Judge:
    """Judges how far replicas are behind, and whether they are in sync.

    Args:
        max_lag_ms: up to which lag in milliseconds a replica is in sync by time.
        max_lag_bytes: up to which lag in bytes a replica is in sync by bytes.
    """

    def __init__(self, max_lag_ms: int, max_lag_bytes: int) -> None:
        self._max_lag_ms = max_lag_ms
        self._max_lag_bytes = max_lag_bytes
        self.forget()

    def forget(self) -> None:
        """Forget what replicas are compared with, as before there was a master."""
        self._reference: Reference | None = None
        # Whether the reference is a master's, and not a standby's.
        self._is_of_master = False

    def compare_with_master(self, master: Answer, members: Iterable[Member]) -> None:
        """Take the master's answer as the reference, and judge the replicas that were asked at the same time.

        A replica may have replayed a position, by an answer that had come before the master was asked, which the master
        has not reached: then that is WAL of another primary, or such as the master has lost. From the point where the
        two part, the replica has other data at each position. So it is not in sync, and is not taken to have replayed
        anything, until its server is restarted, as by pg_rewind, or its timeline or the master is another one.

        Args:
            master: the last answer of the master.
            members: all hosts.
        """
        if master.position is None:
            # The service tells nothing of its WAL, as Amazon Aurora does not.
            self.forget()
            return
        self._is_of_master = True
        self._reference = reference = Reference(master.timeline or 0, master.position, master.asked_at, master.clock)
        members = list(members)
        for member in members:
            _note_other_wal(member, reference)
        self._judge_round(reference, members)

    def compare_with_standbys(self, members: Iterable[Member]) -> None:
        """Before there was a master, take the standby that has received the most WAL as the reference.

        The standbys that were asked at the same time as that one are judged. If there was a master, the reference stays
        what the last master had.

        Args:
            members: the hosts of the cluster, without the subscribers.
        """
        if self._reference is not None and self._is_of_master:
            return
        standbys = [(member, answer) for member in members if (answer := member.answer) and answer.in_recovery]
        received = [
            (answer.timeline, max(answer.received or 0, answer.position), answer.asked_at)
            for _, answer in standbys
            if answer.timeline is not None and answer.position is not None
        ]
        if not received:
            return
        self._is_of_master = False
        self._reference = reference = Reference(*max(received))
        self._judge_round(reference, (member for member, _ in standbys))

    def _judge_round(self, reference: Reference, members: Iterable[Member]) -> None:
        """Judge the replicas out of `members` that were asked at the same time as the host of a new `reference`."""
        for member in members:
            replica = member.answer
            # A replica that was asked earlier is judged by its next answer: the other host has gone on since its last
            # one.
            if replica is not None and replica.in_recovery and replica.asked_at >= reference.at - _SAME_ROUND_SECONDS:
                self.judge(member)

    def judge(self, member: Member) -> None:
        """Set how far the replica `member` is behind, and whether it is in sync.

        If a replica was in sync and seems to be no more, the WAL that it lacks may just be on its way. So the verdict
        waits for another answer, `TRANSIT_SECONDS` later at the earliest. If the replica has replayed by then what it
        lacked, the comparison begins anew with the present reference; if not, the verdict counts. The first verdict on
        a replica is treated in the same way.
        """
        answer = member.answer
        reference = self._reference
        unconfirmed = member.unconfirmed
        assert answer is not None, "a member counts as a replica by its answer"
        caught_up = unconfirmed is not None and member.lag.catch_up(answer, unconfirmed)
        is_ahead = _is_ahead(member, answer)
        milliseconds, size = (None, None) if is_ahead else member.lag.measure(answer, reference)
        by_time = milliseconds is not None and milliseconds <= self._max_lag_ms
        by_bytes = size is not None and size <= self._max_lag_bytes
        worse = (member.in_sync_by_time and not by_time) or (member.in_sync_by_bytes and not by_bytes)
        needs_confirmation = worse or not (member.is_judged or (by_time and by_bytes))
        # Without a reference of the same timeline, no WAL is known that could be on its way: the verdict counts at
        # once.
        if needs_confirmation and not is_ahead and reference is not None and reference.timeline == answer.timeline:
            if unconfirmed is None or caught_up:
                member.unconfirmed = replace(reference, at=max(reference.at, answer.asked_at))
                asyncio.get_running_loop().call_later(TRANSIT_SECONDS, member.watch.hurry)
                return
            if answer.asked_at < unconfirmed.at + TRANSIT_SECONDS:
                return
        member.unconfirmed = None
        member.is_judged = reference is not None
        member.lag.milliseconds, member.lag.bytes = milliseconds, size
        member.in_sync_by_time, member.in_sync_by_bytes = by_time, by_bytes

    def has_replayed(self, member: Member, position: int) -> bool:
        """Return whether a replica is known to have replayed a position of the master's timeline.

        A replica on another timeline may have other WAL at this position.
        """
        answer, reference = member.answer, self._reference
        if answer is None or reference is None or answer.timeline != reference.timeline or _is_ahead(member, answer):
            return False
        return (member.position or 0) >= position


def _is_ahead(member: Member, answer: Answer) -> bool:
    return member.ahead_on is not None and member.ahead_on == answer.timeline


def _note_other_wal(member: Member, reference: Reference) -> None:
    """Note whether a member has replayed WAL of the reference's timeline that the master does not have."""
    watch = member.watch
    answers = [each for each in (watch.answer, watch.previous) if each is not None and each.in_recovery]
    earlier = next((each for each in answers if each.answered_at <= reference.at), None)
    if earlier is None or earlier.timeline != reference.timeline or (earlier.position or 0) <= reference.position:
        return
    member.ahead_on = reference.timeline
    if "ahead" not in member.warned_of:
        member.warned_of.add("ahead")
        name = watch.address.name
        logger.warning(
            "%s has replayed WAL that the master does not have: it receives that of another primary, or the master has "
            "lost WAL. It counts as in sync no more. Rewind it (pg_rewind), or make it anew.",
            name,
            extra={"host": name, "position": earlier.position, "position_of_master": reference.position},
        )
