"""`elect`: which of the hosts that are primaries by their own word is the master of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctxdb_pgstatus._probing.answer import Server

__all__ = ["Claim", "Election", "elect"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A host that is alive and says that it is a primary.

    Attributes:
        host: the host's name.
        timeline: the timeline that the host writes. Each promotion begins a higher timeline (PostgreSQL, "Continuous
            Archiving and Point-in-Time Recovery", on timelines).
        position: the WAL position in bytes up to which the host has written.
        standbys: how many standbys receive the host's WAL.
        takes_writes: whether the host lets clients write.
        server: the server that answers by this name, as two names may lead to one server; ``None`` if it is unknown.
    """

    host: str
    timeline: int
    position: int = 0
    standbys: int = 0
    takes_writes: bool = True
    server: Server | None = None


@dataclass(frozen=True, slots=True)
class Election:
    """The result of an election.

    Attributes:
        master: the master; ``None`` if no claim holds, or if several servers take writes on the highest timeline.
        rivals: the hosts, beside `preferred`, that claim the same timeline as `preferred` does. Such servers went on
            from the same point of one timeline, and no timeline tells which of them is right.
        stale: the hosts whose timeline is lower than the highest one: masters of the past, which a promotion has left.
        preferred: the master if there is one; else the host that an operator had best keep, by its WAL and standbys.
    """

    master: str | None
    rivals: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    preferred: str | None = None


def elect(claims: Sequence[Claim], *, highest_timeline: int = 0) -> Election:
    """Choose the master.

    The highest timeline wins. If several servers claim the highest timeline, the server that takes writes is the
    master. If several of these take writes, there is no master: each of them acknowledges writes that the others do not
    have. The result does not depend on which host answered first or was the master before, so that all processes choose
    the same master.

    Args:
        claims: the hosts that say that they are primaries, in the order of the list of hosts.
        highest_timeline: the highest timeline that was seen on any host at any time. A claim of a lower timeline is
            stale, even if no host claims this one now: a host was promoted to it, and may be away for a moment.
    """
    highest = max((claim.timeline for claim in claims), default=0)
    highest = max(highest, highest_timeline)
    valid = _without_other_names([claim for claim in claims if claim.timeline >= highest])
    stale = tuple(claim.host for claim in claims if claim.timeline < highest)
    if not valid:
        return Election(None, stale=stale)
    # Among equals, `max` returns the first one in the order of the list of hosts.
    preferred = max(valid, key=lambda claim: (claim.takes_writes, claim.position, claim.standbys))
    rivals = tuple(claim.host for claim in valid if claim is not preferred)
    takers = [claim for claim in valid if claim.takes_writes]
    master = None if len(takers) > 1 else preferred.host
    return Election(master, rivals, stale, preferred.host)


def _without_other_names(claims: Sequence[Claim]) -> list[Claim]:
    """Return one claim for each server: of the names that lead to one server, the first."""
    found: list[Claim] = []
    for claim in claims:
        server = claim.server
        if server is None or not any(other.server is not None and server.is_run_of(other.server) for other in found):
            found.append(claim)
    return found
