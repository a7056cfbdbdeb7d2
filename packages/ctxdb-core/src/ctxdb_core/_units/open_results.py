"""Transactions that have only read: they are kept for a result that is still read, and end before bytes travel."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.cursors import has_open_cursor
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.private import innermost_block
from ctxdb_core._sqlalchemy.written import UNANSWERED, holds_work
from ctxdb_core.errors import OpenCursorError

__all__ = ["has_only_read", "is_kept_for_cursor"]


async def is_kept_for_cursor(session: AsyncSession, *, ends_body: bool) -> bool:
    """Return whether a transaction that was to be committed stays open, for a result that is still read from it.

    Args:
        session: whose transaction; it has an open cursor.
        ends_body: whether the body of the response has been made: what it has left open does not keep its work from
            being committed.

    Raises:
        OpenCursorError: the transaction has written, and the result is to be read on by the body.
    """
    try:
        await session.flush()
        if not has_open_cursor(session):
            # Its transaction was lost, as the fetching of its rows was interrupted.
            return False
        has_written = await _has_written(session)
    except UNANSWERED:
        # The commit that follows says what is wrong with the transaction.
        return False
    if has_written and not ends_body:
        raise OpenCursorError
    return not has_written


async def has_only_read(session: AsyncSession) -> bool:
    """Return whether the open transaction of `session` can end with nothing lost, and no code is in the middle of it.

    What is not known to read keeps it open, as does ``session.connection()``: what it has returned is of use in this
    transaction alone.
    """
    guard = guard_of(session)
    door = guard.door
    if (
        door is None
        or door.is_busy
        or innermost_block(guard) is not None
        or guard.has_written(beside_on_begin=True)
        or has_open_cursor(session)
    ):
        return False
    try:
        return not await _has_written(session)
    except UNANSWERED:
        # The transaction is aborted, or lost: what comes next says so, or goes on in a new one.
        return False


async def _has_written(session: AsyncSession) -> bool:
    guard = guard_of(session)
    assert guard.door is not None
    return await holds_work(session, guard.door, guard.has_written)
