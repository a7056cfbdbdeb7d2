"""`Judge`: which replicas are in sync, by what the master has or, without one, by what standbys have received."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from ctxdb_pgstatus._probing.answer import Answer
from ctxdb_pgstatus._probing.lag import Sample
from ctxdb_pgstatus._probing.member import Member

__all__ = ["TRANSIT_SECONDS", "Judge"]

TRANSIT_SECONDS = 0.02
"""The WAL that is on its way when master and replica are asked at the same time is no lag: this long it may take."""

# What is asked within this time was asked at the same time.
_ROUND_SECONDS = 0.25


class Judge:
    """Says of replicas how far they are behind, and whether that is near enough.

    Args:
        max_lag_ms: up to which lag in milliseconds a replica is in sync by time.
        max_lag_bytes: up to which lag in bytes a replica is in sync by bytes.
    """

    def __init__(self, max_lag_ms: int, max_lag_bytes: int) -> None:
        self._max_lag_ms = max_lag_ms
        self._max_lag_bytes = max_lag_bytes
        self.forget()

    def forget(self) -> None:
        """Have nothing to compare with, as before the first master."""
        self._sample: Sample | None = None
        self._is_of_master = False

    def compare_with_master(self, master: Answer, members: Iterable[Member]) -> None:
        """Compare replicas with what the master has said from now on, and those that were asked with it at once.

        Args:
            master: what the master has said last.
            members: all hosts.
        """
        if master.position is None:
            # A service that tells nothing of its WAL.
            self.forget()
            return
        self._is_of_master = True
        self._sample = sample = Sample(master.timeline or 0, master.position, master.asked_at, master.clock)
        for member in members:
            replica = member.answer
            # One that was asked long before is not behind because the master has gone on since.
            if replica is not None and replica.in_recovery and replica.asked_at >= sample.at - _ROUND_SECONDS:
                self.judge(member)

    def compare_with_standbys(self, answers: Iterable[Answer]) -> None:
        """Without a master, now or before, compare replicas with the standby that has received the most.

        Args:
            answers: what the hosts of the cluster have said last.
        """
        if self._sample is not None and self._is_of_master:
            return
        received = [
            (answer.timeline, max(answer.received or 0, answer.position), answer.asked_at)
            for answer in answers
            if answer.in_recovery and answer.timeline is not None and answer.position is not None
        ]
        if received:
            self._is_of_master = False
            self._sample = Sample(*max(received))

    def judge(self, member: Member) -> None:
        """Set how far the replica `member` is behind.

        A verdict that is worse than the last one counts when another answer confirms it, `TRANSIT_SECONDS` later at the
        earliest: what the replica lacked may have been on its way.
        """
        answer = member.answer
        sample = self._sample
        doubt = member.doubt
        assert answer is not None, "a replica has said that it is one"
        caught_up = doubt is not None and member.lag.catch_up(answer, doubt)
        milliseconds, size = member.lag.measure(answer, sample)
        by_time = milliseconds is not None and milliseconds <= self._max_lag_ms
        by_bytes = size is not None and size <= self._max_lag_bytes
        worse = (member.in_sync_by_time and not by_time) or (member.in_sync_by_bytes and not by_bytes)
        doubtful = worse or not (member.is_judged or (by_time and by_bytes))
        # Without a sample of the same timeline, no WAL is known that could be on its way: the verdict counts at once.
        if doubtful and sample is not None and sample.timeline == answer.timeline:
            if doubt is None or caught_up:
                member.doubt = replace(sample, at=max(sample.at, answer.asked_at))
                asyncio.get_running_loop().call_later(TRANSIT_SECONDS, member.watch.hurry)
                return
            if answer.asked_at < doubt.at + TRANSIT_SECONDS:
                return
        member.doubt = None
        member.is_judged = sample is not None
        member.lag.milliseconds, member.lag.bytes = milliseconds, size
        member.in_sync_by_time, member.in_sync_by_bytes = by_time, by_bytes

    def has_replayed(self, member: Member, position: int) -> bool:
        """Return whether a replica is known to have replayed a position of the master's timeline."""
        answer, sample = member.answer, self._sample
        # Positions of different timelines do not compare.
        if answer is None or sample is None or answer.timeline != sample.timeline:
            return False
        return (member.position or 0) >= position
