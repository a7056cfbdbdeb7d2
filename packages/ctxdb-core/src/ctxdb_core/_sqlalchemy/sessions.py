"""The classes that are put into the bases of the user's own session classes (see `session_factory`).

- `GuardedSession` comes before the user's synchronous class: it looks at each statement, whatever the user's
  ``get_bind`` does (SQLAlchemy, "Custom Vertical Partitioning"), and tells of the session's end.
- `DoorSession` comes after the user's asynchronous class, in the place of ``AsyncSession``: that is where every call
  passes to the synchronous session, through its `Door` and in a greenlet that is used again.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import types
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias, cast
from weakref import ref

from greenlet import getcurrent
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, async_session
from sqlalchemy.orm import InstanceState, SessionTransaction
from sqlalchemy.orm.attributes import instance_state as object_state
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._sqlalchemy.call_limit import CallLimit
from ctxdb_core._sqlalchemy.cursors import set_door_of_connection
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.failures import FailedStatement, failure_of
from ctxdb_core._sqlalchemy.flushes import ConcurrentChanges
from ctxdb_core._sqlalchemy.greenlets import CallGreenlet, call_in_greenlet
from ctxdb_core._sqlalchemy.guards import teach
from ctxdb_core._sqlalchemy.lending import lend_driver_connection
from ctxdb_core._sqlalchemy.loaded import LoadedValues, note_originals
from ctxdb_core._sqlalchemy.private import (
    begin_without_statement,
    connections_of,
    has_to_flush,
    innermost_block,
    is_flushing,
)
from ctxdb_core._sqlalchemy.rereading import Rereading, keeping_changes
from ctxdb_core._sqlalchemy.second_connections import explain_time_out
from ctxdb_core._sqlalchemy.statements import only_reads
from ctxdb_core._sqlalchemy.task_blocks import BlockedSession, enter_block, refuse_in_block_of_other_task
from ctxdb_core._sqlalchemy.written import holds_work
from ctxdb_core.errors import CommitOutcomeUnknownError, DeadlineExceededError, StatementInterruptedError

__all__ = ["DoorSession", "GuardedSession", "call_of_users_class", "door_of", "guard_of", "through_the_door"]


OnBegin: TypeAlias = Callable[[AsyncSession], Awaitable[None]]
"""Awaited with the session at the beginning of a transaction."""

BeforeClose: TypeAlias = Callable[["DoorSession", BaseException | None], bool]
"""Given the session, and the exception that leaves its ``async with`` block, returns whether it is to be closed."""

_CLEANS_UP = frozenset({"close", "invalidate", "reset", "rollback"})


class Interrupted(NamedTuple):
    """A transaction that was lost with its connection."""

    transaction: ref[SessionTransaction]
    statement: FailedStatement
    had_written: bool


_ENDS = frozenset({"close", "commit", "invalidate", "reset", "rollback"})


class GuardedSession(BlockedSession):
    """A synchronous session that may have a door."""

    door: Door | None = None
    """What each statement passes, once a unit of work has taken the session."""
    on_begin: OnBegin | None = None
    """Awaited at the beginning of each transaction, before the first statement of the user's code in it."""
    before_close: BeforeClose | None = None
    """Asked before code of the user's closes the session."""
    deadline: Callable[[], float | None] | None = None
    """Returns when the session's work has to be done, on the event loop's clock; ``None`` where there is no limit."""
    on_end: Callable[[], None] | None = None
    """Called when the session was closed or invalidated."""
    translate_bind: Callable[[Engine | Connection], Engine | Connection] | None = None
    """Given what a statement is to be executed on, returns what it is executed on instead."""
    closes_plainly = True
    """Whether the user's classes leave closing to SQLAlchemy."""
    interrupted: Interrupted | None = None
    """The transaction that was lost with an interrupted statement, until it is rolled back."""
    rereading: Rereading | None = None
    """What the open transaction has of the objects that were loaded before it began, if there are any."""
    _written: ref[SessionTransaction] | None = None
    """The transaction in which something was written last."""
    _set_up: ref[SessionTransaction] | None = None
    """The transaction in which an `on_begin` has written, or set something, last."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        door = self.door
        if door is not None:
            clause = kwargs.get("clause")
            door.look(self, clause)
            # A call without arguments comes from code that looks at the session, not from a statement.
            if (args or kwargs) and not getattr(clause, "is_select", False) and not only_reads(clause):
                if self.task_blocks and not is_flushing(self):
                    # A flush may be that of another task's query; it writes the objects of the task in the block.
                    refuse_in_block_of_other_task(self)
                self.note_write()
            if self.on_begin is not None and self.begins_with_next_call and in_greenlet():
                # The statement has not come through the door: lazy loading of `AsyncAttrs`, for instance.
                await_only(_begin(self, self.on_begin))
        bind = super().get_bind(*args, **kwargs)
        if bind is not self.bind:
            # The user's class, or `binds`, has chosen an engine of its own.
            teach(bind)
        return bind if self.translate_bind is None else self.translate_bind(bind)

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - as SQLAlchemy calls it
        # An object that is only added to a session which has ended would be lost without a statement; and a statement
        # may name its engine itself, so that `get_bind` is not asked.
        if self.door is not None:
            self.door.refuse_if_ended()
            if not self.in_transaction():
                self.interrupted = None
                self.look_back()
                if self.rereading is not None:
                    self.rereading.is_ahead = False
        return super()._autobegin_t(begin)

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - as SQLAlchemy has it
        refuse_in_block_of_other_task(self)
        if nested and self.on_begin is not None and self.begins_with_next_call and in_greenlet():
            # What the hook sets in a savepoint would be undone with it, in the middle of the transaction.
            await_only(_begin(self, self.on_begin))
        if not nested or self.door is None:
            return super().begin(nested)
        # What was added before is flushed before the savepoint; what another task adds meanwhile would be part of it.
        block = enter_block(self)
        try:
            savepoint = super().begin(nested)
        except BaseException:
            block.end()
            raise
        block.follow(savepoint)
        return savepoint

    def rollback(self) -> None:
        if self.door is not None and not self.in_transaction() and has_to_flush(self):
            # What a task adds or changes while another task's COMMIT is under way begins no transaction. Without one,
            # SQLAlchemy rolls nothing back, and the next flush would write it.
            begin_without_statement(self)
        super().rollback()

    def look_back(self) -> None:
        """Note whether there are objects that were loaded before the transaction that is about to begin."""
        if self.rereading is None or not self.rereading.is_ahead:
            self.rereading = Rereading(self) if self.identity_map else None

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        # Asked for now: an object that is expired is read by the next line.
        earlier = None if self.rereading is None else self.rereading.objects(self)
        found = super().get(entity, ident, **options)
        if found is None or earlier is None:
            return found
        state: InstanceState[Any] = object_state(found)
        if state not in earlier or state.modified:
            return found
        # Asked for once, so that what is got again and again in one transaction costs one query.
        with keeping_changes(self):
            found = super().get(entity, ident, **{**options, "populate_existing": True})
        earlier.pop(state, None)
        return found

    def flush(self, objects: Any = None) -> None:
        if self.door is None or not has_to_flush(self):
            super().flush(objects)
            return
        # An object of the identity map has been changed: `session.dirty` would look at each of them.
        if self.identity_map.check_modified():
            note_originals(self)
        worker: Any = getcurrent()
        if type(worker) is not CallGreenlet:
            if in_greenlet():
                # SQLAlchemy's own, in which attributes of `AsyncAttrs` are loaded: it has not come through the door.
                await_only(_pass(self.door, self.flush, (objects,), {}))
            else:
                super().flush(objects)
            return
        changes, outer = ConcurrentChanges(self), worker.waiting
        worker.waiting = changes
        try:
            super().flush(objects)
        except BaseException:
            changes.leave()
            raise
        else:
            changes.mark()
        finally:
            worker.waiting = outer

    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        if self.door is not None:
            # Statements on the connection itself are not seen here, so it counts as a write.
            refuse_in_block_of_other_task(self)
            self.note_write()
        connection = super().connection(*args, **kwargs)
        if self.door is not None:
            set_door_of_connection(connection, self.door)
            if in_greenlet():
                lend_driver_connection(connection)
        return connection

    def has_written(self, *, beside_on_begin: bool = False) -> bool:
        """Return whether the open transaction holds work, as far as its statements tell.

        A ``SELECT`` counts as reading, although it may call a function that writes.

        Args:
            beside_on_begin: whether to leave out what `on_begin` has done, which each transaction begins with.
        """
        return (
            bool(self.new or self.dirty or self.deleted)
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

    def _has_noted_write(self) -> bool:
        return self._written is not None and self._written() is self.get_transaction()

    @property
    def begins_with_next_call(self) -> bool:
        """Whether no statement has been made in the open transaction, or none is open."""
        transaction = self.get_transaction()
        return transaction is None or not connections_of(transaction)

    def close(self) -> None:
        if not self._may_be_closed_here():
            return
        try:
            super().close()
        finally:
            self._tell_end()

    def _may_be_closed_here(self) -> bool:
        """Return whether the running code may close the session, also where it was given it by ``run_sync``."""
        if self.door is None or not (self.in_transaction() or has_to_flush(self)):
            return True
        session = async_session(self)
        return not isinstance(session, DoorSession) or _may_close(session, None)

    def invalidate(self) -> None:
        try:
            super().invalidate()
        finally:
            self._tell_end()

    def _tell_end(self) -> None:
        if self.on_end is not None and not self.in_transaction():
            self.on_end()


# --- the asynchronous session -----------------------------------------------------------------------------------------


def _call(fn: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Stand in for ``greenlet_spawn`` where `fn` is a method of the synchronous session."""
    # A plain function, as all three of its kind: a coroutine more would be resumed for each message from the server.
    session: GuardedSession = fn.__self__
    if session.identity_map and session.door is not None and not session.in_transaction():
        # SQLAlchemy asks for the listeners of a query before it begins the transaction.
        session.look_back()
    if session.on_begin is not None:
        return _call_with_hook(session, fn, args, kwargs)
    return _pass(session.door, fn, args, kwargs)


