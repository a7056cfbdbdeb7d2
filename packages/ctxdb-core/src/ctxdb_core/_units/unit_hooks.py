"""`UnitHooks`: what code and its blocks have asked of their unit of work, about the begin and end of transactions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.arguments import awaitable_of
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._sqlalchemy.guarded_session import OnBegin, guard_of
from ctxdb_core._transactions.rollback_only import check_commits
from ctxdb_core._units.callbacks import Callback, Callbacks, Outcome, RunInUnit
from ctxdb_core._units.commit import Sessions
from ctxdb_core.errors import TransactionAlreadyActiveError, UnexpectedRollbackError

__all__ = ["UnitHooks"]


class UnitHooks:
    """What `on_commit`, `on_rollback`, `on_begin`, `set_rollback_only` and blocks have asked of one unit of work.

    A unit makes it at the first such call or block, so that others pay for nothing of it.
    """

    __slots__ = ("_at_begin", "blocks", "callbacks", "is_block", "rollback_only")

    def __init__(self) -> None:
        self.blocks: tuple[object, ...] = ()
        """The open blocks that share the unit's transactions: each commits or undoes what was done in it."""
        self.is_block: bool = False
        """Whether the unit is one block of the user's, which is committed or undone as a whole, as that of
        `transactional` is."""
        self.callbacks: Callbacks | None = None
        """What is to be called when transactions have ended; ``None`` as long as nothing was asked for."""
        self.rollback_only: frozenset[DBConnect | None] = frozenset()
        """The databases whose open transactions are rolled back, not committed; ``None`` stands for all databases."""
        self._at_begin: dict[DBConnect, list[OnBegin]] = {}
        """What is to be awaited at the beginning of each transaction."""

    def prepare(self, db: DBConnect, session: AsyncSession) -> None:
        """Teach a new session on `db`."""
        guard = guard_of(session)
        if self.rollback_only:
            check_commits(guard, partial(self.check_may_commit, db))
        if db in self._at_begin:
            guard.on_begin = partial(_run_begin_hooks, self._at_begin[db])

    def add_callback(
        self, db: DBConnect, session: AsyncSession | None, outcome: Outcome, callback: Callback, run_in_unit: RunInUnit
    ) -> None:
        """Run `callback` once the work that is open on `db`, or comes next, has the `outcome`."""
        if self.callbacks is None:
            self.callbacks = Callbacks(run_in_unit)
        self.callbacks.add(db, session, outcome, callback)

    def add_begin_hook(self, db: DBConnect, session: AsyncSession | None, hook: OnBegin) -> None:
        """Await `hook` with the session on `db` at the beginning of each further transaction.

        Raises:
            TransactionAlreadyActiveError: a transaction is open in which a statement has been made, or a savepoint set.
        """
        guard = None if session is None else guard_of(session)
        if guard is not None and guard.in_nested_transaction():
            raise TransactionAlreadyActiveError(
                f"`on_begin` was called inside of a savepoint on {db!r}: what it sets for the transaction would be "
                "undone with the savepoint, and the transaction would go on without it. Call `on_begin` before "
                "`session.begin_nested()`, `atomic_db_session(db, 'savepoint')` and the like."
            )
        if guard is not None and not guard.begins_with_next_call:
            raise TransactionAlreadyActiveError(
                f"A statement has been made on {db!r} in the open transaction, without what `on_begin` is to set for "
                "it. Call `on_begin` before the first statement, in a dependency or middleware for instance, or end "
                "the transaction first (`await commit_db_session(db)`)."
            )
        hooks = self._at_begin.setdefault(db, [])
        hooks.append(hook)
        # Where there are others already, the session has them, or is running them at this moment.
        if guard is not None:
            guard.await_hooks_again()
            if len(hooks) == 1:
                guard.on_begin = partial(_run_begin_hooks, hooks)

    def mark_rollback_only(self, db: DBConnect | None, sessions: Sessions) -> None:
        """Have what is open on `db`, or everywhere, rolled back where it would be committed.

        No commit of `sessions`, which are all of the unit's, succeeds meanwhile, whichever code asks for it.
        """
        self.rollback_only |= {db}
        for each, session in sessions.items():
            check_commits(session.sync_session, partial(self.check_may_commit, each))

    def check_may_commit(self, db: DBConnect) -> None:
        """Raise an error if what is open on `db` is to be rolled back.

        Raises:
            UnexpectedRollbackError: it is, as `set_rollback_only` was called.
        """
        if self._is_rollback_only(db):
            raise UnexpectedRollbackError(
                f"`set_rollback_only` was called, so what is open on {db!r} is going to be rolled back: nothing was "
                "committed. Do not commit after it, or commit in a unit of work of its own (`run_in_new_ctx`)."
            )

    def marked(self, dbs: Collection[DBConnect] | None) -> list[DBConnect]:
        """Return the databases out of `dbs`, or of all that `set_rollback_only` has named, that are rolled back."""
        candidates: Iterable[DBConnect | None] = self.rollback_only if dbs is None else dbs
        return [db for db in candidates if db and self._is_rollback_only(db)]

    def forget_marks(self, dbs: Collection[DBConnect] | None) -> None:
        """Commit again what comes next on `dbs`, or everywhere: what was open there has been rolled back."""
        self.rollback_only = frozenset() if dbs is None else self.rollback_only - set(dbs)

    def _is_rollback_only(self, db: DBConnect) -> bool:
        return db in self.rollback_only or None in self.rollback_only


async def _run_begin_hooks(hooks: Collection[OnBegin], session: AsyncSession) -> None:
    for hook in hooks:
        await awaitable_of(hook(session), hook, "the callback of `on_begin`")
