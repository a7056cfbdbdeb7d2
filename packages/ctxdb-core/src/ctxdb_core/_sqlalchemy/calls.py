"""Makes each call of a session in its turn at the session's `Door`, and within the time limit of the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast
from weakref import ref

from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import SessionTransaction

from ctxdb_core._sqlalchemy.call_limit import CallLimit
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.failures import failure_of
from ctxdb_core._sqlalchemy.greenlets import call_through
from ctxdb_core._sqlalchemy.loaded import LoadedValues
from ctxdb_core._sqlalchemy.private import connections_of, innermost_block
from ctxdb_core._sqlalchemy.second_connections import explain_time_out
from ctxdb_core._sqlalchemy.traced_session import Interrupted, TracedSession
from ctxdb_core.errors import CommitOutcomeUnknownError, DeadlineExceededError, StatementInterruptedError

__all__ = ["pass_door"]

_CLEANS_UP = frozenset({"close", "invalidate", "reset", "rollback"})


async def pass_door(door: Door | None, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``fn(*args, **kwargs)``, a call of a session, in its turn at `door`; at once if there is none."""
    if door is None:
        try:
            return await call_through(None, fn, args, kwargs)
        except PoolTimeoutError as exc:
            explain_time_out(exc, _session_of(fn))
            raise
    if not door.enter():
        await door.wait()
    try:
        if door.latest is not None:
            return await _call_in_time(door, door.latest(), fn, args, kwargs)
        return await call_through(door, fn, args, kwargs)
    except PendingRollbackError as exc:
        return await _go_on_after_interruption(exc, door, fn, args, kwargs)
    except BaseException as exc:
        if not isinstance(exc, Exception):
            _note_interruption(getattr(fn, "__self__", None))
        if isinstance(exc, CommitOutcomeUnknownError) or isinstance(exc.__cause__, CommitOutcomeUnknownError):
            door.commit_is_unknown = True
        explain_time_out(exc, _session_of(fn))
        door.answer_interruption()
        raise
    finally:
        door.leave()


async def _call_in_time(
    door: Door, latest: float | None, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a call that is given up if the pool, the network or the database does not answer in time."""
    if door.limit is not None or getattr(fn, "__name__", "") in _CLEANS_UP:
        # The limit of the outer call covers a call that is made inside of it; giving a connection back has limits of
        # its own.
        return await call_through(door, fn, args, kwargs)
    limit = door.limit = CallLimit(latest)
    is_given_up = False
    try:
        try:
            return await call_through(door, fn, args, kwargs)
        finally:
            door.limit = None
            is_given_up = limit.end()
    except asyncio.CancelledError as exc:
        if not is_given_up:
            raise
        if isinstance(exc.__cause__, CommitOutcomeUnknownError):
            raise exc.__cause__ from exc
        raise DeadlineExceededError(
            "This call was given up, as its time was up: the pool had no connection to give, or the network or the "
            "server does not answer. Let the error propagate, so that the unit of work is rolled back, or give it more "
            "time."
        ) from exc


def _session_of(fn: Any) -> Any:
    owner = getattr(fn, "__self__", None)
    return owner.session if isinstance(owner, SessionTransaction) else owner


def _note_interruption(session: object) -> None:
    """Note which interrupted statement has cost the session its open transaction, and whether that had written."""
    if not isinstance(session, TracedSession) or session.interrupted is not None:
        return
    transaction = session.get_transaction()
    for connection in () if transaction is None else connections_of(transaction):
        failure = failure_of(connection)
        if connection.invalidated and failure is not None and failure.was_interrupted:
            session.interrupted = Interrupted(
                ref(cast(SessionTransaction, transaction)), failure, session.has_written()
            )


async def _go_on_after_interruption(
    error: PendingRollbackError, door: Door, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make the call again in a new transaction, if the one that was lost with an interrupted statement had only read.

    Raises:
        StatementInterruptedError: the lost transaction had written, or the running code is in its ``with`` block.
        PendingRollbackError: no statement was interrupted; the error is about another failure.
    """
    session = getattr(fn, "__self__", None)
    # Fetching the rows of a streamed result is no call of the session, so `pass_door` does not note its interruption.
    _note_interruption(session)
    if not isinstance(session, TracedSession) or session.interrupted is None:
        raise error
    interrupted = session.interrupted
    if interrupted.transaction() is not session.get_transaction():
        raise error
    if interrupted.had_written or innermost_block(session) is not None:
        raise StatementInterruptedError(
            f"The statement {interrupted.statement} was interrupted, by a time limit for instance, and the "
            "interruption was caught. To stop the statement, its driver has given up the connection, so this "
            "transaction is lost with what was written in it. Let the interruption propagate; or call "
            "`await rollback_db_session(db)` to go on without that work; or run what may take too long beside the "
            "transaction, `await run_in_new_ctx(fn, ...)`."
        ) from error
    # This roll-back sends nothing: the connection is gone.
    loaded = LoadedValues(session)
    await call_through(door, session.rollback, (), {})
    loaded.restore()
    return await call_through(door, fn, args, kwargs)
