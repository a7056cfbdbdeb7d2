"""`TracedSession`: a synchronous session that knows its door, and what was written in its open transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet, ref

from sqlalchemy import Connection
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._sqlalchemy.binds import is_autocommit, is_read_only
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.failures import FailedStatement, failure_of, first_line
from ctxdb_core._sqlalchemy.private import (
    begin_without_statement,
    connections_of,
    end_without_restoring,
    has_committed,
    has_to_flush,
    innermost_block,
)
from ctxdb_core._sqlalchemy.task_blocks import BlockedSession, TaskBlock, refuse_in_block_of_other_task
from ctxdb_core._sqlalchemy.written import may_leave_work, only_sets
from ctxdb_core.errors import CommitOutcomeUnknownError

__all__ = ["CommitSession", "Ending", "Interrupted", "TracedSession"]


MOST_READS = 100
"""How many statements of a transaction are kept before they are looked through."""


class Interrupted(NamedTuple):
    """A transaction that was lost with its connection."""

    transaction: ref[SessionTransaction]
    statement: FailedStatement
    had_written: bool
    """Whether it held work, or a setting, that another transaction would not have."""


class FailedCommit(NamedTuple):
    """A transaction whose commit has failed, and which has not been rolled back yet."""

    transaction: ref[SessionTransaction]
    error: str
    unknown: tuple[tuple[str, ...], dict[str, int]] | None
    """What a `CommitOutcomeUnknownError` tells, if the outcome is unknown. The error itself would keep frames alive."""


class Ending(Enum):
    """How a transaction ends that ctxdb ends by neither a commit nor a roll-back."""

    LOST_READING = "lost reading"
    """It was lost with its connection, and had only read: the next transaction goes on in its place."""
    COMMITTED = "committed"
    """It is committed, and a listener of that commit has failed: SQLAlchemy has left it as it is."""


class CommitSession(Session):
    """A synchronous session that knows which of its commits stand although they have raised an error.

    It comes behind the user's session classes, whose ``commit`` may roll back, or close the session, for an error.
    """

    task_blocks: tuple[TaskBlock, ...]
    has_ended_by_commit: bool

    def commit(self) -> None:
        if self.task_blocks:
            # The commit would release the savepoint, whose block could not be undone any more.
            refuse_in_block_of_other_task(self)
        transaction = self.get_transaction()
        try:
            super().commit()
        except BaseException as exc:
            # A commit that has failed leaves the transaction open, to be rolled back, unless it was to be prepared for
            # a second phase. What comes behind COMMIT may fail as well: the connection is given back, and listeners
            # hear of that, and of the end of the transaction.
            ended = transaction is not None and self.get_transaction() is not transaction and not self.twophase
            self.has_ended_by_commit = ended
            if ended:
                exc.add_note(
                    "ctxdb: the commit had succeeded, and stands: what came behind it failed, such as a listener"
                )
            raise


class TracedSession(BlockedSession):
    """A synchronous session that may have a door, and knows whether its open transaction holds work."""

    door: Door | None = None
    """What each statement passes, once a unit of work has taken the session."""
    blocks_with_work: WeakSet[SessionTransaction] | None = None
    """The transactions and savepoints in whose blocks something was written without an error; made when needed."""
    interrupted: Interrupted | None = None
    """The transaction that was lost with an interrupted statement, until it is rolled back."""
    failed_commit: FailedCommit | None = None
    """The transaction whose commit has failed last; it may have been rolled back since."""
    has_ended_by_commit = False
    """Whether the last commit that has raised an error has ended its transaction all the same: it stands."""
    ending: Ending | None = None
    """How the open transaction ends, while ctxdb ends it by neither a commit nor a roll-back."""
    _written: ref[SessionTransaction] | None = None
    """The transaction in which something was written last."""
    _only_sets = False
    """Whether what was noted as written in that transaction has only set something for it, such as a role."""
    reads: list[Any] | None = None
    """The latest statements of the open transaction that read, no more than `MOST_READS` of them."""
    has_left_work = False
    """Whether one of the earlier such statements may have called a function that writes, or has locked rows."""
    _set_up: ref[SessionTransaction] | None = None
    """The transaction in which an `on_begin` has written, or set something, last."""
    _set_up_only_sets = False
    """Whether it has only set something there: it does so again in the next transaction."""

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

    def note_write(self, clause: Any = None) -> None:
        """Note that the open transaction holds work, or the next one if none is open.

        Args:
            clause: the statement; ``None`` for whatever may have been done.
        """
        # The statement is about to begin the transaction, if none is open.
        begin_without_statement(self)
        if not self._has_noted_write():
            transaction = self.get_transaction()
            self._written = None if transaction is None else ref(transaction)
            self._only_sets = only_sets(clause)
        elif self._only_sets:
            self._only_sets = only_sets(clause)

    def commit(self) -> None:
        # The user's class may roll back for the error that `CommitSession` raises.
        refuse_in_block_of_other_task(self)
        super().commit()

    def note_another_read(self, clause: Any) -> None:
        """Note a statement that reads, as far as can be told without a walk through it, and is not the first one."""
        reads = self.reads or []
        if len(reads) == MOST_READS:
            if not self.has_left_work and not self._has_noted_write():
                self.has_left_work = self._may_leave_work(reads)
            reads = []
        reads.append(clause)
        self.reads = reads

    def _may_leave_work(self, reads: Iterable[Any]) -> bool:
        transaction = self.get_transaction()
        dialects = [] if transaction is None else [each.dialect for each in connections_of(transaction)]
        return any(may_leave_work(clause, dialect) for dialect in dialects for clause in reads)

    def forget_reads(self) -> None:
        """Forget the statements that read: they are of an earlier transaction, or have been looked at."""
        self.reads = None
        self.has_left_work = False

    def note_set_up(self) -> None:
        """Note that what was written so far in the open transaction is what `on_begin` has done."""
        self.forget_reads()
        self._set_up, self._written = self._written, None
        self._set_up_only_sets = self._only_sets

    def note_set_up_is_no_work(self) -> None:
        """Note that `on_begin` has written nothing in the open transaction, as the database has told."""
        self._set_up = None

    def note_work_in_block(self) -> None:
        """Note that the block which the code is in holds work, and so do those around it."""
        if self.blocks_with_work is None:
            self.blocks_with_work = WeakSet()
        transaction = self.get_nested_transaction() or self.get_transaction()
        while transaction is not None:
            self.blocks_with_work.add(transaction)
            transaction = transaction.parent

    def note_interruption(self) -> None:
        """Note whether the open transaction was lost with its connection, as a statement was interrupted."""
        transaction = self.get_transaction()
        if transaction is None or self.interrupted is not None:
            return
        for connection in connections_of(transaction):
            failure = failure_of(connection)
            if connection.invalidated and failure is not None and failure.was_interrupted:
                had_written = not is_autocommit(connection) and self._has_sent_work(transaction, connection, failure)
                self.interrupted = Interrupted(ref(transaction), failure, had_written)

    def _has_sent_work(
        self, transaction: SessionTransaction, connection: Connection, interrupted: FailedStatement
    ) -> bool:
        # What was not flushed is not lost, and what `on_begin` sets is set anew in the next transaction.
        return (
            self._has_noted_write()
            or (self._set_up is not None and self._set_up() is transaction and not self._set_up_only_sets)
            or (not is_read_only(connection) and self._may_have_left_work(interrupted))
        )

    def _may_have_left_work(self, interrupted: FailedStatement) -> bool:
        if self.has_left_work:
            return True
        # The caller of the interrupted statement was told. It is the latest statement, unless it is one whose result is
        # read bit by bit.
        reads = list(reversed(self.reads or ()))
        index = next((index for index, clause in enumerate(reads) if clause is interrupted.clause), 0)
        return self._may_leave_work(reads[:index] + reads[index + 1 :])

    def note_failed_commit(self, error: BaseException, unknown: CommitOutcomeUnknownError | None) -> None:
        """Note that the commit of the open transaction has failed by `error`, unless a listener of it has.

        Args:
            error: what the call of ``commit`` has raised.
            unknown: the error, or its cause, that calls the outcome unknown, if it is.
        """
        transaction = self.get_transaction()
        if (
            transaction is not None
            and not transaction.is_active
            and not has_committed(self)
            and self.failed_commit_of(transaction) is None
        ):
            told = None if unknown is None else (unknown.databases, unknown.transaction_ids)
            self.failed_commit = FailedCommit(ref(transaction), first_line(error), told)

    def failed_commit_of(self, transaction: SessionTransaction | None) -> FailedCommit | None:
        """Return how the commit of `transaction` has failed; ``None`` if it has not."""
        failed = self.failed_commit
        return failed if failed is not None and failed.transaction() is transaction else None

    def leave_lost_reading(self) -> None:
        """End the open transaction if it was lost with an interrupted statement, and had only read.

        A roll-back, by the error that the next statement would get, forgets what was added or changed meanwhile: it
        would never be written. Inside of a block of the transaction, that error has to come.
        """
        self.note_interruption()
        interrupted, transaction = self.interrupted, self.get_transaction()
        if interrupted is not None and interrupted.transaction() is transaction:
            if interrupted.had_written or innermost_block(self) is not None:
                return
            self.forget_reads()
            self.end_as(Ending.LOST_READING, partial(end_without_restoring, self))
            if self.autobegin:
                # A roll-back that comes next ends the new transaction, with the callbacks and marks that it takes over.
                begin_without_statement(self)
        if self.door is not None:
            self.door.is_suspect = False

    def end_as(self, ending: Ending, end: Callable[[], object]) -> None:
        """Call `end`, which ends the open transaction; listeners of its end see by `ending` how it ends."""
        self.ending = ending
        try:
            end()
        finally:
            self.ending = None

    def _has_noted_write(self) -> bool:
        return self._written is not None and self._written() is self.get_transaction()

    @property
    def begins_with_next_call(self) -> bool:
        """Whether no transaction is open, or the open one has made no statement."""
        transaction = self.get_transaction()
        return transaction is None or not connections_of(transaction)
