"""Whom `follow_master` and `follow_replica` ask: a `HostMonitor`, a `PgStatusClient`, or what does the same."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from ctxdb_pgstatus.reading import ReadRule
from ctxdb_pgstatus.status import Promotion, SyncCondition

__all__ = [
    "HostSource",
    "KnownMaster",
    "KnowsPromotions",
    "KnowsServers",
    "Promotion",
    "ReadsByRule",
    "RemembersMaster",
]


class HostSource(Protocol):
    """What knows the hosts of a cluster. Its methods may be called on any event loop."""

    async def find_master(self) -> str | None:
        """Return the master's name, out of memory if that is recent enough; ``None`` if there is none."""

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica's name, each in its turn; the master's if no replica will do; ``None`` without a master.

        Args:
            sync: by which lag it has to be in sync.
            min_position: a WAL position in bytes that it must have replayed.
            max_wait: how long to wait for one that has replayed `min_position`, in seconds.
        """

    async def find_replicas(self) -> frozenset[str]:
        """Return the names of all living replicas: the hosts to which connections are worth keeping."""

    async def confirm_master(self, host: str) -> bool:
        """Ask the hosts anew, and return whether `host` is the master after all that happened before the call.

        Raises:
            Exception: it cannot be found out.
        """

    def report_failure(self, host: str) -> None:
        """Say that something failed on `host`, so that it is asked now instead of at its next turn. Does not wait."""


@dataclass(frozen=True, slots=True)
class KnownMaster:
    """The master, as a source knew it when it last could tell.

    Attributes:
        host: its name.
        timeline: the timeline that it wrote; ``None`` if that was not told.
    """

    host: str
    timeline: int | None


@runtime_checkable
class RemembersMaster(Protocol):
    """A source that may be away itself, as a sidecar may, and remembers what it knew before.

    While it is away, commits are confirmed by the host that they were made on, if that is the master remembered here.
    """

    def known_master(self) -> KnownMaster | None:
        """Return the master of the last answer; ``None`` if that is too old to be relied on, or was cast into doubt."""


@runtime_checkable
class KnowsServers(Protocol):
    """A `HostSource` that knows which server is behind a host's name, and notices when it is another one."""

    def server_of(self, host: str) -> datetime | None:
        """Return when the server was started that was the last to answer by this name; ``None`` if that is unknown."""

    async def ask_server_of(self, host: str) -> datetime | None:
        """Find out over a new connection where the name leads now, and return what `server_of` does then."""


@runtime_checkable
class KnowsPromotions(Protocol):
    """A `HostSource` that has seen hosts being promoted.

    What became of a commit whose answer was lost can be told by the new master then (see ``resolve_commits``).
    """

    async def promotion_of(self, host: str) -> Promotion | None:
        """Return what a host had replayed when it was promoted last; ``None`` if that was not seen.

        Raises:
            Exception: it cannot be found out at the moment.
        """


@runtime_checkable
class ReadsByRule(Protocol):
    """A `HostSource` that finds replicas by more than their being in sync."""

    async def find_reader(
        self, rule: ReadRule, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica's name by a rule, each in its turn; else the master's, if the rule allows that.

        Args:
            rule: what it has to be like.
            min_position: a WAL position in bytes that it must have replayed.
            max_wait: how long to wait for one that has replayed `min_position`, in seconds.
        """
