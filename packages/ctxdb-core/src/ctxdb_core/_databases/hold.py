"""`Hold`: a connection that a transaction has taken, and the warning if it keeps it for too long."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from types import CodeType, FrameType
from weakref import ref

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection

__all__ = ["Hold", "acquiring_code"]

logger = logging.getLogger("ctxdb")

# Between the code that makes a statement and the pool that gives it a connection.
_MACHINERY = {"asyncio", "contextlib", "ctxdb_core", "ctxdb_inspector", "greenlet", "sqlalchemy"}

# Functions that are known to be machinery: some forty are passed over for each connection. Code that is made while the
# program runs, as SQLAlchemy makes some, must not fill the memory.
_machinery_codes: set[CodeType] = set()
_MOST_CODES = 2000


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
        """The connection was given back."""
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


def acquiring_code() -> tuple[str, int, str]:
    """Return file, line and function of the code that is making a statement, or taking a connection, in this call.

    Frames of asyncio, SQLAlchemy and ctxdb are passed over.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, and a hundredth of what `traceback` costs
    current: greenlet | None = getcurrent()
    while current is not None:
        while frame is not None:
            code = frame.f_code
            if code not in _machinery_codes:
                module: str = frame.f_globals.get("__name__") or ""
                if module.partition(".")[0] not in _MACHINERY:
                    return code.co_filename, frame.f_lineno, code.co_qualname
                if len(_machinery_codes) < _MOST_CODES:
                    _machinery_codes.add(code)
            frame = frame.f_back
        # SQLAlchemy runs the statement in a greenlet; the coroutine that awaits it is on the stack of its parent.
        current = current.parent
        frame = None if current is None else current.gr_frame
    return "<unknown>", 0, "<unknown>"
