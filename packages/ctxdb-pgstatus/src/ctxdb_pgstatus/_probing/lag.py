"""`Lag`: how far a replica is behind, by comparing its answers with what the master had."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctxdb_pgstatus._probing.answer import Answer

__all__ = ["Lag", "Reference"]

# A commit may seem to be made in the future by this much: the master and the replica are asked at the same moment, but
# one of the questions may take longer to arrive.
_LONGEST_TRANSIT_MS = 250.0


@dataclass(frozen=True, slots=True)
class Reference:
    """What replicas are compared with: up to where the master had inserted WAL at a moment.

    Before there was a master, it is up to where the most advanced standby had received WAL.

    Attributes:
        timeline: the timeline of that WAL.
        position: the WAL position in bytes.
        at: when the host was asked, by the event loop's clock.
        clock: the time of the answer by the master's own clock, in seconds since 1970; ``None`` if it is not known.
    """

    timeline: int
    position: int
    at: float
    clock: float | None = None


class Lag:
    """An upper bound of the lag of one replica.

    Two observations bound the lag in time, and the smaller one counts: how long ago the commit was made that the
    replica replayed last; and how long ago the replica was last seen to have all that the master had. The clocks of the
    servers need not agree: the time of a commit, which the master's clock told, is compared with the master's clock.

    Attributes:
        milliseconds: how long ago the master was where the replica is now; ``None`` if there is no bound.
        bytes: how much WAL the replica has still to replay; ``None`` if it is on another timeline than the master.
    """

    def __init__(self) -> None:
        self.milliseconds: int | None = None
        self.bytes: int | None = None
        self._position = 0
        # When the master was asked for the last reference that the replica has replayed, by the event loop's clock.
        self._caught_up_at: float | None = None

    def catch_up(self, answer: Answer, reference: Reference) -> bool:
        """Note, and return, whether the replica has replayed by now what the master had at `reference.at`."""
        if answer.position is None or answer.timeline != reference.timeline or answer.position < reference.position:
            return False
        self._caught_up_at = reference.at if self._caught_up_at is None else max(self._caught_up_at, reference.at)
        return True

    def measure(self, answer: Answer, reference: Reference | None) -> tuple[int | None, int | None]:
        """Return the lag in milliseconds and in bytes by an answer of the replica.

        A lag of 0 is said only of a replica that has all that the master had; a replica that lacks WAL is at least a
        millisecond behind.
        """
        if answer.lag_ms is not None:
            return math.ceil(max(answer.lag_ms, 0.0)), None
        if answer.position is None:
            return None, None
        age = _age_of_last_commit(answer, reference)
        if reference is None:
            return None if age is None else math.ceil(age), None
        if answer.timeline != reference.timeline or answer.position < self._position:
            self._caught_up_at = None
        self._position = answer.position
        if answer.timeline != reference.timeline:
            # Positions of different timelines do not compare: behind the point where they part, each has other WAL.
            return None, None
        if self.catch_up(answer, reference):
            return 0, 0
        bounds = [] if age is None else [age]
        if self._caught_up_at is not None:
            bounds.append((answer.asked_at - self._caught_up_at) * 1000)
        return max(math.ceil(min(bounds)), 1) if bounds else None, reference.position - answer.position


def _age_of_last_commit(answer: Answer, reference: Reference | None) -> float | None:
    """Return how many milliseconds ago the commit was made that a replica replayed last; ``None`` if that is unknown.

    While the master commits all the time, this is the lag. While the master is idle, it is more than the lag.
    """
    if reference is not None and reference.clock is not None and answer.replayed_commit_at is not None:
        by_clock_of_master = reference.clock + answer.asked_at - reference.at
        age = (by_clock_of_master - answer.replayed_commit_at) * 1000
    elif answer.replay_age_ms is not None:
        age = answer.replay_age_ms
    else:
        return None
    # A commit of the future tells nothing: the clock was set back since, or the commit is of a former master, whose
    # clock was ahead.
    return None if age < -_LONGEST_TRANSIT_MS else max(age, 0.0)
