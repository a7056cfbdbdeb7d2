"""Which code has written in a transaction: a handler that a middleware has given up on, or other code."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ctxdb_core._sqlalchemy.doors import is_busy
from ctxdb_core._sqlalchemy.private import begin_without_statement
from ctxdb_core._sqlalchemy.written import only_reads

__all__ = ["Authors", "find_authors", "has_written", "note_author", "note_unseen_author"]

_WRITERS = "ctxdb.writers"


class Authors(NamedTuple):
    """Whose work the open transactions of a unit hold."""

    handlers: bool
    """Whether they hold work of handlers that are still at work."""
    others: bool
    """Whether they hold work of anything else, such as a middleware or a handler that has returned."""


def note_author(session: Session, clause: Any, author: object) -> None:
    """Note what `session` is going to hold.

    Args:
        session: where.
        clause: what is about to be executed; ``None`` where that is not known, as in a flush. What is only read is
            nobody's work. A ``SELECT`` counts as reading, although it may call a function that writes.
        author: the call of a handler that the running code is a part of; ``None`` if it is not part of any.
    """
    if only_reads(clause):
        return
    # The transaction begins now, as the statement is about to begin it: its writers are noted under it.
    begin_without_statement(session)
    writers = _writers(session)
    if writers is None:
        writers = set()
        session.info[_WRITERS] = (ref(session.get_transaction()), writers)
    writers.add(author)


def note_unseen_author(session: Session) -> None:
    """Note that the open transaction of `session`, if it has one, may hold work whose author was not noted."""
    if session.in_transaction():
        note_author(session, None, None)


def _writers(session: Session) -> set[object] | None:
    """Return the authors of what the open transaction has written; ``None`` if there is no such work."""
    transaction, writers = session.info.get(_WRITERS, (None, None))
    return writers if transaction is not None and transaction() is session.get_transaction() else None


def has_written(sessions: Iterable[AsyncSession], author: object) -> bool:
    """Return whether the open transactions of `sessions` may hold work of `author`; see `find_authors` for objects."""
    return any(
        sync_session.new or sync_session.dirty or sync_session.deleted or author in (_writers(sync_session) or ())
        for sync_session in (session.sync_session for session in sessions)
        if sync_session.in_transaction()
    )


def find_authors(sessions: Iterable[AsyncSession], at_work: Collection[object]) -> Authors:
    """Return whose work the open transactions of `sessions` hold.

    Objects that have not been flushed do not say which code has changed them: they count as the work of both.
    """
    of_handlers = of_others = False
    for session in sessions:
        sync_session = session.sync_session
        if not sync_session.in_transaction():
            continue
        if sync_session.new or sync_session.dirty or sync_session.deleted:
            return Authors(handlers=True, others=True)
        # A statement that is under way counts as a handler's: what it does cannot be committed before it has ended,
        # and the answer does not wait for that.
        of_handlers |= is_busy(session)
        for author in _writers(sync_session) or ():
            if author in at_work:
                of_handlers = True
            else:
                of_others = True
    return Authors(of_handlers, of_others)
