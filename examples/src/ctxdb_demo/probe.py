"""How long connections are held: measured where they leave the pool and where they come back to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry


@dataclass
class Hold:
    """One time that a connection was out of the pool; in seconds of `time.perf_counter`."""

    start: float
    end: float | None = None


@contextmanager
def watch_pool(engine: AsyncEngine) -> Iterator[list[Hold]]:
    """Yield the list of holds, which grows while the block runs."""
    holds: list[Hold] = []
    open_holds: dict[ConnectionPoolEntry, Hold] = {}

    def checked_out(dbapi_connection: Any, entry: ConnectionPoolEntry, proxy: object) -> None:
        open_holds[entry] = Hold(perf_counter())
        holds.append(open_holds[entry])

    def checked_in(dbapi_connection: Any, entry: ConnectionPoolEntry) -> None:
        hold = open_holds.pop(entry, None)
        if hold is not None:
            hold.end = perf_counter()

    listeners: dict[str, Callable[..., None]] = {"checkout": checked_out, "checkin": checked_in}
    for name, listener in listeners.items():
        event.listen(engine.sync_engine, name, listener)
    try:
        yield holds
    finally:
        for name, listener in listeners.items():
            event.remove(engine.sync_engine, name, listener)


def held_seconds(holds: list[Hold], until: float) -> float:
    """Return for how many seconds at least one connection was held; one that never came back was so `until` then."""
    total, covered = 0.0, float("-inf")
    for hold in sorted(holds, key=lambda each: each.start):
        end = until if hold.end is None else hold.end
        total += max(0.0, end - max(hold.start, covered))
        covered = max(covered, end)
    return total


def most_at_once(holds: list[Hold]) -> int:
    """Return how many connections were held at the same time, at most."""
    # A hold that ends in the moment in which another starts does not overlap it: -1 sorts before +1.
    changes = [(hold.start, 1) for hold in holds] + [(hold.end, -1) for hold in holds if hold.end is not None]
    most = current = 0
    for _, change in sorted(changes):
        current += change
        most = max(most, current)
    return most
