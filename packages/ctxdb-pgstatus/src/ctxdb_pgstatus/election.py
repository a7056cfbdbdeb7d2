"""Which of the hosts that call themselves master is the one true master."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Claim", "Election", "elect"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A living host that says that it is the master.

    Attributes:
        host: its name.
        timeline: the timeline that it writes: each promotion begins a higher one.
    """

    host: str
    timeline: int


@dataclass(frozen=True, slots=True)
class Election:
    """How an election went.

    Attributes:
        master: the one true master; ``None`` if no claim holds.
        rivals: the hosts that claim the same timeline as it, beside it. Two servers went on from the same point without
            a promotion, and only one of them is right: which, no timeline tells.
        stale: the hosts whose timeline was left by a promotion: masters of the past.
    """

    master: str | None
    rivals: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()


def elect(claims: Sequence[Claim], *, current: str | None = None, highest_timeline: int = 0) -> Election:
    """Choose the master.

    The highest timeline wins. Among equals the master stays the master, else the first one wins.

    Args:
        claims: who claims to be the master, in the order in which the hosts were named.
        current: the master up to now.
        highest_timeline: the highest timeline that was seen on any host at any time. A claim below it is stale, also if
            no other is there: some host was promoted, and may be away for a moment.
    """
    highest = max((claim.timeline for claim in claims), default=0)
    highest = max(highest, highest_timeline)
    valid = [claim.host for claim in claims if claim.timeline >= highest]
    stale = tuple(claim.host for claim in claims if claim.timeline < highest)
    if not valid:
        return Election(None, stale=stale)
    master = current if current in valid else valid[0]
    return Election(master, tuple(host for host in valid if host != master), stale)
