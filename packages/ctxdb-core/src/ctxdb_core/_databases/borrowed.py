"""`BorrowedEngine`: lets a `DBConnect` use an engine that the application has made."""

from __future__ import annotations

import asyncio
import threading
from weakref import WeakSet, ref

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from ctxdb_core._databases.url import sqlite_file
from ctxdb_core._sqlalchemy.private import copy_engine

__all__ = ["BorrowedEngine", "guest_loops"]

guest_loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
"""Loops that get a copy, even if they come first: the owner of the engine cannot dispose of it on them."""


class BorrowedEngine:
    """Creates the engines of a `DBConnect` that was given one: that one, and engines like it for other event loops.

    The pool of an engine serves one event loop. The loop that uses the `DBConnect` first gets the given engine, which
    its owner disposes of. Each other loop gets an engine like it, with the same dialect, options and listeners, and a
    pool of its own, which is disposed of like every engine that a `DBConnect` has made.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        # By weak reference: a loop that is gone could not use its connections any more.
        self._loop: ref[asyncio.AbstractEventLoop] | None = None

    def __call__(self, host: str) -> AsyncEngine:
        """Return the engine for the running event loop."""
        loop = asyncio.get_running_loop()
        if self._serves_every_loop():
            return self.engine
        with self._lock:
            if self._loop is None and loop not in guest_loops:
                self._loop = ref(loop)
        return self.engine if self._loop is not None and self._loop() is loop else self._copy()

    def _serves_every_loop(self) -> bool:
        # A `NullPool` keeps no connection that would belong to a loop. A database in memory is in one connection, which
        # its driver runs in a thread of its own.
        return isinstance(self.engine.pool, NullPool) or is_in_memory(self.engine)

    def _copy(self) -> AsyncEngine:
        return AsyncEngine(copy_engine(self.engine.sync_engine))


def is_in_memory(engine: AsyncEngine) -> bool:
    """Return whether the database is in the memory of `engine`'s own connection, which serves every event loop."""
    return engine.dialect.driver == "aiosqlite" and sqlite_file(engine.url) is None
