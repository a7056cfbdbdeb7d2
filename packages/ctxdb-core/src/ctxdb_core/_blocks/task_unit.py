"""The unit of work of a `TransactionContext`'s block: one database's session, for the task that opened it alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary, ref

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import SessionTransactionOrigin

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._shield import LentTask
from ctxdb_core._units.session_end import refuse_after_unit
from ctxdb_core._units.unit import _CLOSED, CreateSession, UnitOfWork, current_unit, inherited_before_commit
from ctxdb_core.errors import ContextNotInitiatedError, SessionAlreadyActiveError

__all__ = ["CommitDebt", "TaskUnit", "TaskUnitBlock", "Visit", "open_task_unit"]

TaskUnitBlock: TypeAlias = AbstractAsyncContextManager[AsyncSession]


def _running_task() -> asyncio.Task[Any] | None:
    """Return the task that the running code belongs to; ``None`` in a callback, and in a thread without a loop."""
    try:
        task: Any = asyncio.current_task()
    except RuntimeError:
        return None
    return task.host if isinstance(task, LentTask) else task


class TaskUnit(UnitOfWork):
    """The unit of work of a block, which replaces the session on one database, for one task.

    Other databases are those of the unit of work around it. Where there is none they are this one's, and are committed
    at its end. Tasks that inherit it are refused: a session serves the task that opened it.
    """

    def __init__(self, db: DBConnect, *, commits: bool) -> None:
        self._owner: ref[asyncio.Task[Any]] | None = None
        self.take_over()
        super().__init__(inherited_before_commit())
        self.db = db
        self.commits = commits
        """Whether somebody commits what is open on `db`: the block itself, or one inside of it that is running."""
        self.outer = _usable(current_unit.get(None))
        # The unit around it waits for the block, and with it for its statements.
        self.share_statement_timeout(self.outer)

    def is_transaction(self) -> bool:
        """Return whether what is open on `db` is somebody's to commit or undo: a block's, or by ``session.begin()``."""
        session = self._sessions.get(self.db)
        if self.commits or session is None:
            return self.commits
        transaction = session.sync_session.get_transaction()
        return session.in_nested_transaction() or (
            transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        )

    # `db_session` looks here, and calls `open_session` for what it does not find.
    @property
    def sessions(self) -> dict[DBConnect, AsyncSession]:
        """The sessions by database, for the task that may use them."""
        return self._sessions if self.over or self.is_owned() else {}

    @sessions.setter
    def sessions(self, sessions: dict[DBConnect, AsyncSession]) -> None:
        self._sessions = sessions

    @property
    def closed(self) -> bool:
        """Whether the running code gets no session from it: it has ended, or is another task's."""
        return not self.serves() and (self.outer is None or self.outer.closed)

    def of(self, db: DBConnect) -> UnitOfWork:
        """Return the unit that answers for `db`."""
        return self if db is self.db or self.outer is None else self.outer.of(db)

    @property
    def over(self) -> bool:
        """Whether the block is over."""
        return self._sessions is _CLOSED

    def serves(self) -> bool:
        """Return whether the running code may use the session on `db`."""
        return not self.over and self.is_owned()

    def is_owned(self) -> bool:
        """Return whether this is the task that opened the block.

        A test's fixture opens it in one task and closes it in another, and the first has ended long before: then the
        session is whose who asks first.
        """
        owner = None if self._owner is None else self._owner()
        if owner is None or owner.done():
            return self.take_over()
        return owner is _running_task()

    def take_over(self) -> bool:
        """Make the session that of the running task; return whether there is one."""
        task = _running_task()
        if task is not None:
            self._owner = ref(task)
        return task is not None

    def check_usable(self) -> None:
        """Raise the error that says why the running code cannot use this unit, if it cannot."""
        super().check_usable()
        if not self.is_owned():
            raise ContextNotInitiatedError(
                "The session found here belongs to the task that opened it with a TransactionContext, and a session "
                "serves one task. Open one in this task: by `session()` or `transaction()` of the context, or with "
                "`run_in_new_ctx(fn, ...)`."
            )


