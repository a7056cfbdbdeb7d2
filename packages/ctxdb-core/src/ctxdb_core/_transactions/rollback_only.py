"""Transactions that can only be rolled back: each commit of one raises `UnexpectedRollbackError`."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._sqlalchemy.traced_session import Ending
from ctxdb_core.errors import UnexpectedRollbackError

__all__ = ["check_commits", "refuse_if_rollback_only", "set_rollback_only"]

_DOOMED = "ctxdb.rollback_only"
_CHECKED = "ctxdb.checked_commits"
_NEXT = None
"""Stands for the transaction that goes on in the place of one that was lost, with what had not been flushed in that."""


def set_rollback_only(
    session: Session, why: str, cause: BaseException | None = None, *, joined: SessionTransaction | None = None
) -> None:
    """Have each commit of the current transaction fail, the release of a savepoint in it included.

    Args:
        session: the session of the transaction; if none is open, one is begun.
        why: the message of the error.
        cause: the exception that the error is raised from.
        joined: the savepoint, or transaction, that the failed code was part of: only its own commit, and those inside
            of it, fail. By default, the whole transaction cannot be committed.
    """
    transaction = innermost(session) if joined is not None else session.get_transaction()
    each = transaction
    while each is not None:
        if each is joined:
            transaction = joined
        each = each.parent
    if transaction is None:
        transaction = session.begin()
    if _DOOMED not in session.info:
        session.info[_DOOMED] = {}
        event.listen(session, "before_commit", refuse_if_rollback_only)
        event.listen(session, "after_transaction_end", _forget)
    session.info[_DOOMED].setdefault(transaction, (why, cause))


def refuse_if_rollback_only(session: Session) -> None:
    """Raise the error that says why the current transaction cannot be committed, if it cannot.

    Raises:
        UnexpectedRollbackError: the transaction can only be rolled back.
    """
    doomed = session.info.get(_DOOMED, {})
    if _NEXT in doomed:
        why, cause = doomed[_NEXT]
        raise UnexpectedRollbackError(why) from cause
    transaction = innermost(session) if doomed else None
    while transaction is not None:
        if transaction in doomed:
            why, cause = doomed[transaction]
            raise UnexpectedRollbackError(why) from cause
        transaction = transaction.parent


def check_commits(session: Session, check: Callable[[], None]) -> None:
    """Have `check` called before each commit of `session`, whichever code commits; a session's first `check` counts.

    The release of a savepoint is no commit: what it keeps is committed, or rolled back, with the transaction.
    """
    if _CHECKED in session.info:
        return
    session.info[_CHECKED] = check

    @event.listens_for(session, "before_commit")
    def _check(session: Session) -> None:
        if not session.in_nested_transaction():
            check()


def innermost(session: Session) -> SessionTransaction | None:
    """Return the innermost open savepoint of a session, or else its transaction, if there is one."""
    return session.get_nested_transaction() or session.get_transaction()


def _forget(session: Session, transaction: SessionTransaction) -> None:
    doomed = session.info[_DOOMED]
    why = doomed.pop(transaction, None)
    if transaction.parent is None:
        if getattr(session, "ending", None) is not Ending.LOST_READING:
            doomed.pop(_NEXT, None)
        elif why is not None:
            doomed[_NEXT] = why
