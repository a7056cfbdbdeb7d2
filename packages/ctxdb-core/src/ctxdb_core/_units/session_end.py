"""How one session ends: its roll-back, its closing, and what is done where these fail, too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.observer import note_commit, note_error
from ctxdb_core._sqlalchemy.binds import begun_connections, is_autocommit
from ctxdb_core._sqlalchemy.door import Door, Refuse
from ctxdb_core._sqlalchemy.door_session import DoorSession
from ctxdb_core._sqlalchemy.doors import interrupt_call
from ctxdb_core._sqlalchemy.greenlets import call_in_greenlet
from ctxdb_core._sqlalchemy.guarded_session import door_of, guard_of
from ctxdb_core._sqlalchemy.private import has_committed, is_at_rest
from ctxdb_core._sqlalchemy.task_blocks import release_blocks
from ctxdb_core._sqlalchemy.traced_session import Ending
from ctxdb_core._transactions.rollback_only import set_rollback_only
from ctxdb_core.errors import ContextClosedError, SessionClosedError, SessionOwnedError, StatementInterruptedError

logger = logging.getLogger("ctxdb")

# How long a roll-back may take before its connection is thrown away: a server may have stopped answering.
ROLL_BACK_SECONDS = 5.0

# How long the end of a unit of work waits for a call that it has interrupted. A driver gives its connection up sooner.
INTERRUPTION_SECONDS = 8.0

# Sessions with a call that did not end when it was interrupted, each with the task that waits for it.
_stragglers: set[asyncio.Task[None]] = set()


def in_transaction(session: AsyncSession) -> bool:
    """Return whether `session` has begun a transaction: only then can it hold a connection, or work."""
    # An object that a task adds or changes during another task's COMMIT begins no transaction.
    return not is_at_rest(session.sync_session)


def commit(session: AsyncSession) -> Coroutine[Any, Any, None]:
    """Commit, and let the objects of the session keep what they have loaded, whatever its ``expire_on_commit`` says.

    Raises:
        BaseException: the error of the commit.
    """
    # A plain function: each coroutine around the session's own is resumed for each message from the server.
    door = door_of(session)
    if door is not None and door.is_busy and not door.is_held():
        return _commit_in_turn(session, door)
    release_blocks(session.sync_session)
    return _commit_without_expiring(session) if session.sync_session.expire_on_commit else session.commit()


async def _commit_in_turn(session: AsyncSession, door: Door) -> None:
    # In one turn: a block that another task enters in between would have the commit refused.
    async with door.turn():
        await commit(session)


async def _commit_without_expiring(session: AsyncSession) -> None:
    sync_session = session.sync_session
    sync_session.expire_on_commit = False
    try:
        await session.commit()
    finally:
        sync_session.expire_on_commit = True


async def roll_back(session: AsyncSession, error: BaseException | None, name: object) -> None:
    """Roll back, or throw the connection away if that fails.

    The failure is attached to `error`, the one that made the roll-back necessary; it is logged where there is none. A
    transaction that is committed, as a listener of its commit has made the `error`, is ended, and the error says so.
    """
    async with turn(session):
        if not in_transaction(session):
            return
        note_error(session, error)
        release_blocks(session.sync_session)
        try:
            async with asyncio.timeout(ROLL_BACK_SECONDS):
                if has_committed(session.sync_session):
                    await _end_committed(session, error, name)
                else:
                    await session.rollback()
        except BaseException as exc:  # noqa: BLE001 - the connection is discarded, and the failure reported
            report(exc, error, f"the roll-back on {name} failed, and its connection was thrown away")
            await _discard(session)


async def _end_committed(session: AsyncSession, error: BaseException | None, name: object) -> None:
    # SQLAlchemy leaves the transaction as it is where a listener of `after_commit` fails, with its connection.
    note_commit(session)
    guard = guard_of(session)
    transaction = guard.get_transaction()
    assert transaction is not None, "it was committed"
    await call_in_greenlet(guard.end_as, Ending.COMMITTED, transaction.close)
    if error is not None:
        error.add_note(f"ctxdb: the commit on {name} had succeeded, and stands: a listener of it failed after that")


async def close(session: AsyncSession, error: BaseException | None, name: object) -> None:
    """Close, or throw the connection away if that fails; a failure is reported as by `roll_back`."""
    async with turn(session):
        if not in_transaction(session) and _closes_plainly(session):
            session.sync_session.close()
            return
        note_error(session, error)
        try:
            async with asyncio.timeout(ROLL_BACK_SECONDS):
                await session.close()
        except BaseException as exc:  # noqa: BLE001 - the connection is discarded, and the failure reported
            report(exc, error, f"closing the session on {name} failed, and its connection was thrown away")
            await _discard(session)


def interrupt(session: AsyncSession, refuse: Refuse, error: BaseException | None) -> None:
    """End a session for everyone else, and stop the call that is under way, as its work is undone anyway.

    A COMMIT is not stopped. Each other use of the session raises the error of `refuse` from now on; the call that is
    stopped shows the `error` for which its work is undone, too.
    """
    door = door_of(session)
    if door is not None:
        interrupt_call(session, because_of(error, refuse))
        door.end(refuse)


@asynccontextmanager
async def last_turn(session: AsyncSession, refuse: Refuse, *, latest: float | None = None) -> AsyncIterator[bool]:
    """End a session for everyone else, and take its turn for ending its transaction and closing it.

    Each other use of it raises the error of `refuse` from now on. The call that is under way may end until `latest`, on
    the event loop's clock; ``None`` is for as long as it takes. A free turn is taken whatever the time is.

    Returns:
        Whether the turn was had. A driver may not return from a call that was interrupted, or a COMMIT takes its time:
        then the session's connection is thrown away after that, and nothing else is left to do with it.
    """
    door = door_of(session)
    assert door is not None, "the unit of work has given the session one"
    turn = door.last_turn(refuse)
    try:
        async with asyncio.timeout_at(latest):
            await turn.__aenter__()
    except (TimeoutError, asyncio.CancelledError) as exc:
        straggler = asyncio.create_task(_discard_when_free(session, door, refuse))
        _stragglers.add(straggler)
        straggler.add_done_callback(_stragglers.discard)
        if isinstance(exc, asyncio.CancelledError):
            raise
        yield False
        return
    try:
        yield True
    finally:
        await turn.__aexit__(None, None, None)


async def end(session: AsyncSession, error: BaseException | None, name: object, refuse: Refuse) -> None:
    """Close a session after the call that is under way; every use of it from now on raises the error of `refuse`."""
    async with last_turn(session, refuse):
        await close(session, error, name)


def end_at_once(session: AsyncSession, refuse: Refuse) -> None:
    """Close a session for which `ends_without_io` is true; every use of it from now on raises the error of `refuse`."""
    guard = guard_of(session)
    if guard.identity_map or guard.on_end is not None:
        guard.close_unasked()
    # Without objects there is nothing to close: what the session had in its transaction has gone with it.
    if guard.door is not None:
        guard.door.end(refuse)


def ends_without_io(session: AsyncSession) -> bool:
    """Return whether the session can be closed by a plain call: nothing of it needs the database, or is overridden."""
    if not _closes_plainly(session):
        return False
    guard = guard_of(session)
    return is_at_rest(guard) and (guard.door is None or not guard.door.is_busy)


def _closes_plainly(session: AsyncSession) -> bool:
    # A session that belongs to no unit may be of another class.
    return isinstance(session, DoorSession) and session.closes_plainly and guard_of(session).closes_plainly


def may_be_closed(session: AsyncSession, exc: BaseException | None) -> bool:
    """Return whether code of the user's may close a session that its unit of work has to end.

    Args:
        session: which one.
        exc: the exception that leaves an ``async with`` block of the session: the work in it is not whole then, and
            the transaction can only be rolled back, also if the exception is caught further out.

    Raises:
        SessionOwnedError: its transaction holds work, which would be lost.
    """
    sync_session = guard_of(session)
    if not in_transaction(session) or not sync_session.has_written():
        return True
    if all(is_autocommit(connection) for connection in begun_connections(session)) and begun_connections(session):
        # In autocommit, each statement has been committed by itself: closing loses nothing.
        return True
    if exc is None:
        raise SessionOwnedError
    set_rollback_only(sync_session, _LEFT_BLOCK, exc)
    return False


_LEFT_BLOCK = (
    "An exception left an `async with` block of this unit of work's session, and was caught further out: half of the "
    "block's work must not be committed. Let the exception propagate; or run the block behind a savepoint, `async with "
    "session.begin_nested():`."
)


def refuse_after_unit(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse what is done with a session whose unit of work has ended."""
    raise ContextClosedError