@asynccontextmanager
async def open_task_unit(db: DBConnect, create: CreateSession | None, *, commits: bool) -> AsyncIterator[AsyncSession]:
    """Open a session on `db` for a block and the running task, in a unit of work of its own.

    Args:
        db: where.
        create: makes the session, if not `db` itself.
        commits: whether it is committed at the end of the block; else it is just closed.

    Raises:
        BaseException: what the block raised, or the error of a commit.
    """
    unit = TaskUnit(db, commits=commits)
    unit.enter()
    try:
        try:
            session = await unit.open_session(db, create)
            if commits:
                await session.begin()
            yield session
            # Another task than the one that entered the block may leave it, as with a test's fixture.
            unit.take_over()
            if not commits:
                # Not by a roll-back, which would expire the objects that were read.
                await unit.close_session(db, refuse_after_unit)
        except BaseException as exc:
            unit.take_over()
            await unit.finish(commit=False, error=exc)
            raise
        if not unit.finish_idle():
            await unit.finish(commit=True)
    finally:
        unit.leave()


class Visit:
    """A block that shares the session of a unit of work, or sets a savepoint; a task can be in several, nested.

    So can the tasks that it starts inside of one, and waits for. Two other tasks cannot be in it at the same time.

    Args:
        unit: whose session.
        db: on which database.
        nested: whether it may be inside of another one of this task.
        by_context: whether it is a `TransactionContext`'s: those that may not be nested look for these alone.

    Raises:
        SessionAlreadyActiveError: another task is in such a block; or this one is, and it is not to be `nested`.
    """

    # Kept beside the units: only these blocks ask for it.
    _visits: ClassVar[WeakKeyDictionary[UnitOfWork, list[Visit]]] = WeakKeyDictionary()
    _around: ClassVar[ContextVar[tuple[Visit, ...]]] = ContextVar("ctxdb_visits", default=())
    """The blocks that the running code is in: inherited by the tasks that it starts."""

    def __init__(self, unit: UnitOfWork, db: DBConnect, *, nested: bool, by_context: bool = False) -> None:
        self._db = db
        self.by_context = by_context
        self._task = _running_task()
        self._outer = self._around.get()
        self._here = self._visits.setdefault(unit, [])
        around = [visit for visit in self._here if visit.by_context and visit.is_by(self)]
        if not nested and (isinstance(unit, TaskUnit) or around):
            raise SessionAlreadyActiveError
        if any(visit.is_beside(self) for visit in self._here):
            raise SessionAlreadyActiveError(
                "Another task is inside of a block that shares the session of this unit of work, and a session serves "
                "one task at a time. Give the task a unit of work of its own by `run_in_new_ctx(fn, ...)`, another "
                "session by `transactional(db, 'requires_new')` or a context's `new_transaction()` or `new_session()`, "
                "or let one block end before the other begins."
            )

    def __enter__(self) -> None:
        self._here.append(self)
        self._around.set((*self._outer, self))

    def __exit__(self, *exc_info: object) -> None:
        self._here.remove(self)
        # Not by a token: the block may be left in another context.
        self._around.set(self._outer)
        # Contexts that have inherited the block may last.
        self._task, self._outer = None, ()

    def is_by(self, other: Visit) -> bool:
        """Return whether this is a block of the same task on the same database."""
        return self._db is other._db and self._task is other._task

    def is_beside(self, other: Visit) -> bool:
        """Return whether this is the block of another task, which goes on while `other` does."""
        if self._db is not other._db or self._task is other._task or self in other._outer:
            return False
        # A framework enters what a handler depends on in tasks that end before the handler begins.
        return self._task is not None and not self._task.done()


class CommitDebt:
    """While a transaction block runs, those inside of it leave the commit to it."""

    def __init__(self, unit: UnitOfWork, session: AsyncSession) -> None:
        self._unit = unit if isinstance(unit, TaskUnit) and not unit.commits else None
        transaction = session.sync_session.get_transaction()
        # Whoever calls `session.begin()` says by it that he will commit; statements begin a transaction by themselves.
        self._owes_commit = (
            self._unit is not None
            and transaction is not None
            and transaction.origin is SessionTransactionOrigin.AUTOBEGIN
        )

    def __enter__(self) -> bool:
        """Return whether the transaction that is open will be committed by nobody else."""
        if self._unit is not None:
            self._unit.commits = True
        return self._owes_commit

    def __exit__(self, *exc_info: object) -> None:
        if self._unit is not None:
            self._unit.commits = False


def _usable(unit: UnitOfWork | None) -> UnitOfWork | None:
    """Return the innermost unit, from `unit` outwards, that the running code can use."""
    while isinstance(unit, TaskUnit) and not unit.serves():
        unit = unit.outer
    if unit is None or unit.closed or unit.thread != get_ident():
        return None
    return unit
