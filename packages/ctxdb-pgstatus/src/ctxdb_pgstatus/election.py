"""Which of the hosts that call themselves master is the one true master."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctxdb_pgstatus._probing.answer import Server

__all__ = ["Claim", "Election", "elect"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A living host that says that it is the master.

    Attributes:
        host: its name.
        timeline: the timeline that it writes: each promotion begins a higher one.
        position: up to where it has written its WAL.
        standbys: how many standbys receive its WAL.
        takes_writes: whether it lets clients write.
        server: which server it is: two names may lead to one.
    """

    host: str
    timeline: int
    position: int = 0
    standbys: int = 0
    takes_writes: bool = True
    server: Server | None = None


@dataclass(frozen=True, slots=True)
class Election:
    """How an election went.

    Attributes:
        master: the one true master; ``None`` if no claim holds, or if several servers take writes on one timeline.
        rivals: the hosts that claim the same timeline as the preferred one, beside it. Two servers went on from the
            same point, and only one of them is right: which, no timeline tells.
        stale: the hosts whose timeline was left by a promotion: masters of the past.
        preferred: which of the rivals it would be best to keep, as far as PostgreSQL tells: the master, if there is
            one.
    """

    master: str | None
    rivals: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    preferred: str | None = None


def elect(claims: Sequence[Claim], *, highest_timeline: int = 0) -> Election:
    """Choose the master.

    The highest timeline wins. Where several servers claim it, the one that takes writes is the master. If several take
    writes, there is none: each process would see them in its own way, and both would acknowledge writes that the other
    does not have. Nothing depends on who answered first or who was the master before, so that every process chooses the
    same.

    Args:
        claims: who claims to be the master, in the order in which the hosts were named.
        highest_timeline: the highest timeline that was seen on any host at any time. A claim below it is stale, also if
            no other is there: some host was promoted, and may be away for a moment.
    """
    highest = max((claim.timeline for claim in claims), default=0)
    highest = max(highest, highest_timeline)
    valid = _without_other_names([claim for claim in claims if claim.timeline >= highest])
    stale = tuple(claim.host for claim in claims if claim.timeline < highest)
    if not valid:
        return Election(None, stale=stale)
    # `max` keeps the order of the hosts among equals.
    preferred = max(valid, key=lambda claim: (claim.takes_writes, claim.position, claim.standbys))
    rivals = tuple(claim.host for claim in valid if claim is not preferred)
    takers = [claim for claim in valid if claim.takes_writes]
    master = None if len(takers) > 1 else preferred.host
    return Election(master, rivals, stale, preferred.host)


def _without_other_names(claims: Sequence[Claim]) -> list[Claim]:
    """Leave out those that are another name of a server that is there already."""
    found: list[Claim] = []
    for claim in claims:
        server = claim.server
        if server is None or not any(other.server is not None and server.is_run_of(other.server) for other in found):
            found.append(claim)
    return found
