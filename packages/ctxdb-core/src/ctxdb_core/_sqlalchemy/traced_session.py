"""`TracedSession`: a synchronous session that knows its door, and what was written in its open transaction."""

from __future__ import annotations

from typing import NamedTuple
from weakref import ref

from sqlalchemy.orm import SessionTransaction

from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.failures import FailedStatement
from ctxdb_core._sqlalchemy.private import begin_without_statement, connections_of, has_to_flush
from ctxdb_core._sqlalchemy.task_blocks import BlockedSession

__all__ = ["Interrupted", "TracedSession"]


class Interrupted(NamedTuple):
    """A transaction that was lost with its connection."""

    transaction: ref[SessionTransaction]
    statement: FailedStatement
    had_written: bool


class TracedSession(BlockedSession):
    """A synchronous session that may have a door, and knows whether its open transaction holds work."""

    door: Door | None = None
    """What each statement passes, once a unit of work has taken the session."""
    interrupted: Interrupted | None = None
    """The transaction that was lost with an interrupted statement, until it is rolled back."""
    _written: ref[SessionTransaction] | None = None
    """The transaction in which something was written last."""
    _set_up: ref[SessionTransaction] | None = None
    """The transaction in which an `on_begin` has written, or set something, last."""

    def has_written(self, *, beside_on_begin: bool = False) -> bool:
        """Return whether the open transaction holds work, as far as its statements tell.

        A ``SELECT`` counts as reading, although it may call a function that writes.

        Args:
            beside_on_begin: whether to leave out what `on_begin` has done, which each transaction begins with.
        """
        return (
            has_to_flush(self)
            or self._has_noted_write()
            or (not beside_on_begin and self._set_up is not None and self._set_up() is self.get_transaction())
        )

    def note_write(self) -> None:
        """Note that the open transaction holds work, or the next one if none is open."""
        # The statement is about to begin the transaction, if none is open.
        begin_without_statement(self)
        if not self._has_noted_write():
            transaction = self.get_transaction()
            self._written = None if transaction is None else ref(transaction)

    def note_set_up(self) -> None:
        """Note that what was written so far in the open transaction is what `on_begin` has done."""
        self._set_up, self._written = self._written, None

    def note_set_up_is_no_work(self) -> None:
        """Note that `on_begin` has written nothing in the open transaction, as the database has told."""
        self._set_up = None

    def _has_noted_write(self) -> bool:
        return self._written is not None and self._written() is self.get_transaction()

    @property
    def begins_with_next_call(self) -> bool:
        """Whether no transaction is open, or the open one has made no statement."""
        transaction = self.get_transaction()
        return transaction is None or not connections_of(transaction)
