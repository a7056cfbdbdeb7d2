"""`CallLimit`: gives up a call of a session whose time is up."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["CallLimit"]

INSIST_SECONDS = 1.0
"""How long a driver may try to stop its query when a call is given up; psycopg would take up to ten seconds."""


class CallLimit:
    """Cancels the running task when the time of its call is up, and once more where its driver does not let go.

    `asyncio.timeout` would cancel the task only once, and a driver may then wait for its server to stop the query.

    Args:
        when: the time at which the call is given up, on the event loop's clock; ``None`` without a limit.
    """

    def __init__(self, when: float | None) -> None:
        self.is_over = False
        """Whether the call was given up."""
        self._loop = asyncio.get_running_loop()
        task: Any = asyncio.current_task()
        self._task = task
        self._earlier_cancellations: int = task.cancelling()
        self._own_cancellations = 0
        self._timer: asyncio.TimerHandle | None = None
        self.restart(when)

    def restart(self, when: float | None) -> None:
        """Set another time at which the call is given up; do nothing if it was given up already."""
        if self.is_over:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when is None else self._loop.call_at(when, self._give_up)

    def end(self) -> bool:
        """Take this limit's cancellations of the task back; return whether they, and no others, have ended the call."""
        if self._timer is not None:
            self._timer.cancel()
        for _ in range(self._own_cancellations):
            self._task.uncancel()
        return self.is_over and self._task.cancelling() <= self._earlier_cancellations

    def _give_up(self) -> None:
        self.is_over = True
        self._cancel()
        self._timer = self._loop.call_later(INSIST_SECONDS, self._cancel)

    def _cancel(self) -> None:
        self._own_cancellations += 1
        self._task.cancel()
