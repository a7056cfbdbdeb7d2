"""`Hold`: a connection that a transaction has taken, and the warning if it keeps it for too long."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from types import CodeType, FrameType
from typing import NamedTuple
from weakref import ref

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection

__all__ = ["Hold", "Place", "acquiring_code", "acquiring_place"]

logger = logging.getLogger("ctxdb")

# Between the code that makes a statement and the pool that gives it a connection.
_MACHINERY = {"asyncio", "contextlib", "ctxdb_core", "ctxdb_inspector", "greenlet", "sqlalchemy"}

# Functions that are known to be machinery: some forty are passed over for each connection. Code that is made while the
# program runs, as SQLAlchemy makes some, must not fill the memory.
_machinery_codes: set[CodeType] = set()
_application_codes: set[CodeType] = set()
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


class Place(NamedTuple):
    """A place in the code. Its file, line and function are looked up only when they are shown, as that costs more."""

    code: CodeType | None
    instruction: int
    """The offset of the instruction in the code, in bytes."""

    def describe(self) -> tuple[str, int, str]:
        """Return its file, line and function."""
        if self.code is None:
            return "<unknown>", 0, "<unknown>"
        line = next(
            (line for start, end, line in self.code.co_lines() if start <= self.instruction < end and line is not None),
            self.code.co_firstlineno,
        )
        return self.code.co_filename, line, self.code.co_qualname


_UNKNOWN = Place(None, 0)


def acquiring_code() -> tuple[str, int, str]:
    """Return file, line and function of the code that is making a statement, or taking a connection, in this call.

    Frames of asyncio, SQLAlchemy and ctxdb are passed over.
    """
    return acquiring_place().describe()


def acquiring_place() -> Place:
    """Return the place that `acquiring_code` describes; cheap enough to be called for each connection."""
    running = getcurrent()
    # SQLAlchemy runs the statement in a greenlet, with some thirty frames of its own in it. The coroutine that awaits
    # it is a few frames up the stack of the greenlet's parent. Only a function given to `run_sync` is in the greenlet.
    outer = running.parent
    frame = None if outer is None else outer.gr_frame
    while frame is not None:
        code = frame.f_code
        if code in _machinery_codes:
            frame = frame.f_back
        elif code in _application_codes or not _is_machinery(frame):
            return Place(code, frame.f_lasti)
        elif code.co_name == "run_sync":
            # `run_sync` is never among the known codes, so the search ends here each time.
            break
        else:
            _remember(_machinery_codes, code)
            frame = frame.f_back
    frame = sys._getframe(1)  # noqa: SLF001 - documented, and a hundredth of what `traceback` costs
    current: greenlet | None = running
    while current is not None:
        while frame is not None:
            code = frame.f_code
            if code not in _machinery_codes:
                if not _is_machinery(frame):
                    return Place(code, frame.f_lasti)
                if code.co_name != "run_sync":
                    _remember(_machinery_codes, code)
            frame = frame.f_back
        current = current.parent
        frame = None if current is None else current.gr_frame
    return _UNKNOWN


def _is_machinery(frame: FrameType) -> bool:
    module: str = frame.f_globals.get("__name__") or ""
    if module.partition(".")[0] in _MACHINERY:
        return True
    _remember(_application_codes, frame.f_code)
    return False


def _remember(codes: set[CodeType], code: CodeType) -> None:
    if len(codes) < _MOST_CODES:
        codes.add(code)
