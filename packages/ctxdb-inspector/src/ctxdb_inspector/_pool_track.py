"""`PoolTrack`: the connections to one host that are in use, and how many there were over the last minutes."""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import WeakSet

from sqlalchemy import Dialect

from ctxdb_inspector._records import HoldRecord

__all__ = ["KEPT_SAMPLES", "PoolTrack"]

KEPT_SAMPLES = 300
"""How many samples are kept of each pool."""


class PoolTrack:
    """The connections to one host of one database, over the last minutes."""

    __slots__ = ("dialects", "held", "host", "limit", "name", "next_sample", "peak", "samples")

    def __init__(self, name: str, host: str) -> None:
        self.name: str = name
        self.host: str = host
        self.limit: int | None = None
        """How many connections there may be; ``None`` without a limit, and until it is known."""
        self.next_sample: float = 0.0
        """When a sample is to be taken, at the next occasion."""
        self.held: dict[Any, HoldRecord] = {}
        """What is known of each connection that is in use, by the connection as the driver has it."""
        self.dialects: WeakSet[Dialect] = WeakSet()
        """The dialects whose statements are followed: engines of several event loops may share one."""
        self.peak: int = 0
        """The most connections that were held at once since the last sample."""
        self.samples: deque[tuple[float, int, int, int]] = deque(maxlen=KEPT_SAMPLES)
        """Time, the most connections in use since the last sample, idle connections, waiting tasks."""
