"""How far a replica is behind: what can be said of it by two answers, its own and the master's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctxdb_pgstatus._probing.answer import Answer

__all__ = ["Lag", "Sample"]

# By how many milliseconds a commit may seem to be younger than it can be: master and replica are asked at the same
# moment, and the question to one of them may be longer on its way.
_ON_ITS_WAY_MS = 250.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the master had at a moment: what replicas are compared with.

    Attributes:
        timeline: the timeline that it wrote.
        position: the WAL position that it had inserted.
        at: when it was asked, by the event loop's clock.
        clock: the time then by the master's own clock, in seconds since 1970; ``None`` if it is not known.
    """

    timeline: int
    position: int
    at: float
    clock: float | None = None


class Lag:
    """The lag of one replica: never less than it is.

    The clocks of the servers need not agree: when a commit was made is compared with the master's clock, which made it.

    Attributes:
        milliseconds: how long ago the master was where the replica is; ``None`` if nothing tells.
        bytes: how much WAL the replica has still to replay; ``None`` if its WAL is not the master's.
    """

    def __init__(self) -> None:
        self.milliseconds: int | None = None
        self.bytes: int | None = None
        self._position = 0
        # When the master was last asked and had nothing that the replica had not.
        self._caught_up_at: float | None = None

    def catch_up(self, answer: Answer, sample: Sample) -> bool:
        """Return whether the replica has by now what the master had then."""
        if answer.position is None or answer.timeline != sample.timeline or answer.position < sample.position:
            return False
        self._caught_up_at = sample.at if self._caught_up_at is None else max(self._caught_up_at, sample.at)
        return True

    def measure(self, answer: Answer, sample: Sample | None) -> tuple[int | None, int | None]:
        """Return the milliseconds and bytes that an answer amounts to."""
        if answer.lag_ms is not None:
            return math.ceil(max(answer.lag_ms, 0.0)), None
        if answer.position is None:
            return None, None
        age = _age_of_last_commit(answer, sample)
        if sample is None:
            return None if age is None else math.ceil(age), None
        if answer.timeline != sample.timeline or answer.position < self._position:
            self._caught_up_at = None
        self._position = answer.position
        if answer.timeline != sample.timeline:
            # Positions of different timelines are positions in different texts.
            return None, None
        if self.catch_up(answer, sample):
            return 0, 0
        bounds = [] if age is None else [age]
        if self._caught_up_at is not None:
            bounds.append((answer.asked_at - self._caught_up_at) * 1000)
        return max(math.ceil(min(bounds)), 1) if bounds else None, sample.position - answer.position


def _age_of_last_commit(answer: Answer, sample: Sample | None) -> float | None:
    """Return how many milliseconds ago the commit was made that a replica replayed last; ``None`` without one.

    That is the lag while the master commits, and more than the lag while it is idle.
    """
    if sample is not None and sample.clock is not None and answer.replayed_commit_at is not None:
        by_clock_of_master = sample.clock + answer.asked_at - sample.at
        age = (by_clock_of_master - answer.replayed_commit_at) * 1000
    elif answer.replay_age_ms is not None:
        age = answer.replay_age_ms
    else:
        return None
    # A commit of the future: the clock has been set back since, or the master of then had another one.
    return None if age < -_ON_ITS_WAY_MS else max(age, 0.0)
