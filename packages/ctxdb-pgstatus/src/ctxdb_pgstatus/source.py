"""`HostSource` and its additions: what `follow_master` and `follow_replica` ask about the hosts of a cluster.

`HostMonitor` and `PgStatusClient` have all of these methods. An object of the application's own needs those of
`HostSource`; each other protocol here adds what the source may know beyond that.
"""

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
    """Knows the hosts of a cluster. The methods may be called on any event loop."""

    async def find_master(self) -> str | None:
        """Return the master's name, out of memory if that is recent enough; ``None`` if there is no master."""

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica's name, each in its turn; the master's if no replica will do; ``None`` without a master.

        Args:
            sync: by which lag the replica has to be in sync.
            min_position: a WAL position in bytes that the replica must have replayed.
            max_wait: how long to wait for a replica that has replayed `min_position`, in seconds.
        """

    async def find_replicas(self) -> frozenset[str]:
        """Return the names of all living replicas. `follow_replica` keeps its connections to these hosts."""

    async def confirm_master(self, host: str) -> bool:
        """Ask the hosts anew, and return whether `host` is the master after all that happened before the call.

        Raises:
            Exception: the source cannot find out whether `host` is the master.
        """

    def report_failure(self, host: str) -> None:
        """Have `host` asked now instead of at its next poll, as something has failed on it. Does not wait."""


@dataclass(frozen=True, slots=True)
class KnownMaster:
    """The master that a source knew when it could last tell which host that is.

    Attributes:
        host: the master's name.
        timeline: the timeline that the master wrote; ``None`` if the source does not know it.
    """

    host: str
    timeline: int | None


@runtime_checkable
class RemembersMaster(Protocol):
    """A `HostSource` that cannot always be asked, as a sidecar may be away, and remembers the last master.

    While the source cannot be asked, a commit is confirmed by the host on which it was made, if that is the remembered
    master.
    """

    def known_master(self) -> KnownMaster | None:
        """Return the remembered master; ``None`` if it is too old, or a failure of it was reported since."""


@runtime_checkable
class KnowsServers(Protocol):
    """A `HostSource` that knows which server is behind a host's name. A server is known by the time of its start."""

    def server_of(self, host: str) -> datetime | None:
        """Return when the server was started that last answered by the name `host`; ``None`` if that is unknown."""

    async def ask_server_of(self, host: str) -> datetime | None:
        """Find out over a new connection where the name `host` leads now; return what `server_of` does after that."""


@runtime_checkable
class KnowsPromotions(Protocol):
    """A `HostSource` that notices how far a host had replayed its timeline when it was promoted.

    With that, a new master can tell the outcome of a commit whose answer the old master did not send any more (see
    ``resolve_commits``).
    """

    async def promotion_of(self, host: str) -> Promotion | None:
        """Return how much a host had replayed when it was promoted last; ``None`` if the source has not seen that.

        Raises:
            Exception: the source cannot be asked at the moment.
        """


@runtime_checkable
class ReadsByRule(Protocol):
    """A `HostSource` that finds replicas by limits of the caller's own, by distance, or without falling back."""

    async def find_reader(
        self, rule: ReadRule, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return the name of a replica that suits a rule, each in its turn; else the master's, if the rule allows that.

        Args:
            rule: which replicas will do.
            min_position: a WAL position in bytes that the replica must have replayed.
            max_wait: how long to wait for a replica that has replayed `min_position`, in seconds.
        """
