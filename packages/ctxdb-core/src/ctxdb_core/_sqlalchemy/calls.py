"""Makes each call of a session in its turn at the session's `Door`, and within the time limit of the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sqlalchemy.exc import InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import SessionTransaction

from ctxdb_core._sqlalchemy.call_limit import CallLimit
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.greenlets import call_through
from ctxdb_core._sqlalchemy.private import error_that_has_undone
from ctxdb_core._sqlalchemy.second_connections import explain_time_out
from ctxdb_core._sqlalchemy.traced_session import TracedSession
from ctxdb_core.errors import (
    CommitOutcomeUnknownError,
    DeadlineExceededError,
    StatementInterruptedError,
    TransactionAbortedError,
)

__all__ = ["in_time", "pass_door"]

_CLEANS_UP = frozenset({"close", "invalidate", "reset", "rollback"})


async def pass_door(door: Door | None, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``fn(*args, **kwargs)``, a call of a session, in its turn at `door`; at once if there is none."""
    if door is None:
        try:
            return await call_through(None, fn, args, kwargs)
        except PoolTimeoutError as exc:
            explain_time_out(exc, _session_of(fn, args))
            raise
    if not door.enter():
        await door.wait()
    try:
        if door.is_suspect and isinstance(session := _session_of(fn, args), TracedSession):
            await call_through(door, session.leave_lost_reading, (), {})
        if door.latest is not None:
            return await _call_in_time(door, door.latest(), fn, args, kwargs)
        return await call_through(door, fn, args, kwargs)
    except PendingRollbackError as exc:
        _explain_lost_transaction(exc, _session_of(fn, args))
    except BaseException as exc:
        door.is_suspect = True
        unknown = next((each for each in (exc, exc.__cause__) if isinstance(each, CommitOutcomeUnknownError)), None)
        if unknown is not None:
            door.commit_is_unknown = True
        session = _session_of(fn, args)
        explain_time_out(exc, session)
        door.answer_interruption()
        if isinstance(session, TracedSession):
            if isinstance(exc, InvalidRequestError):
                _explain_failed_commit(exc, session)
            if getattr(fn, "__name__", "") == "commit":
                session.note_failed_commit(exc, unknown)
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
    with in_time(door, latest):
        return await call_through(door, fn, args, kwargs)


@contextmanager
def in_time(door: Door, latest: float | None) -> Iterator[None]:
    """Give up what is done in the block, with the turn of `door`, when its time is up.

    Args:
        door: the session's.
        latest: when that is, on the event loop's clock; ``None`` without a limit.

    Raises:
        DeadlineExceededError: the block was given up.
        CommitOutcomeUnknownError: it was given up while COMMIT was under way.
    """
    limit = door.limit = CallLimit(latest)
    is_given_up = False
    try:
        try:
            yield
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


def _session_of(fn: Any, args: tuple[Any, ...] = ()) -> Any:
    """Return the session of a call: ``run_sync`` gives it to a function of the user's."""
    if args and isinstance(args[0], TracedSession):
        return args[0]
    owner = getattr(fn, "__self__", None)
    return owner.session if isinstance(owner, SessionTransaction) else owner


def _explain_lost_transaction(error: PendingRollbackError, session: object) -> NoReturn:
    """Raise the error that says what the transaction was lost by.

    Raises:
        StatementInterruptedError: a statement was interrupted.
        TransactionAbortedError, CommitOutcomeUnknownError: the commit of the transaction has failed.
        PendingRollbackError: the error is about another failure.
    """
    if not isinstance(session, TracedSession):
        raise error
    session.note_interruption()
    interrupted = session.interrupted
    if interrupted is None or interrupted.transaction() is not session.get_transaction():
        _explain_failed_commit(error, session)
        raise error
    raise StatementInterruptedError(
        f"The statement {interrupted.statement} was interrupted, by a time limit for instance, and the "
        "interruption was caught. To stop the statement, its driver has given up the connection, so this "
        "transaction is lost with what was written in it. Let the interruption propagate; or call "
        "`await rollback_db_session(db)` to go on without that work; or run what may take too long beside the "
        "transaction, `await run_in_new_ctx(fn, ...)`."
    ) from error


def _explain_failed_commit(error: InvalidRequestError, session: TracedSession) -> None:
    """Raise the error that says so if a call was refused because the commit of its transaction has failed before.

    SQLAlchemy's error names the failure of a flush, and not that of a COMMIT.

    Raises:
        TransactionAbortedError: it was.
        CommitOutcomeUnknownError: it was, and the outcome of the commit is unknown.
    """
    transaction = session.get_transaction()
    failure = session.failed_commit_of(transaction)
    if failure is None or transaction is None or transaction.is_active or error_that_has_undone(transaction):
        return
    if failure.unknown is not None:
        raise CommitOutcomeUnknownError(
            f"The commit of this transaction was interrupted, or its answer lost ({failure.error}), maybe in another "
            "task of this unit of work: the work may be stored, or not, and nothing more can be done in the "
            "transaction. Look whether the work is there before it is done again. `session.commit()` can be cancelled; "
            "`commit_db_session(db)` is seen through.",
            *failure.unknown,
        ) from error
    raise TransactionAbortedError(
        f"The commit of this transaction has failed ({failure.error}), maybe in another task of this unit of work: "
        "nothing more can be done in it. Let the error propagate; or call `await rollback_db_session(db)` to go on "
        "without the transaction's work; or give the task a unit of work of its own (`run_in_new_ctx`)."
    ) from error
