"""What a block finds where it begins: a unit of work that it may take part in, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ctxdb_core._blocks.shared_session import is_in_block_of
from ctxdb_core._blocks.task_unit import TaskUnit
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._units.generator_blocks import innermost_unit
from ctxdb_core._units.request_unit import RequestUnit
from ctxdb_core._units.scheduler_jobs import is_inherited, is_job
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core._units.unit import UnitOfWork, current_unit

__all__ = ["Found", "Place", "find", "unit_around"]


class Found(Enum):
    """What a block finds on its database: a column of the table in `entry`."""

    # A unit of work whose session the running code may use.
    BEGUN = 0
    """A unit of work, which is a transaction, and its first statement has been made."""
    UNBEGUN = 1
    """A unit of work, which is a transaction from its beginning, before its first statement."""
    BEGUN_SESSION = 2
    """A mere session of a `TransactionContext`, whose statements have begun a transaction that no block commits."""
    SESSION = 3
    """A mere session of a `TransactionContext` on which no transaction has begun."""
    AUTOCOMMIT = 4
    """A unit of work without transactions: each statement is committed by itself."""

    # No such unit.
    NOTHING = 5
    """There is no unit of work."""
    ENDED = 6
    """A unit of work was inherited that has ended since."""
    CUT_SHORT = 7
    """The unit of work has ended in the middle of the running code: of a block that has joined it, or of a handler that
    a middleware has given up on. What that code does now would be half of its work."""
    OTHER_JOB = 8
    """The running task is a scheduler's job; the unit belongs to the code in whose context the job was started."""
    OTHER_TASK = 9
    """The session is that of a `TransactionContext`'s block in another task."""
    OTHER_LOOP = 10
    """The unit of work is that of another event loop, such as another thread's."""
    TEST_ON_OTHER_LOOP = 11
    """A test's unit, on another event loop. The test can roll back work in this unit only."""


@dataclass(slots=True)
class Place:
    """Where a block begins.

    Args:
        db: the database that the block is about.
        unit: the unit of work that was found, if any: also one that the running code may not use.
        why_not: why the running code may not use the unit; ``None`` if it may.
        is_in_block: whether the running code is inside of a block on `db` which is a transaction of the unit.
    """

    db: DBConnect
    unit: UnitOfWork | None
    why_not: Found | None
    is_in_block: bool

    @property
    def found(self) -> Found:
        """What there is at this moment: each statement may begin a transaction, and each commit ends one."""
        if self.why_not is not None or self.unit is None:
            return self.why_not or Found.NOTHING
        unit = self.unit
        if unit.autocommit:
            return Found.AUTOCOMMIT
        if isinstance(unit, TaskUnit) and unit.db is self.db and not unit.is_transaction():
            return Found.BEGUN_SESSION if self.has_begun else Found.SESSION
        return Found.BEGUN if self.has_begun else Found.UNBEGUN

    @property
    def usable_unit(self) -> UnitOfWork:
        """The unit of work, where the running code may use it."""
        assert self.unit is not None and self.why_not is None  # noqa: PT018 - callers have decided on both
        return self.unit

    @property
    def has_begun(self) -> bool:
        """Whether a transaction is open on the session."""
        session = None if self.unit is None else self.unit.sessions.get(self.db)
        return session is not None and in_transaction(session)


def find(db: DBConnect, *, skip_other_contexts: bool = False) -> Place:
    """Return what there is on `db` for the running code.

    Args:
        db: the database.
        skip_other_contexts: pass over blocks that a `TransactionContext` of another database has opened, also where the
            unit of work of such a block would hold the session on `db`, too.

    Raises:
        ContextNotInitiatedError: the running code iterates over an async generator in a block on the same session.
    """
    unit = innermost_unit(db)
    if skip_other_contexts:
        while isinstance(unit, TaskUnit) and unit.db is not db:
            unit = unit.outer
    elif unit is not None:
        unit = unit.of(db)
    if unit is None:
        return Place(db, None, None, is_in_block=False)
    return Place(db, unit, _why_not(unit), unit.is_block or is_in_block_of(unit, db))


def unit_around() -> UnitOfWork | None:
    """Return the unit of work that waits for what the running code begins beside it, if there is one.

    It is the innermost one that the running code may use.
    """
    unit = innermost_unit()
    while isinstance(unit, TaskUnit) and _why_not(unit) is not None:
        unit = unit.outer
    return None if unit is None or _why_not(unit) is not None else unit


def _why_not(unit: UnitOfWork) -> Found | None:
    """Return why the running code may not use the session of `unit`; ``None`` if it may."""
    if is_job() and is_inherited(current_unit):
        return Found.OTHER_JOB
    ended = unit.over if isinstance(unit, TaskUnit) else unit.closed
    if ended:
        is_given_up = isinstance(unit, RequestUnit) and unit.is_given_up()
        return Found.CUT_SHORT if is_given_up or is_in_block_of(unit) else Found.ENDED
    if not unit.is_on_its_loop():
        return Found.TEST_ON_OTHER_LOOP if unit.shared else Found.OTHER_LOOP
    if isinstance(unit, TaskUnit) and not unit.is_owned():
        return Found.OTHER_TASK
    return None
