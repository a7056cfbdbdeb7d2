"""Sessions that take a second connection while the code that waits for them holds a first one.

If as many requests do so at once as the pool has connections, they wait for each other until the pool's time-out. ctxdb
cannot prevent that; it tells of it by a warning when a request does so first, and by the error of the time-out.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from types import FrameType
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

from greenlet import getcurrent, greenlet  # what SQLAlchemy's asyncio extra is made of
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.private import connections_of

__all__ = ["explain_time_out", "note_second_session", "user_frames"]

logger = logging.getLogger("ctxdb")

_MACHINERY = {"asyncio", "contextlib", "ctxdb_core", "ctxdb_inspector", "greenlet", "sqlalchemy"}
"""Packages between the code of the application and the pool."""

_ADVICE = (
    "A pool stands still when all of its connections are held in this way. Size it for two connections for each "
    "request that does so at once, or give the first one back before (`await commit_db_session(db)`, `await "
    "close_db_session(db)`)."
)


class _Second(NamedTuple):
    """What is known of a session that takes a second connection."""

    first: ref[AsyncSession]
    place: str


_seconds: WeakKeyDictionary[AsyncSession, _Second] = WeakKeyDictionary()
_warned: WeakSet[object] = WeakSet()


def note_second_session(db: object, session: AsyncSession, first: AsyncSession) -> None:
    """Note that `session` is opened on `db` by code that `first` holds a connection for, if it does.

    The first time for each `db`, a warning is logged.
    """
    if not _holds(first):
        return
    place = _place()
    _seconds[session] = _Second(ref(first), place)
    if db not in _warned:
        _warned.add(db)
        logger.warning(
            "%r: a unit of work holds a connection and takes a second one, %s. %s This warning is logged once.",
            db,
            place,
            _ADVICE,
        )


def explain_time_out(error: BaseException, session: object) -> None:
    """Have the error of a pool whose connections are all in use say who holds one and waits for another."""
    if not isinstance(error, PoolTimeoutError) or not error.args:
        return
    engine = getattr(session, "bind", None)
    waiting = [
        second
        for each, second in list(_seconds.items())
        if each.sync_session.bind is engine
        and not _holds(each)
        and (first := second.first()) is not None
        and _holds(first)
    ]
    if waiting:
        counts = Counter(each.place for each in waiting).most_common(5)
        places = "; ".join(f"{count} {place}" for place, count in counts)
        units = "1 unit of work holds a connection of this pool and waits"
        if len(waiting) > 1:
            units = f"{len(waiting)} units of work hold a connection of this pool and wait"
        told = f"{error.args[0]}. {units} for a second one: {places}. {_ADVICE}"
        error.args = (told,)


def _holds(session: AsyncSession) -> bool:
    transaction = session.sync_session.get_transaction()
    return transaction is not None and bool(connections_of(transaction))


def _place() -> str:
    """Return a description of the code that asks for the session, and of the call of ctxdb that the code is in."""
    frames = user_frames(sys._getframe(1))  # noqa: SLF001 - documented, and a hundredth of what `traceback` costs
    if not frames:
        return "at an unknown place"
    places: list[str] = []
    for frame, called in frames[:_MOST_FRAMES]:
        place = f"in {frame.f_code.co_qualname}() at {frame.f_code.co_filename}:{frame.f_lineno}"
        if called in _CALLS:
            places.append(f"by {called}() {place}")
            break
        places.append(place)
    return ", ".join(places)


_MOST_FRAMES = 4

_CALLS = {
    "gather_in_new_ctx",
    "new_non_ctx_atomic_session",
    "new_non_ctx_session",
    "new_session",
    "new_transaction",
    "run_in_new_ctx",
}
"""The functions of ctxdb that are on the stack while the code that they are given, or their block's begin, runs."""


def user_frames(frame: FrameType | None) -> list[tuple[FrameType, str]]:
    """Return the frames of the application around `frame`, from the innermost one.

    Each comes with the name of the outermost function of ctxdb that is between it and the next frame within.
    """
    frames: list[tuple[FrameType, str]] = []
    called = ""
    current: greenlet | None = getcurrent()
    while current is not None:
        while frame is not None:
            package = (frame.f_globals.get("__name__") or "").partition(".")[0]
            if package not in _MACHINERY:
                frames.append((frame, called))
                called = ""
            elif package == "ctxdb_core":
                called = frame.f_code.co_name
            frame = frame.f_back
        # SQLAlchemy runs the statement in a greenlet; the coroutine that awaits it is on the stack of its parent.
        current = current.parent
        frame = None if current is None else current.gr_frame
    return frames
