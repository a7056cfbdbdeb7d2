"""What an attempt has committed so far: only one that has committed nothing can be made again."""

from __future__ import annotations

from contextvars import ContextVar

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core.isolation import is_autocommit, is_read_only

__all__ = ["Attempt", "current_attempt"]


class Attempt:
    """One run of a unit of work that may be run again.

    Args:
        outer: the attempt that this one is a part of: what is committed here is committed there, too.
    """

    def __init__(self, outer: Attempt | None) -> None:
        self.outer = outer
        self.committed: list[str] = []
        """The names of the databases on which something was committed."""

    def watch(self, session: AsyncSession, db: object) -> None:
        """Take note of what is committed through a session that was made for this attempt."""
        writable = False

        @event.listens_for(session.sync_session, "after_begin")
        def begun(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
            nonlocal writable
            # What can only read leaves nothing behind that a second attempt would find.
            if not transaction.nested and not is_read_only(connection):
                writable = True
                if is_autocommit(connection):
                    self._note(db)

        @event.listens_for(session.sync_session, "after_commit")
        def committed(session: Session) -> None:
            if writable and not session.in_nested_transaction():
                self._note(db)

        @event.listens_for(session.sync_session, "after_transaction_end")
        def ended(session: Session, transaction: SessionTransaction) -> None:
            nonlocal writable
            if transaction.parent is None:
                writable = False

    def _note(self, db: object) -> None:
        name = repr(db)
        attempt: Attempt | None = self
        while attempt is not None:
            if name not in attempt.committed:
                attempt.committed.append(name)
            attempt = attempt.outer


current_attempt: ContextVar[Attempt | None] = ContextVar("ctxdb_attempt", default=None)
"""The attempt of the running code. Tasks inherit it: what they commit meanwhile counts."""