def refuse_after_close(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse what is done with a session that `close_db_session` has ended."""
    raise SessionClosedError


def refuse_after_roll_back() -> NoReturn:
    """Refuse a statement whose transaction is rolled back, as a response was cancelled."""
    raise StatementInterruptedError(
        "This statement was stopped, and the transaction that it is part of is rolled back: the task that was about to "
        "end that transaction for a response, or for a unit of work, was cancelled, as where the client has gone. Work "
        "that must not end with the request needs a unit of work of its own: `run_in_new_ctx(fn, ...)`."
    )


def because_of(error: BaseException | None, refuse: Refuse) -> Refuse:
    """Return what raises the error of `refuse` from `error`."""

    def refuse_because_of_error() -> NoReturn:
        try:
            refuse()
        except Exception as exc:
            raise exc from error

    return refuse_because_of_error


def turn(session: AsyncSession, *, is_one_step: bool = False) -> AbstractAsyncContextManager[None]:
    """Take the turn of `session`, if it has turns, for several calls: see `Door.turn`."""
    door = door_of(session)
    return nullcontext() if door is None else door.turn(is_one_step=is_one_step)


async def _discard(session: AsyncSession) -> None:
    """Give the session's connections up: they are closed, not returned. No call may be under way on them."""
    try:
        await session.invalidate()
    except Exception:
        logger.exception("A session could not be invalidated")


async def _discard_when_free(session: AsyncSession, door: Door, refuse: Refuse) -> None:
    async with door.last_turn(refuse):
        await _discard(session)


def report(exc: BaseException, error: BaseException | None, what: str) -> None:
    """Attach `exc` to the `error` that surfaces, or log it where no error does."""
    if error is None:
        logger.warning("While a unit of work ended, %s", what, exc_info=exc)
    elif exc is not error:
        error.add_note(f"ctxdb: {what}: {type(exc).__name__}: {exc}")
