"""Keeps track of the blocks that the running code is in, on sessions of units of work that several tasks share."""

from __future__ import annotations

from contextvars import ContextVar

from ctxdb_core._blocks.task_unit import TaskUnit
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._sqlalchemy.task_blocks import running_task
from ctxdb_core._units.generator_blocks import IteratedUnit, is_at_yield, iterated_generator
from ctxdb_core._units.unit import UnitOfWork, current_unit
from ctxdb_core.errors import SessionAlreadyActiveError

__all__ = ["JoinedBlock", "SharedSessionBlock", "is_in_block_of"]


class JoinedBlock:
    """A block that takes part in the transaction of a unit of work, and changes nothing of it."""

    def __init__(self, unit: UnitOfWork, db: DBConnect) -> None:
        self.unit: UnitOfWork | None = unit
        """``None`` when the block is over."""
        self.db = db
        self._outer = _around.get()

    def __enter__(self) -> None:
        if self.unit is not None:
            self.unit.join(self)
        _around.set((*self._outer, self))

    def __exit__(self, *exc_info: object) -> None:
        # Not by a token: a fixture, for instance, leaves its block in another context than it has entered it in.
        _around.set(self._outer)
        if self.unit is not None:
            self.unit.part_with(self)
        # A context that has inherited this block may last, and must not keep the unit alive.
        self.unit, self._outer = None, ()


_around: ContextVar[tuple[JoinedBlock, ...]] = ContextVar("ctxdb_blocks", default=())
"""The blocks that the running code is in. Tasks inherit it: some of them may be over."""


def is_in_block_of(unit: UnitOfWork, db: DBConnect | None = None) -> bool:
    """Return whether the running code is in a block that goes on, and has joined `unit` on `db`, or on any."""
    return any(block.unit is unit and (db is None or block.db is db) for block in _around.get())


class SharedSessionBlock(JoinedBlock):
    """A block that a task has to itself on the session of a unit of work: it sets a savepoint there, for instance.

    A task can be in several, nested, and so can the tasks that it starts inside of one and waits for. Two other tasks
    cannot be in one at the same time: their savepoints would undo each other's work.

    Args:
        unit: whose session.
        db: on which database.
        may_nest: whether the block may be inside of another one of a `TransactionContext` in this task.
        by_context: whether a `TransactionContext` has made the block.
        ends_work: whether the block's end undoes, or commits, what was done on the session meanwhile. Around the yields
            of an async generator, the consumer's use of the session is refused then.

    Raises:
        SessionAlreadyActiveError: another task is in such a block; or this task is, and the block may not be nested.
    """

    def __init__(
        self,
        unit: UnitOfWork,
        db: DBConnect,
        *,
        may_nest: bool = True,
        by_context: bool = False,
        ends_work: bool = True,
    ) -> None:
        super().__init__(unit, db)
        self.by_context = by_context
        self._task = running_task()
        here = [block for block in unit.blocks if isinstance(block, SharedSessionBlock)]
        self._ends_work = ends_work
        self._generator = iterated_generator()
        self._current: IteratedUnit | None = None
        around = [block for block in here if block.by_context and block.is_by(self) and block.is_around()]
        # The unit of a `TransactionContext`'s block is a block around this one, too.
        if not may_nest and (around or isinstance(unit, TaskUnit)):
            raise SessionAlreadyActiveError
        if any(block.is_beside(self) for block in here):
            raise SessionAlreadyActiveError(
                "Another task is inside of a block that shares the session of this unit of work, and a session serves "
                "one task at a time. Give the task a unit of work of its own by `run_in_new_ctx(fn, ...)`, another "
                "session by `transactional(db, 'requires_new')` or a context's `new_transaction()` or `new_session()`, "
                "or let one block end before the other begins."
            )

    def __enter__(self) -> None:
        if self._generator is not None and self._ends_work:
            self._current = IteratedUnit(current_unit.get(), self._generator, shares=self.db)
            self._current.enter()
        super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        if self._current is not None:
            self._current.leave()
        super().__exit__(*exc_info)
        self._task = self._generator = None

    def is_by(self, other: SharedSessionBlock) -> bool:
        """Return whether this block and `other` are of the same task, and on the same database."""
        return self.db is other.db and self._task is other._task

    def is_around(self) -> bool:
        """Return whether this block of the running task is around its code, and not around a generator's ``yield``."""
        return self._generator is None or not is_at_yield(self._generator)

    def is_beside(self, other: SharedSessionBlock) -> bool:
        """Return whether this block is another task's, which goes on while that of `other` does."""
        if self.db is not other.db or self._task is other._task or self in other._outer:
            return False
        # A framework may enter the dependencies of a handler in tasks that end before the handler begins.
        return self._task is not None and not self._task.done()
