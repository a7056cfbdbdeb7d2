"""`UnitOfWork`: the sessions of one request, job or message, and which unit of work the running code is in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._sqlalchemy.connection_context import hide_from_connections
from ctxdb_core._sqlalchemy.guarded_session import OnBegin
from ctxdb_core._units.callbacks import Callback, Outcome
from ctxdb_core._units.commit import BeforeCommit, is_in_before_commit
from ctxdb_core._units.ids import new_unit_id
from ctxdb_core._units.registration import NO_WATCHERS, Registration
from ctxdb_core._units.scheduler_jobs import sessions_beside_schedulers
from ctxdb_core._units.unit_end import UnitEnd
from ctxdb_core._units.unit_hooks import UnitHooks
from ctxdb_core._units.unit_sessions import NO_SESSIONS_ANY_MORE
from ctxdb_core._units.watcher import UnitWatcher
from ctxdb_core.errors import TransactionRequiredError

__all__ = ["UnitOfWork", "current_unit", "inherited_before_commit", "opened", "running_unit"]

current_unit: ContextVar[UnitOfWork] = ContextVar("ctxdb_unit_of_work")
"""The unit of work of the running code. Tasks inherit it, so code that reads it must expect a unit that has ended."""


class UnitOfWork(UnitEnd):
    """The sessions that belong together, at most one for each `DBConnect`.

    Its transactions can end more than once: for a response when it starts, and again for what was done while it was
    sent. After `finish` it hands out no session any more.
    """

    # This tells what kind of unit a class is, and is never set on an object.
    is_plain: ClassVar[bool] = True
    """Whether all code that inherits the unit uses this very unit. Where it depends on the task or the generator which
    unit that is, the class says ``False``.
    """

    # What a base class declares is declared again where it is set: type checkers would infer another type from that.
    hooks: UnitHooks | None
    token: Token[Any] | None
    registration: Registration | None

    @classmethod
    def ended(cls) -> UnitOfWork:
        """Return a unit that has ended already: it hides one that was inherited."""
        unit = cls()
        unit.sessions = NO_SESSIONS_ANY_MORE
        return unit

    @property
    def id(self) -> str:
        """What tells this unit from all others, also from those of other processes; made when it is first asked for."""
        registration = self._registered()
        if registration.id is None:
            registration.id = self._new_id()
        return registration.id

    def _new_id(self) -> str:
        return new_unit_id()

    @property
    def request(self) -> str | None:
        """Method and path of the request that the unit belongs to, without its query; ``None`` outside of requests.

        A unit that was opened inside of another one belongs to the request of that one.
        """
        around = self.enclosing()
        return None if around is None else around.request

    def identify(self) -> tuple[str, str | None]:
        """Return `id` and `request`, which extensions ask for together."""
        return self.id, self.request

    def enclosing(self) -> UnitOfWork | None:
        """Return the unit that was current when this one was entered, unless that one has ended."""
        around = None if self.token is None else self.token.old_value
        return around if isinstance(around, UnitOfWork) and not around.closed else None

    def answering(self, db: DBConnect | None = None) -> UnitOfWork | None:
        """Return the unit that the running code finds where this one is current: this one, unless it stands for others.

        Args:
            db: the database that the code asks about.
        """
        return self

    def of(self, db: DBConnect) -> UnitOfWork:
        """Return the unit that answers for `db`: this one, unless it is about another database alone."""
        return self

    def _place_of_sessions(self) -> dict[DBConnect, AsyncSession]:
        watched = sessions_beside_schedulers(current_unit)
        return {} if watched is None else watched

    def enter(self) -> None:
        """Make this the current unit of work of the running context."""
        self.token = current_unit.set(self)

    def leave(self) -> None:
        """Make the unit current again that was so before `enter`."""
        if self.token is None:
            return
        try:  # noqa: SIM105 - `suppress` takes a third of what an idle request costs
            current_unit.reset(self.token)
        except (ValueError, RuntimeError):
            # The unit was entered in another context (a task of its own, an async generator fixture), which has gone
            # with its variables. Or the unit was left already: an adapter may finalize twice.
            pass

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

    # --- what the code asks of its transactions, and the blocks that share them ---------------------------------------

    def on_outcome(self, db: DBConnect, outcome: Outcome, callback: Callback) -> None:
        """Run `callback` once the work that is open on `db`, or comes next, has the `outcome`; forget it otherwise.

        The roll-back of a savepoint counts for what was registered since that savepoint.
        """
        self.check_usable()
        self._hooks().add_callback(db, self.sessions.get(db), outcome, callback, self._run_in_unit)

    def add_begin_hook(self, db: DBConnect, hook: OnBegin) -> None:
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
        async with opened(UnitOfWork(self.settings.before_commit)):
            await fn()


class opened:  # noqa: N801 - used like a function, in `async with`
    """Makes `unit` the current one for a block, and ends it with that: committed, or rolled back by an exception.

    Args:
        unit: the unit of work.
        current: what is made current in its place; the `seat` of the unit, where the block may be around the ``yield``
            of an async generator.
    """

    __slots__ = ("_current", "_unit")

    def __init__(self, unit: UnitOfWork, current: UnitOfWork | None = None) -> None:
        self._unit = unit
        self._current = current or unit

    async def __aenter__(self) -> None:
        self._current.enter()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._unit.finish(commit=exc is None, error=exc)
        finally:
            self._current.leave()


hide_from_connections(current_unit, UnitOfWork.ended())


def running_unit() -> UnitOfWork | None:
    """Return the unit of work that the running code is in; ``None`` outside of any, and where it has ended.

    A task inherits the unit of the code that has started it.
    """
    unit = current_unit.get(None)
    if unit is not None and unit.is_plain:
        # Most are. Extensions ask for each connection that is taken, so this is worth a line.
        return None if unit.sessions is NO_SESSIONS_ANY_MORE else unit
    while unit is not None and (answering := unit.answering()) is not unit:
        unit = answering
    return None if unit is None or unit.closed else unit


def inherited_before_commit() -> BeforeCommit | None:
    """Return what a unit of work that is opened here asks before its commits, as the one around it does.

    A unit that `before_commit` itself opens has none: otherwise, the hook would call itself for ever.
    """
    unit = current_unit.get(None)
    return None if unit is None or is_in_before_commit() else unit.settings.before_commit
