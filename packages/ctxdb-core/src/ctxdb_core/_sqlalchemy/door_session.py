"""`DoorSession`: the class that is put behind the user's asynchronous session class (see `session_factory`).

Its methods are those of ``AsyncSession``, each of which passes its call to the synchronous session: through the `Door`
of that session, and in a greenlet that is used again.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, async_session
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.util import greenlet_spawn

from ctxdb_core._sqlalchemy.block_end import end_block_in_turn, end_undone_block
from ctxdb_core._sqlalchemy.calls import pass_door
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.guarded_session import GuardedSession, guard_of
from ctxdb_core._sqlalchemy.hooked_transactions import with_transaction
from ctxdb_core._sqlalchemy.private import error_that_has_undone, has_to_flush
from ctxdb_core._sqlalchemy.task_blocks import enter_block, refuse_in_block_of_other_task
from ctxdb_core._sqlalchemy.written import UNANSWERED, holds_work

__all__ = ["DoorSession", "DoorTransaction", "call_of_users_class", "through_the_door"]

_ENDS = frozenset({"close", "commit", "invalidate", "reset", "rollback"})


def _call(fn: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Stand in for ``greenlet_spawn`` where `fn` is a method of the synchronous session."""
    # This and the other stand-ins are plain functions: one more coroutine would be resumed for each message from the
    # server.
    session: GuardedSession = fn.__self__
    if not session.in_transaction() and session.identity_map and session.door is not None:
        # `look_back` may add a listener of queries, and SQLAlchemy looks for these before it begins the transaction.
        session.look_back()
    if session.on_begin is not None:
        return _call_with_hook(session, fn, args, kwargs)
    return pass_door(session.door, fn, args, kwargs)


