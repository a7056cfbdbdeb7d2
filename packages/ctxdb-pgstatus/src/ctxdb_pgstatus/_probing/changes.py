"""`Changes`: tells callers who wait, and callbacks, that the status of a cluster has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeAlias

from ctxdb_pgstatus.status import ClusterStatus, HostStatus

__all__ = ["ChangeCallback", "Changes"]

logger = logging.getLogger("ctxdb_pgstatus")

ChangeCallback: TypeAlias = Callable[[ClusterStatus, ClusterStatus], object]
"""Called with the status before a change and the status after it."""


class Changes:
    """Tells of changes of a status: another master, or another state of a host; not of positions and lags."""

    def __init__(self) -> None:
        self._callbacks: list[ChangeCallback] = []
        self._waiting: set[asyncio.Future[None]] = set()

    def on_change(self, callback: ChangeCallback) -> Callable[[], None]:
        """Have `callback` called at each change, and return a function that ends this. An error of it is logged."""
        self._callbacks.append(callback)

        def remove() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return remove

    async def wait(
        self, timeout: float | None, since: ClusterStatus, current: Callable[[], ClusterStatus]
    ) -> ClusterStatus:
        """Wait until the current status differs from an earlier one, and return it.

        Args:
            timeout: how long to wait, in seconds; ``None`` for as long as it takes.
            since: the earlier status.
            current: returns the current status.

        Raises:
            TimeoutError: nothing has changed.
            Exception: the error of `end`.
        """
        async with asyncio.timeout(timeout):
            while not _differ(since, current()):
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.add(future)
                try:
                    await future
                finally:
                    self._waiting.discard(future)
        return current()

    def tell(self, old: ClusterStatus, new: ClusterStatus) -> None:
        """Tell of a new status, if it differs from the old one."""
        if not _differ(old, new):
            return
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        for callback in tuple(self._callbacks):
            try:
                callback(old, new)
            except Exception:
                logger.exception("A callback of HostMonitor.on_change failed.")

    def end(self, make_error: Callable[[], Exception]) -> None:
        """Have all callers who wait raise an error that `make_error` makes, as there will be no further change."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(make_error())


def _differ(old: ClusterStatus, new: ClusterStatus) -> bool:
    """Return whether two statuses differ by more than positions and lags."""
    return old.master != new.master or [*map(_features, old.hosts)] != [*map(_features, new.hosts)]


def _features(host: HostStatus) -> tuple[object, ...]:
    return (
        host.host,
        host.alive,
        host.role,
        host.timeline,
        host.in_sync_by_time,
        host.in_sync_by_bytes,
        host.fault,
        host.started_at,
    )
