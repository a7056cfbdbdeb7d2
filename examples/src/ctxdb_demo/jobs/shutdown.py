"""Ending in an orderly way: what is under way is finished, or undone, and never left half done."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

GRACE_SECONDS = 20.0
"""Less than the time between the signal and the kill: 30 seconds in Kubernetes, 90 under systemd."""


@contextmanager
def stop_on_signals(grace_seconds: float = GRACE_SECONDS) -> Iterator[asyncio.Event]:
    """Provide an event that SIGTERM or Ctrl-C sets: jobs that see it finish what is under way, and begin nothing more.

    If that takes longer than `grace_seconds`, or at a second signal, the task that runs the block is cancelled: units
    of work that are open roll back. One that is committing already is seen through.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stop = asyncio.Event()
    cancellations: list[asyncio.TimerHandle] = []

    def receive() -> None:
        if stop.is_set():
            task.cancel()
        else:
            stop.set()
            cancellations.append(loop.call_later(grace_seconds, task.cancel))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, receive)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        for cancellation in cancellations:
            cancellation.cancel()
