"""`Hold`: warns of a connection that a transaction has held for too long, and tells which code has taken it."""

from __future__ import annotations

import asyncio
import logging
import time
from weakref import ref

from sqlalchemy import Connection

from ctxdb_core._databases.acquiring_code import acquiring_code

__all__ = ["Hold"]

logger = logging.getLogger("ctxdb")


class Hold:
    """Logs a warning, once, when a connection is held for longer than `limit` seconds.

    Args:
        name: the database, as the warning shows it.
        connection: what is held. It is known by weak reference only: if nobody else keeps it, the pool gets it back.
        limit: after how many seconds to warn.
    """

    __slots__ = ("_connection", "_limit", "_name", "_started", "_timer", "_where")

    def __init__(self, name: str, connection: Connection, limit: float) -> None:
        self._name = name
        self._connection = ref(connection)
        self._limit = limit
        self._where = acquiring_code()
        self._started = time.perf_counter()
        self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(limit, self._exceed)

    def end(self) -> None:
        """Note that the connection was given back."""
        if self._timer is not None:
            self._timer.cancel()
            # Code that blocks the event loop keeps the timer from running.
            if time.perf_counter() - self._started > self._limit:
                self._warn("was")

    def _exceed(self) -> None:
        connection = self._connection()
        if connection is not None and not connection.closed:
            self._warn("has been")

    def _warn(self, was: str) -> None:
        self._timer = None
        filename, line, function = self._where
        held = time.perf_counter() - self._started
        logger.warning(
            "A connection of %s %s held for %.3f s, longer than %g s. It was taken at %s:%d in %s(), and is given back "
            "when the transaction ends: commit, or close the session, before long work that needs no database.",
            self._name,
            was,
            held,
            self._limit,
            filename,
            line,
            function,
            extra={"ctxdb_held": held},
        )
