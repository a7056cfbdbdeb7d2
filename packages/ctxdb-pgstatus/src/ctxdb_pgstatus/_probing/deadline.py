"""`Deadline`: the end of the time that a host has for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Deadline"]

# From how many seconds on the event loop itself was late, and how many more an answer then gets.
_LATE_SECONDS = 0.05
_MORE_SECONDS = 0.1


class Deadline:
    """Calls a function at a time, and a little later if the event loop was late for it.

    A process that was stopped, or had no CPU, finds its timers due when it goes on, and the answers that have come
    meanwhile unread: the host is not to blame, and what it has said is to be heard first.

    Args:
        at: when to call, by the running event loop's clock.
        callback: what to call.
    """

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._at = at
        self._callback = callback
        self._handle = self._loop.call_at(at, self._due)

    def cancel(self) -> None:
        """Call nothing any more."""
        self._handle.cancel()

    def _due(self) -> None:
        if self._loop.time() - self._at > _LATE_SECONDS:
            self._handle = self._loop.call_later(_MORE_SECONDS, self._callback)
        else:
            self._callback()
