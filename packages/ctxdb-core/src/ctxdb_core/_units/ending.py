"""How one session ends: commit, roll back, close; and what is done when that fails, too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NoReturn

from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ctxdb_core._databases.observer import note_error
from ctxdb_core.errors import ContextClosedError, SessionClosedError

logger = logging.getLogger("ctxdb")

RETRY_SECONDS = 0.02

# How long a roll-back may take before its connection is thrown away: a server may have stopped answering.
ROLL_BACK_SECONDS = 5.0

# Sessions that another task was using when they had to end, each with the task that waits for it.
_stragglers: set[asyncio.Task[None]] = set()


def in_transaction(session: AsyncSession) -> bool:
    """Return whether `session` has begun a transaction: only then can it hold a connection."""
    return session.sync_session.in_transaction()


async def roll_back(session: AsyncSession, error: BaseException | None, name: object) -> None:
    """Roll back, or throw the connection away if that fails.

    The failure is attached to `error`, the one that made the roll-back necessary; it is logged where there is none.
    """
    if not in_transaction(session):
        return
    note_error(session, error)
    try:
        async with asyncio.timeout(ROLL_BACK_SECONDS):
            await session.rollback()
    except BaseException as exc:  # noqa: BLE001 - the connection is discarded, and the failure reported
        report(exc, error, f"the roll-back on {name} failed, and its connection was thrown away")
        await _discard(session)


async def close(session: AsyncSession, error: BaseException | None, name: object) -> None:
    """Close, or throw the connection away if that fails; a failure is reported as by `roll_back`."""
    if closes_without_io(session):
        session.sync_session.close()
        return
    note_error(session, error)
    try:
        async with asyncio.timeout(ROLL_BACK_SECONDS):
            await session.close()
    except BaseException as exc:  # noqa: BLE001 - the connection is discarded, and the failure reported
        report(exc, error, f"closing the session on {name} failed, and its connection was thrown away")
        await _discard(session)


def leave_blocks(session: AsyncSession) -> None:
    """Let the code in a block of `session` go on with it, although the block's transaction was ended from outside.

    SQLAlchemy refuses further statements then, inside of ``async with session.begin():`` and of a savepoint's block.
    Their ends do nothing any more.
    """
    sync_session = session.sync_session
    if sync_session._trans_context_manager is not None and not sync_session.in_transaction():  # noqa: SLF001 - as below
        sync_session._trans_context_manager = None  # noqa: SLF001 - there is no public name for it


def closes_without_io(session: AsyncSession) -> bool:
    """Return whether the session can be closed by a plain call: nothing of it needs the database, or is overridden."""
    sync_session = session.sync_session
    return (
        not sync_session.in_transaction()
        and type(session).close is AsyncSession.close
        and type(sync_session).close is Session.close
    )


def refuse_after_unit(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for ``Session.get_bind`` once the unit of work has ended."""
    raise ContextClosedError


def refuse_after_close(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for ``Session.get_bind`` once `close_db_session` has ended the session."""
    raise SessionClosedError


def refuse_further_use(session: AsyncSession, refuse: Callable[..., NoReturn]) -> None:
    """Make every later statement of `session` fail by `refuse`.

    A closed SQLAlchemy session begins anew when it is used, outside of whoever tracked it: a connection taken so would
    never be given back, and what is written would never be committed. ``Session.get_bind`` is asked before each
    connection is taken (SQLAlchemy, "Custom Vertical Partitioning").
    """
    sync_session = session.sync_session
    sync_session.get_bind = refuse  # type: ignore[method-assign]  # on this one object only
    # What is only added would be lost without a statement; and a statement may name its engine itself.
    sync_session._autobegin_t = refuse  # type: ignore[method-assign]  # noqa: SLF001 - there is no public name for it


async def _discard(session: AsyncSession) -> None:
    """Give the session's connections up: they are closed, not returned."""
    try:
        await session.invalidate()
    except IllegalStateChangeError:
        # Another task is in the middle of taking a connection for this very session; it cannot be stopped there.
        straggler = asyncio.create_task(_invalidate_when_free(session))
        _stragglers.add(straggler)
        straggler.add_done_callback(_stragglers.discard)
    except Exception:
        logger.exception("A session could not be invalidated")


async def _invalidate_when_free(session: AsyncSession) -> None:
    while True:
        await asyncio.sleep(RETRY_SECONDS)
        try:
            await session.invalidate()
        except IllegalStateChangeError:
            continue
        except Exception:
            logger.exception("A session could not be invalidated")
        return


def report(exc: BaseException, error: BaseException | None, what: str) -> None:
    """Attach `exc` to `error`, the one that surfaces; log it where there is none."""
    if error is None:
        logger.warning("While a unit of work ended, %s", what, exc_info=exc)
    elif exc is not error:
        error.add_note(f"ctxdb: {what}: {type(exc).__name__}: {exc}")
