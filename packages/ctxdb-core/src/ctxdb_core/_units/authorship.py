"""Whose work it is that a transaction holds: an application's that a middleware has given up on, or somebody else's."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar, Token
from typing import Any
from weakref import ref

from sqlalchemy import TextClause
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ctxdb_core._sqlalchemy.gate import is_busy
from ctxdb_core._sqlalchemy.private import begin_without_statement

__all__ = ["Call", "current_call", "find_authors", "note_author"]


class Call:
    """The call of a handler, which a middleware may give up on while it goes on.

    Args:
        unit: the unit of work that it is made in. Tasks and servers inherit the call, whatever unit they have then.
    """

    __slots__ = ("outer", "pending", "token", "unit")

    token: Token[Call | None]

    def __init__(self, unit: object) -> None:
        self.unit = unit
        self.outer = current_call.get()
        self.pending = True
        """Whether nothing of its response has been sent yet, and it has not returned."""


current_call: ContextVar[Call | None] = ContextVar("ctxdb_call", default=None)
"""The innermost call that the running code is a part of, as far as an adapter can tell."""

_WRITERS = "ctxdb.writers"


def note_author(session: Session, clause: Any, call: Call | None) -> None:
    """Note what `session` is going to hold.

    Args:
        session: where.
        clause: what is about to be executed; ``None`` where that is not known, as in a flush. What is only read is
            nobody's work. A ``SELECT`` counts as reading, although it may call a function that writes.
        call: the one that the running code is a part of, if it is part of any.
    """
    if _reads(clause):
        return
    # The statement is about to do so; the transaction tells its writers from those of one that has ended.
    begin_without_statement(session)
    writers = _writers(session)
    if writers is None:
        writers = set()
        session.info[_WRITERS] = (ref(session.get_transaction()), writers)
    writers.add(call)


def _writers(session: Session) -> set[Call | None] | None:
    """Return who has written in the open transaction; ``None`` if nobody has, or none is open."""
    transaction, writers = session.info.get(_WRITERS, (None, None))
    return writers if transaction is not None and transaction() is session.get_transaction() else None


def find_authors(sessions: Iterable[AsyncSession]) -> tuple[bool, bool]:
    """Return whether the open transactions hold work of calls that are pending, and whether of others.

    Both, where it cannot be told: objects that have not been flushed do not say who has changed them.
    """
    of_pending = of_others = False
    for session in sessions:
        sync_session = session.sync_session
        if not sync_session.in_transaction():
            continue
        if sync_session.new or sync_session.dirty or sync_session.deleted:
            return True, True
        # What is under way cannot be committed before it has ended, which nobody waits for.
        of_pending |= is_busy(session)
        for call in _writers(sync_session) or ():
            if call is not None and call.pending:
                of_pending = True
            else:
                of_others = True
    return of_pending, of_others


def _reads(clause: Any) -> bool:
    if isinstance(clause, TextClause):
        return clause.text.lstrip()[:6].upper() == "SELECT"
    return getattr(clause, "is_select", False)