def call_of_users_class(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Stand in for ``greenlet_spawn`` in a method of the user's class, where `fn` may be anything."""
    if isinstance(getattr(fn, "__self__", None), GuardedSession):
        return _call(fn, *args, **kwargs)
    return greenlet_spawn(fn, *args, **kwargs)


def _call_with_session(fn: Callable[..., Any], session: GuardedSession, *args: Any, **kwargs: Any) -> Any:
    """Stand in for ``greenlet_spawn`` in ``run_sync``, where `fn` is the user's, and is given the session."""
    if session.on_begin is not None:
        return _call_with_hook(session, fn, (session, *args), kwargs)
    return _pass(session.door, fn, (session, *args), kwargs)


def _call_of_transaction(fn: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Stand in for ``greenlet_spawn`` where `fn` is a method of a transaction, or begins one."""
    owner = fn.__self__
    session: Any = owner.session if isinstance(owner, SessionTransaction) else owner
    return _pass(session.door, fn, args, kwargs)


async def _pass(door: Door | None, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if door is None:
        try:
            return await call_in_greenlet(fn, *args, **kwargs)
        except PoolTimeoutError as exc:
            explain_time_out(exc, _session_of(fn))
            raise
    if not door.enter():
        await door.wait()
    try:
        if door.latest is not None:
            return await _call_in_time(door, door.latest(), fn, args, kwargs)
        return await call_in_greenlet(fn, *args, _entered=door, **kwargs)
    except PendingRollbackError as exc:
        return await _go_on_after_interruption(exc, door, fn, args, kwargs)
    except BaseException as exc:
        if not isinstance(exc, Exception):
            _note_interruption(getattr(fn, "__self__", None))
        if isinstance(exc, CommitOutcomeUnknownError) or isinstance(exc.__cause__, CommitOutcomeUnknownError):
            door.commit_is_unknown = True
        explain_time_out(exc, _session_of(fn))
        door.answer_interruption()
        raise
    finally:
        door.leave()


async def _call_in_time(
    door: Door, latest: float | None, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a call that is given up if neither the pool, nor the network, nor the database has answered in time."""
    if door.limit is not None or getattr(fn, "__name__", "") in _CLEANS_UP:
        # A call inside of another one; or what gives a connection back, which has limits of its own.
        return await call_in_greenlet(fn, *args, _entered=door, **kwargs)
    limit = door.limit = CallLimit(latest)
    is_given_up = False
    try:
        try:
            return await call_in_greenlet(fn, *args, _entered=door, **kwargs)
        finally:
            door.limit = None
            is_given_up = limit.end()
    except asyncio.CancelledError as exc:
        if not is_given_up:
            raise
        if isinstance(exc.__cause__, CommitOutcomeUnknownError):
            raise exc.__cause__ from exc
        raise DeadlineExceededError(
            "The time of this call was up, and neither the database nor its limit for statements had ended it: the "
            "pool had no connection to give, or the network or the server does not answer. The call was given up."
        ) from exc


def _session_of(fn: Any) -> Any:
    owner = getattr(fn, "__self__", None)
    return owner.session if isinstance(owner, SessionTransaction) else owner


def _note_interruption(session: object) -> None:
    """Note whether a transaction had written that was lost with its connection, as a statement was interrupted."""
    if not isinstance(session, GuardedSession) or session.interrupted is not None:
        return
    transaction = session.get_transaction()
    for connection in () if transaction is None else connections_of(transaction):
        failure = failure_of(connection)
        if connection.invalidated and failure is not None and failure.was_interrupted:
            session.interrupted = Interrupted(
                ref(cast(SessionTransaction, transaction)), failure, session.has_written()
            )


async def _go_on_after_interruption(
    error: PendingRollbackError, door: Door, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Go on in a new transaction, if the one that was lost with an interrupted statement had only read.

    Raises:
        StatementInterruptedError: it had written.
        PendingRollbackError: no statement was interrupted; the error is about another failure.
    """
    session = getattr(fn, "__self__", None)
    # While the rows of a streamed result are fetched, no call of the session is under way that could note it.
    _note_interruption(session)
    if not isinstance(session, GuardedSession) or session.interrupted is None:
        raise error
    interrupted = session.interrupted
    if interrupted.transaction() is not session.get_transaction():
        raise error
    if interrupted.had_written or innermost_block(session) is not None:
        raise StatementInterruptedError(
            f"The statement {interrupted.statement} was interrupted, by a time limit for instance, and that was "
            "caught: the connection was given up to stop it, and this transaction is lost with what was written in it. "
            "Let the interruption propagate; or call `await rollback_db_session(db)` to go on without that work; or "
            "run what may take too long beside the transaction, `await run_in_new_ctx(fn, ...)`."
        ) from error
    # No statement is sent by this: the connection is gone.
    loaded = LoadedValues(session)
    await call_in_greenlet(session.rollback, _entered=door)
    loaded.restore()
    return await call_in_greenlet(fn, *args, _entered=door, **kwargs)


async def _call_with_hook(
    session: GuardedSession, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a call of a session that has an `on_begin`, which comes before the first statement of a transaction."""
    door, on_begin = session.door, session.on_begin
    assert door is not None and on_begin is not None  # noqa: PT018 - one thing
    name = getattr(fn, "__name__", "")
    # What is only added is flushed by a commit; other ends of a transaction make no statement.
    makes_statements = name not in _ENDS or (name == "commit" and bool(session.new or session.dirty or session.deleted))
    # Options of the connection are those of its transaction, which must not have begun then.
    comes_first = "execution_options" in kwargs and name == "connection"
    async with door.turn():
        if makes_statements and not comes_first:
            await _begin(session, on_begin)
        if not comes_first or not session.begins_with_next_call:
            return await _pass(door, fn, args, kwargs)
        session.on_begin = None
        try:
            result = await _pass(door, fn, args, kwargs)
        finally:
            session.on_begin = on_begin
        await _begin(session, on_begin, has_connection=True)
        return result


async def _begin(session: GuardedSession, on_begin: OnBegin, *, has_connection: bool = False) -> None:
    if not has_connection and not session.begins_with_next_call:
        return
    # The hook's own statements are the first ones of the transaction.
    session.on_begin = None
    door = session.door
    assert door is not None
    try:
        # The hook may have tasks of its own make its statements, as `asyncio.wait_for` does on Python 3.11.
        # What was only added so far must not be flushed by the hook's statements: it would be written before them.
        async with door.turn():
            with session.no_autoflush:
                await on_begin(_async_session_of(session))
        session.note_set_up()
    except BaseException:
        # Without what the hook was to set, a role for instance, no statement may be made in this transaction. In the
        # middle of a flush or a commit, SQLAlchemy rolls it back by itself when it gets the error.
        with suppress(IllegalStateChangeError):
            await call_in_greenlet(session.rollback)
        raise
    finally:
        session.on_begin = on_begin


def _async_session_of(session: GuardedSession) -> AsyncSession:
    found = async_session(session)
    assert found is not None, "the asynchronous session is making this call"
    return found


def through_the_door(method: Any, stand_ins: dict[str, Any]) -> Any:
    """Return a method of SQLAlchemy's with other names in the place of some that its module has.

    So SQLAlchemy's own code runs, in whichever version is installed, and no object of SQLAlchemy is changed.
    """
    copy = types.FunctionType(
        method.__code__, {**method.__globals__, **stand_ins}, method.__name__, method.__defaults__, method.__closure__
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    copy.__qualname__ = method.__qualname__
    copy.__doc__ = method.__doc__
    copy.__annotations__ = method.__annotations__
    return copy


def _methods_through_the_door(cls: type, stand_ins: dict[str, Any]) -> dict[str, Any]:
    return {
        name: through_the_door(method, stand_ins)
        for name, method in vars(cls).items()
        if isinstance(method, types.FunctionType) and stand_ins.keys() & set(method.__code__.co_names)
    }


class DoorTransaction(AsyncSessionTransaction):
    """What ``session.begin()`` and ``session.begin_nested()`` return."""

    __slots__ = ()


class DoorSession(AsyncSession):
    """An asynchronous session whose calls pass the door of its synchronous session."""

    closes_plainly = True
    """Whether the user's class leaves closing to SQLAlchemy."""

    async def __aexit__(  # as `AsyncSession` has it
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        await _note_hidden_write(self)
        if _may_close(self, value):
            await super().__aexit__(type_, value, traceback)


async def _note_hidden_write(session: DoorSession) -> None:
    """Note what a ``SELECT`` has written, by a function or a CTE, before code of the user's closes the session."""
    guard = guard_of(session)
    door = guard.door
    if door is None or guard.before_close is None or door.is_held() or door.has_ended:
        return
    if guard.in_transaction() and not guard.has_written():
        # The statement that has aborted a transaction has raised an error already.
        with suppress(DBAPIError):
            if await holds_work(session, door, guard.has_written):
                guard.note_write()


def _may_close(session: DoorSession, exc: BaseException | None) -> bool:
    """Return whether the running code may close the session; a unit of work that ends its own session may."""
    guard = guard_of(session)
    if guard.door is None or guard.before_close is None or guard.door.is_held():
        return True
    return not guard.door.has_ended and guard.before_close(session, exc)


def _by_owner(start: Any) -> Any:
    @functools.wraps(start)
    async def start_by_owner(self: DoorTransaction, is_ctxmanager: bool = False) -> Any:  # noqa: FBT001, FBT002 - as SQLAlchemy has it
        started = await start(self, is_ctxmanager)
        guard = self.session.sync_session
        if isinstance(guard, GuardedSession) and guard.door is not None and is_ctxmanager and not self.nested:
            # A transaction that is begun without a block is the session's: nobody has said that it ends on an error.
            enter_block(guard).follow(cast(SessionTransaction, self.sync_transaction))
        return started

    return start_by_owner


def _outside_of_blocks(method: Any) -> Any:
    @functools.wraps(method)
    async def call_outside_of_blocks(self: DoorSession, *args: Any) -> None:
        # A flush that is asked for writes what the running task has changed. The one before a query passes by.
        refuse_in_block_of_other_task(self.sync_session)
        await method(self, *args)

    return call_outside_of_blocks


def _in_turn_outside_of_blocks(method: Any) -> Any:
    @functools.wraps(method)
    async def call_in_turn_outside_of_blocks(self: DoorSession) -> None:
        door = getattr(self.sync_session, "door", None)
        if door is None or not door.is_busy:
            refuse_in_block_of_other_task(self.sync_session)
            await method(self)
            return
        # No other task enters a block in between.
        async with door.turn():
            refuse_in_block_of_other_task(self.sync_session)
            await method(self)

    return call_in_turn_outside_of_blocks


def _unless_owned(close: Any) -> Any:
    @functools.wraps(close)
    async def close_unless_owned(self: DoorSession) -> None:
        # In a `finally` that an exception has led to, that one is to surface, as from an `async with` block.
        exc = sys.exc_info()[1]
        await _note_hidden_write(self)
        if _may_close(self, exc):
            await close(self)

    return close_unless_owned


for _cls, _library_cls, _spawn in (
    (DoorTransaction, AsyncSessionTransaction, _call_of_transaction),
    (DoorSession, AsyncSession, _call),
):
    for _name, _method in _methods_through_the_door(
        _library_cls, {"greenlet_spawn": _spawn, "AsyncSessionTransaction": DoorTransaction}
    ).items():
        setattr(_cls, _name, _method)
for _name in ("close", "reset", "invalidate"):
    setattr(DoorSession, _name, _unless_owned(getattr(DoorSession, _name)))
DoorTransaction.start = _by_owner(DoorTransaction.start)  # type: ignore[method-assign]  # of our own class
DoorSession.flush = _outside_of_blocks(DoorSession.flush)  # type: ignore[method-assign]  # of our own class
DoorSession.rollback = _in_turn_outside_of_blocks(  # type: ignore[method-assign]  # of our own class
    DoorSession.rollback
)
DoorSession.run_sync = through_the_door(  # type: ignore[method-assign]  # of our own class
    AsyncSession.run_sync, {"greenlet_spawn": _call_with_session}
)


def guard_of(session: AsyncSession) -> GuardedSession:
    """Return the synchronous session of one that is known to be guarded."""
    return session.sync_session  # type: ignore[return-value]  # a cast would cost time


def door_of(session: AsyncSession) -> Door | None:
    """Return the door of a session; ``None`` where no unit of work has taken it."""
    sync_session = session.sync_session
    return sync_session.door if isinstance(sync_session, GuardedSession) else None
