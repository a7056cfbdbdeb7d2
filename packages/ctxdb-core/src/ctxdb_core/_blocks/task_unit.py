"""The unit of work of a `TransactionContext`'s block: one database's session, for the task that opened it alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import SessionTransactionOrigin

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._sqlalchemy.task_blocks import running_task
from ctxdb_core._units.generator_blocks import seat
from ctxdb_core._units.session_end import refuse_after_unit
from ctxdb_core._units.unit import UnitOfWork, inherited_before_commit
from ctxdb_core._units.unit_sessions import NO_SESSIONS_ANY_MORE, CreateSession
from ctxdb_core.errors import ContextNotInitiatedError

__all__ = ["OuterCommit", "TaskUnit", "TaskUnitBlock", "open_task_unit"]

TaskUnitBlock: TypeAlias = AbstractAsyncContextManager[AsyncSession]


class TaskUnit(UnitOfWork):
    """The unit of work of a block, which replaces the session on one database, for one task.

    Sessions on other databases are those of the unit of work around the block. Without one, they are this unit's, and
    are committed at its end. Tasks that inherit this unit are refused: a session serves the task that opened it.

    Args:
        db: the database.
        commits: whether the block commits what is open on it.
        outer: the unit of work around the block, which waits for the block; ``None`` if there is none.
    """

    is_plain = False

    def __init__(self, db: DBConnect, *, commits: bool, outer: UnitOfWork | None) -> None:
        self._owner: ref[asyncio.Task[Any]] | None = None
        """The task that may use the session on `db`."""
        self.take_over()
        super().__init__(inherited_before_commit())
        self.db = db
        self.commits = commits
        """Whether a block is going to commit the open transaction on `db`: this one, or a running one inside of it."""
        self.outer = outer
        # The unit around the block waits for the statements of the block, so its limit holds for them, too.
        self.share_statement_timeout(outer)

    def is_transaction(self) -> bool:
        """Return whether the open transaction on `db` has an owner: a block, or the caller of ``session.begin()``."""
        session = self._sessions.get(self.db)
        if self.commits or session is None:
            return self.commits
        transaction = session.sync_session.get_transaction()
        return session.in_nested_transaction() or (
            transaction is not None and transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        )

    # `db_session` reads `sessions` first, and calls `open_session` only if the database is not in it. So ownership has
    # to be checked here: a task that is not the owner gets an empty dict, and then the error of `check_usable`, which
    # `open_session` calls.
    @property
    def sessions(self) -> dict[DBConnect, AsyncSession]:
        """The sessions by database, for the task that may use them."""
        return self._sessions if self.over or self.is_owned() else {}

    @sessions.setter
    def sessions(self, sessions: dict[DBConnect, AsyncSession]) -> None:
        self._sessions = sessions
        """The sessions by database, whichever task runs."""

    @property
    def closed(self) -> bool:
        """Whether the running code gets no session here: the unit has ended, or is another task's."""
        return not self.serves() and (self.outer is None or self.outer.closed)

    def of(self, db: DBConnect) -> UnitOfWork:
        return self if db is self.db or self.outer is None else self.outer.of(db)

    @property
    def over(self) -> bool:
        """Whether the block is over."""
        return self._sessions is NO_SESSIONS_ANY_MORE

    def serves(self) -> bool:
        """Return whether the running code may use the session on `db`."""
        return not self.over and self.is_owned()

    def is_owned(self) -> bool:
        """Return whether this is the task that opened the block.

        A test's fixture opens it in one task and closes it in another, and the first has ended long before. A block
        whose task has ended is therefore taken over by the first task that asks for its session.
        """
        owner = None if self._owner is None else self._owner()
        if owner is None or owner.done():
            return self.take_over()
        return owner is running_task()

    def take_over(self) -> bool:
        """Give the session to the running task; return whether there is a running task."""
        task = running_task()
        if task is not None:
            self._owner = ref(task)
        return task is not None

    def check_usable(self) -> None:
        super().check_usable()
        if not self.is_owned():
            raise ContextNotInitiatedError(
                "The session found here belongs to the task that opened it with a TransactionContext, and a session "
                "serves one task. Open one in this task: by `session()` or `transaction()` of the context, or with "
                "`run_in_new_ctx(fn, ...)`."
            )


@asynccontextmanager
async def open_task_unit(
    db: DBConnect, create: CreateSession | None, *, commits: bool, outer: UnitOfWork | None
) -> AsyncIterator[AsyncSession]:
    """Open a session on `db` for a block and the running task, in a unit of work of its own.

    Args:
        db: where.
        create: makes the session, if not `db` itself.
        commits: whether the session is committed at the end of the block, or just closed.
        outer: the unit of work that waits for the block, if there is one.

    Raises:
        BaseException: what the block raised, or the error of a commit.
    """
    unit = TaskUnit(db, commits=commits, outer=outer)
    current = seat(unit)
    current.enter()
    try:
        try:
            session = await unit.open_session(db, create)
            if commits:
                await session.begin()
            yield session
            # Another task may leave the block than has entered it: a test's fixture does so.
            unit.take_over()
            if not commits:
                # The session is closed without a roll-back, which would expire the objects that were read.
                await unit.close_session(db, refuse_after_unit)
        except BaseException as exc:
            unit.take_over()
            await unit.finish(commit=False, error=exc)
            raise
        if not unit.finish_idle():
            await unit.finish(commit=True)
    finally:
        current.leave()


class OuterCommit:
    """Marks that an enclosing block will commit, so inner blocks must not.

    Only a mere session of a `TransactionContext` needs it: any other unit of work commits by itself. ``with`` returns
    whether a statement has begun the open transaction: then this block has to commit it.
    """

    def __init__(self, unit: UnitOfWork, session: AsyncSession) -> None:
        self._unit = unit if isinstance(unit, TaskUnit) and not unit.commits else None
        transaction = session.sync_session.get_transaction()
        # By calling `session.begin()`, the user takes on the commit; statements begin a transaction by themselves.
        self._owes_commit = (
            self._unit is not None
            and transaction is not None
            and transaction.origin is SessionTransactionOrigin.AUTOBEGIN
        )

    def __enter__(self) -> bool:
        """Return whether no other block is going to commit the open transaction."""
        if self._unit is not None:
            self._unit.commits = True
        return self._owes_commit

    def __exit__(self, *exc_info: object) -> None:
        if self._unit is not None:
            self._unit.commits = False
