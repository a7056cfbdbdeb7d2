"""Blocks on a session that end a part of its work: while one is open, only its own task may add to that part.

Tasks of a unit of work share its session. A savepoint belongs to the session and not to a task: its roll-back undoes
every write since, of all tasks. A task whose write was undone so would never hear of it. So a session knows the task
that each open block belongs to, and refuses the writes of other tasks in it. Tasks that were started inside of the
block belong to it, as they inherit the context of the code in it.

A refused task gets an error instead of its turn after the block: the code in the block may be waiting for that very
task, and then neither would ever go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ref

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state

from ctxdb_core._shield import LentTask
from ctxdb_core.errors import SessionAlreadyActiveError

__all__ = [
    "BlockedSession",
    "TaskBlock",
    "enter_block",
    "hold_block",
    "refuse_in_block_of_other_task",
    "release_blocks",
    "running_task",
]


class TaskBlock:
    """A block of the running task on a session: it ends with a transaction, if it is to `follow` one, or by `end`."""

    __slots__ = ("_has_ended", "_task", "_transaction")

    def __init__(self) -> None:
        task = running_task()
        self._task = None if task is None else ref(task)
        self._transaction: ref[SessionTransaction] | None = None
        self._has_ended = False

    def follow(self, transaction: SessionTransaction) -> None:
        """End together with `transaction`."""
        self._transaction = ref(transaction)

    def end(self) -> None:
        """End the block."""
        self._has_ended = True

    @property
    def is_open(self) -> bool:
        """Whether the block goes on."""
        if self._has_ended or self._transaction is None:
            return not self._has_ended
        mine = self._transaction()
        session: Session | None = None if mine is None else mine.session
        each = None if session is None else session.get_nested_transaction() or session.get_transaction()
        while each is not None and each is not mine:
            each = each.parent
        # An ended transaction never comes back, so the next call need not look for it.
        self._has_ended = each is None
        return not self._has_ended

    def is_of_other_task(self, task: asyncio.Task[Any] | None) -> bool:
        """Return whether the block belongs to a task other than `task`, and that task goes on."""
        owner = None if self._task is None else self._task()
        # A framework may enter dependencies in tasks of their own, which end before the handler begins.
        return owner is not None and owner is not task and not owner.done()


class BlockedSession(Session):
    """A session that knows the blocks which are open on it."""

    task_blocks: tuple[TaskBlock, ...] = ()
    """The blocks that belong to a task; some of them may have ended."""

    def delete(self, instance: object) -> None:
        if self.task_blocks:
            refuse_in_block_of_other_task(self)
        super().delete(instance)


_around: ContextVar[tuple[TaskBlock, ...]] = ContextVar("ctxdb_task_blocks", default=())
"""The blocks that the running code is in, on any session. Tasks inherit it; some of the blocks may have ended."""


def enter_block(session: BlockedSession) -> TaskBlock:
    """Return a block that the running task is in from now on, and that it has to `TaskBlock.end`, or let `follow`."""
    block = TaskBlock()
    if "task_blocks" not in vars(session):
        event.listen(session, "before_attach", _refuse_new_object)
    session.task_blocks = (*_open(session.task_blocks), block)
    _around.set((*_open(_around.get()), block))
    return block


@contextmanager
def hold_block(session: Session) -> Iterator[None]:
    """Run a block that belongs to the running task.

    Raises:
        SessionAlreadyActiveError: another task is in a block on `session`.
    """
    if not isinstance(session, BlockedSession):
        yield
        return
    refuse_in_block_of_other_task(session)
    outer = _around.get()
    block = enter_block(session)
    try:
        yield
    finally:
        block.end()
        _around.set(outer)


def refuse_in_block_of_other_task(session: Session) -> None:
    """Raise an error if the running code's next write would be part of another task's block, or end that block.

    Raises:
        SessionAlreadyActiveError: another task is in a block on `session`, and this code was not started in it.
    """
    if not isinstance(session, BlockedSession) or not session.task_blocks:
        return
    around, task = _around.get(), running_task()
    for block in session.task_blocks:
        if block not in around and block.is_of_other_task(task) and block.is_open:
            raise SessionAlreadyActiveError(_IN_BLOCK_OF_OTHER_TASK)


def release_blocks(session: Session) -> None:
    """Forget which tasks the blocks on `session` belong to, as their unit of work is about to end their transaction."""
    if isinstance(session, BlockedSession) and session.task_blocks:
        session.task_blocks = ()


def running_task() -> asyncio.Task[Any] | None:
    """Return the task that the running code belongs to; ``None`` in a callback, and in a thread without a loop."""
    try:
        task: Any = asyncio.current_task()
    except RuntimeError:
        return None
    return task.host if isinstance(task, LentTask) else task


def _open(blocks: Iterable[TaskBlock]) -> Iterator[TaskBlock]:
    return (block for block in blocks if block.is_open)


def _refuse_new_object(session: BlockedSession, instance: object) -> None:
    # An object of another task would be written by the next flush of the block, and be undone with it.
    if instance_state(instance).key is None:
        refuse_in_block_of_other_task(session)


_IN_BLOCK_OF_OTHER_TASK = (
    "Another task of this unit of work is inside of a block on its session (`session.begin_nested()`, "
    "`session.begin()`, `atomic_db_session`, `joining_session`): what is written here meanwhile would be undone with "
    "that block, unnoticed. Nothing was done. Give the task a unit of work of its own by `run_in_new_ctx(fn, ...)`, or "
    "another session by `transactional(db, 'requires_new')`; or let the block end before this begins."
)
