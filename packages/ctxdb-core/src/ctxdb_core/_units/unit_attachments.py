"""`UnitAttachments`: what is attached to a unit of work: watchers, callbacks, hooks, marks, and open blocks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._units.callbacks import Callback, Callbacks, Outcome
from ctxdb_core._units.registration import NO_WATCHERS
from ctxdb_core._units.unit_hooks import BeginHook, UnitHooks
from ctxdb_core._units.unit_sessions import UnitSessions
from ctxdb_core._units.watcher import UnitWatcher
from ctxdb_core.errors import TransactionRequiredError

__all__ = ["UnitAttachments"]


class UnitAttachments(UnitSessions):
    """The part of a unit of work that takes what is attached to the unit, and to the transactions that are open on it.

    `UnitEnd` ends the transactions, and acts on what is attached to them.
    """

    # What a base class declares is declared again where it is set: type checkers would infer another type from that.
    sessions: dict[DBConnect, AsyncSession]
    hooks: UnitHooks | None

    @property
    def watchers(self) -> Mapping[object, UnitWatcher]:
        """What is told of the response and of the end of the unit, by the objects that have set it up: see `watch`."""
        return NO_WATCHERS if self.registration is None else self.registration.watchers

    def watch(self, watcher: UnitWatcher, owner: object = None) -> None:
        """Tell `watcher` of the start of the response and of the end of the unit, which are still to come.

        Args:
            watcher: what is told.
            owner: the object that watches many units. It finds its watcher of this unit in `watchers`.
        """
        registration = self.registration
        if registration is None:
            registration = self._registered()
        key = object() if owner is None else owner
        # Most units have one watcher, if any: their mapping is made at once.
        registration.watchers = {**registration.watchers, key: watcher} if registration.watchers else {key: watcher}

    # --- what the code asks of its transactions -----------------------------------------------------------------------

    @property
    def callbacks(self) -> Callbacks | None:
        """The callbacks of `on_commit` and `on_rollback`; ``None`` as long as there were none."""
        return None if self.hooks is None else self.hooks.callbacks

    def on_outcome(self, db: DBConnect, outcome: Outcome, callback: Callback) -> None:
        """Run `callback` once the work that is open on `db`, or comes next, has the `outcome`; forget it otherwise.

        The roll-back of a savepoint counts for what was registered since that savepoint.
        """
        self.check_usable()
        self._hooks().add_callback(db, self.sessions.get(db), outcome, callback, self._run_in_unit)

    def add_begin_hook(self, db: DBConnect, hook: BeginHook) -> None:
        """Await `hook` with the session on `db` at the beginning of each further transaction.

        Raises:
            TransactionAlreadyActiveError: a transaction is open in which a statement has been made, or a savepoint set.
            TransactionRequiredError: there are no transactions here.
        """
        self.check_usable()
        if self.autocommit:
            raise TransactionRequiredError(
                "This block runs without a transaction, so nothing could be set for one: the next statement would be "
                "executed without it. Use `transactional(db)`, which begins one."
            )
        self._hooks().add_begin_hook(db, self.sessions.get(db), hook)

    def set_rollback_only(self, db: DBConnect | None) -> None:
        """Roll back what is open on `db`, or everywhere, where it would be committed.

        Raises:
            TransactionRequiredError: there are no transactions here.
        """
        self.check_usable()
        if self.autocommit:
            raise TransactionRequiredError(
                "This block runs without a transaction, so there is nothing that could be rolled back at its end. Use "
                "`transactional(db)`, which begins one."
            )
        self._hooks().mark_rollback_only(db, self.sessions)

    def check_may_commit(self, db: DBConnect) -> None:
        """Raise an error if what is open on `db` is to be rolled back.

        Raises:
            UnexpectedRollbackError: it is, as `set_rollback_only` was called.
        """
        if self.hooks is not None:
            self.hooks.check_may_commit(db)

    # --- the blocks that share its transactions -----------------------------------------------------------------------

    @property
    def is_block(self) -> bool:
        """Whether the unit is one block of the user's, which is committed or undone as a whole."""
        return self.hooks is not None and self.hooks.is_block

    def note_is_block(self) -> None:
        """Note that the unit is one block of the user's, which is committed or undone as a whole."""
        self._hooks().is_block = True

    @property
    def blocks(self) -> tuple[object, ...]:
        """The open blocks that share the unit's transactions (see `UnitHooks`)."""
        return () if self.hooks is None else self.hooks.blocks

    def join(self, block: object) -> None:
        """Note that `block` is open, and shares the unit's transactions."""
        hooks = self._hooks()
        hooks.blocks = (*hooks.blocks, block)

    def part_with(self, block: object) -> None:
        """Note that `block` is over."""
        hooks = self._hooks()
        hooks.blocks = tuple(each for each in hooks.blocks if each is not block)

    def _hooks(self) -> UnitHooks:
        if self.hooks is None:
            self.hooks = UnitHooks()
        return self.hooks

    async def _run_in_unit(self, fn: Callable[[], Awaitable[None]]) -> None:
        """Await `fn` in a unit of work of its own, with the same `before_commit`: what a callback runs in."""
        raise NotImplementedError
