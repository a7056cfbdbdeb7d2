"""Whom `follow_master` and `follow_replica` ask: a `HostMonitor`, a `PgStatusClient`, or what does the same."""

from __future__ import annotations

from typing import Protocol

from ctxdb_pgstatus.status import SyncCondition

__all__ = ["HostSource"]


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
        """Ask the hosts anew, and return whether `host` is the master after all that happened before the call."""

    def report_failure(self, host: str) -> None:
        """Say that something failed on `host`, so that it is asked now instead of at its next turn. Does not wait."""