def call_of_users_class(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Stand in for ``greenlet_spawn`` in a method of the user's class, where `fn` may be anything."""
    if isinstance(getattr(fn, "__self__", None), GuardedSession):
        _drop_requirement(kwargs)
        return _call(fn, *args, **kwargs)
    return greenlet_spawn(fn, *args, **kwargs)


def _call_with_session(fn: Callable[..., Any], session: GuardedSession, *args: Any, **kwargs: Any) -> Any:
    """Stand in for ``greenlet_spawn`` in ``run_sync``, where `fn` is the user's, and is given the session."""
    _drop_requirement(kwargs)
    if session.on_begin is not None:
        return _call_with_hook(session, fn, (session, *args), kwargs)
    return pass_door(session.door, fn, (session, *args), kwargs)


def _call_of_transaction(fn: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Stand in for ``greenlet_spawn`` where `fn` is a method of a transaction, or begins one."""
    owner = fn.__self__
    session: Any = owner.session if isinstance(owner, SessionTransaction) else owner
    if args and args[0] is None and isinstance(owner, SessionTransaction):
        # The end of a block that no error leaves.
        error = error_that_has_undone(owner)
        if error is not None and owner in (session.blocks_with_work or ()):
            return end_undone_block(session, error, fn, args)
    door: Door | None = session.door
    if args and door is not None and door.is_busy:
        return end_block_in_turn(door, fn, args)
    return pass_door(door, fn, args, kwargs)


def _drop_requirement(kwargs: dict[str, Any]) -> None:
    """Drop the parameter of ``greenlet_spawn`` that makes it an error if nothing is awaited.

    Calls of a session need not wait for anything, and SQLAlchemy requires it of none.
    """
    kwargs.pop("_require_await", None)


async def _call_with_hook(
    session: GuardedSession, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a call of a session that has an `on_begin`, which comes before the first statement of a transaction."""
    door, on_begin = session.door, session.on_begin
    assert door is not None and on_begin is not None  # noqa: PT018 - an `on_begin` is only set with a door
    name = getattr(fn, "__name__", "")
    # `session.connection(execution_options=...)` sets options for a whole transaction: it must come before any
    # statement.
    comes_first = "execution_options" in kwargs and name == "connection"
    async with door.turn():
        # A flush and a commit make statements if there are changes, which the commit of another task may have stored
        # while this call has waited; other ends of a transaction make none.
        makes_statements = has_to_flush(session) if name in ("commit", "flush") else name not in _ENDS
        if makes_statements and not comes_first:
            await session.begin_with_hook(on_begin)
        if not comes_first or not session.begins_with_next_call:
            return await pass_door(door, fn, args, kwargs)
        session.on_begin = None
        try:
            owner = async_session(session)
            assert owner is not None, "the asynchronous session is making this call"
            kwargs["execution_options"] = with_transaction(owner, kwargs["execution_options"] or {})
            result = await pass_door(door, fn, args, kwargs)
        finally:
            session.on_begin = on_begin
        await session.begin_with_hook(on_begin, has_connection=True)
        return result


def through_the_door(method: Any, stand_ins: dict[str, Any]) -> Any:
    """Return a copy of a method of SQLAlchemy's in which `stand_ins` come in the place of globals of its module.

    The copy runs SQLAlchemy's own code, in whichever version is installed, and no object of SQLAlchemy is changed.
    """
    copy = types.FunctionType(
        method.__code__, {**method.__globals__, **stand_ins}, method.__name__, method.__defaults__, method.__closure__
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    # Where annotations are evaluated only when they are asked for (Python 3.14), what evaluates them is copied.
    for name in functools.WRAPPER_ASSIGNMENTS:
        setattr(copy, name, getattr(method, name))
    return copy


class _TransactionThroughTheDoor(AsyncSessionTransaction):
    """Has the methods of ``AsyncSessionTransaction``, each of which passes its call through the door."""

    __slots__ = ()


class DoorTransaction(_TransactionThroughTheDoor):
    """What ``session.begin()`` and ``session.begin_nested()`` return."""

    __slots__ = ()

    async def start(self, is_ctxmanager: bool = False) -> Any:  # noqa: FBT001, FBT002 - as SQLAlchemy has it
        started = await super().start(is_ctxmanager)
        guard = self.session.sync_session
        if isinstance(guard, GuardedSession) and guard.door is not None and is_ctxmanager and not self.nested:
            # Only the end of an `async with` block rolls back on an error: without one, the transaction is not this
            # task's.
            enter_block(guard).follow(cast(SessionTransaction, self.sync_transaction))
        return started


class _SessionThroughTheDoor(AsyncSession):
    """Has the methods of ``AsyncSession``, each of which passes its call through the door."""


class DoorSession(_SessionThroughTheDoor):
    """An asynchronous session whose calls pass the door of its synchronous session."""

    closes_plainly = True
    """Whether the user's class leaves closing to SQLAlchemy."""

    async def flush(self, objects: Any = None) -> None:
        # An explicit flush writes what the running task has changed. The autoflush before a query does not come here.
        refuse_in_block_of_other_task(self.sync_session)
        await super().flush(objects)

    async def rollback(self) -> None:
        door = getattr(self.sync_session, "door", None)
        if door is None or not door.is_busy:
            refuse_in_block_of_other_task(self.sync_session)
            await super().rollback()
            return
        # While this task has the turn, no other task enters a block.
        async with door.turn():
            refuse_in_block_of_other_task(self.sync_session)
            await super().rollback()

    async def close(self) -> None:
        await self._close_if_allowed(super().close)

    async def reset(self) -> None:
        await self._close_if_allowed(super().reset)

    async def invalidate(self) -> None:
        await self._close_if_allowed(super().invalidate)

    async def _close_if_allowed(self, close: Callable[[], Awaitable[None]]) -> None:
        # If an exception has led to a `finally` that closes the session, the exception surfaces, as from an `async
        # with` block.
        exc = sys.exc_info()[1]
        await _note_hidden_write(self)
        if guard_of(self).may_be_closed(self, exc):
            await close()

    async def __aexit__(  # as `AsyncSession` has it
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        await _note_hidden_write(self)
        if guard_of(self).may_be_closed(self, value):
            await super().__aexit__(type_, value, traceback)


async def _note_hidden_write(session: DoorSession) -> None:
    """Note what a ``SELECT`` or an `on_begin` has written, before code of the user's closes the session."""
    guard = guard_of(session)
    door = guard.door
    if door is None or guard.before_close is None or door.is_held() or door.has_ended:
        return
    if door.is_suspect:
        await pass_door(door, guard.leave_lost_reading, (), {})
    if guard.in_transaction() and not guard.has_written(beside_on_begin=True):
        # The statement that has aborted a transaction, or was interrupted, has raised an error already.
        with suppress(*UNANSWERED):
            if await holds_work(session, door, guard.has_written):
                guard.note_write()
            else:
                guard.note_set_up_is_no_work()


def _take_through_the_door(cls: type, library_cls: type, spawn: Callable[..., Any]) -> None:
    """Give `cls` the methods of `library_cls` that start a greenlet, or begin a transaction, through the door."""
    stand_ins = {"greenlet_spawn": spawn, "AsyncSessionTransaction": DoorTransaction}
    for name, method in vars(library_cls).items():
        if isinstance(method, types.FunctionType) and stand_ins.keys() & set(method.__code__.co_names):
            setattr(cls, name, through_the_door(method, stand_ins))


_take_through_the_door(_TransactionThroughTheDoor, AsyncSessionTransaction, _call_of_transaction)
_take_through_the_door(_SessionThroughTheDoor, AsyncSession, _call)
_SessionThroughTheDoor.run_sync = through_the_door(  # type: ignore[method-assign]  # of our own class
    AsyncSession.run_sync, {"greenlet_spawn": _call_with_session}
)
