"""`Deadline`: a timer for the end of the time that a host has for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Deadline"]

# If a timer is called later than this, the event loop was late; and for so many seconds an answer is waited for then.
_LATE_SECONDS = 0.05
_MORE_SECONDS = 0.1


class Deadline:
    """Calls a function at a given time, or a little later if the event loop was late itself.

    A process that was stopped, or got no CPU, finds its timers due when it goes on, while the answers that have come
    meanwhile are still unread. The hosts are not to blame: so the event loop gets time to read their answers first.

    Args:
        at: when to call, by the running event loop's clock.
        callback: the function.
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
