"""`GuardedSession`: the class that is put before the user's synchronous session class (see `session_factory`).

It looks at each statement, whatever the user's ``get_bind`` does (SQLAlchemy, "Custom Vertical Partitioning"), and
tells of the session's end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias
from weakref import ref

from greenlet import getcurrent
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.ext.asyncio import AsyncSession, async_session
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, PassiveFlag, Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state as object_state
from sqlalchemy.orm.exc import ObjectDeletedError
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._sqlalchemy.calls import pass_door
from ctxdb_core._sqlalchemy.cursors import set_door_of_connection
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.flushes import ConcurrentChanges
from ctxdb_core._sqlalchemy.greenlets import CallGreenlet, call_in_greenlet
from ctxdb_core._sqlalchemy.guards import teach
from ctxdb_core._sqlalchemy.hooked_transactions import begin_transaction
from ctxdb_core._sqlalchemy.kept import (
    SessionWithShownValues,
    kept_columns,
    load_kept,
    refuse_stale_changes,
    show_kept,
)
from ctxdb_core._sqlalchemy.lending import lend_driver_connection
from ctxdb_core._sqlalchemy.loaded import LoadedValues, note_originals, note_originals_of
from ctxdb_core._sqlalchemy.private import (
    InPlaceDispatch,
    begin_without_statement,
    has_to_flush,
    innermost_block,
    is_at_rest,
    is_flushing,
)
from ctxdb_core._sqlalchemy.rereading import Rereading, keeping_changes
from ctxdb_core._sqlalchemy.task_blocks import enter_block, refuse_in_block_of_other_task
from ctxdb_core._sqlalchemy.traced_session import TracedSession
from ctxdb_core._sqlalchemy.written import only_reads

__all__ = ["GuardedSession", "OnBegin", "door_of", "guard_of"]

OnBegin: TypeAlias = Callable[[AsyncSession], Awaitable[object]]
"""Awaited with the session at the beginning of each of its transactions."""

BeforeClose: TypeAlias = Callable[[AsyncSession, BaseException | None], bool]
"""Given the session, and the exception that leaves its ``async with`` block, returns whether it is to be closed."""


_NO_OBJECT = (type(None), LoaderCallableStatus)


class GuardedSession(TracedSession, SessionWithShownValues):
    """A synchronous session that may have a door."""

    dispatch = InPlaceDispatch(Session)
    on_begin: OnBegin | None = None
    """Awaited at the beginning of each transaction, before the first statement of the user's code in it."""
    _begun_with_hook: ref[SessionTransaction] | None = None
    """The transaction that `on_begin` was awaited for last. It may have made no statement there."""
    _lost: LoadedValues | None = None
    """What the objects had loaded before the roll-back that is under way."""
    _keeps_values = False
    """Whether values of before a roll-back may be kept for the objects."""
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
    notes_writes = False
    """Whether the session knows what it has written also where no unit of work has taken it."""
    rereading: Rereading | None = None
    """The objects that were loaded before the open transaction began; ``None`` if there are none."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        door = self.door
        if door is not None:
            clause = kwargs.get("clause")
            door.look(self, clause)
            # A call without arguments comes from code that looks at the session, not from a statement.
            reads = getattr(clause, "is_select", False) or only_reads(clause)
            if (args or kwargs) and not reads:
                if self.task_blocks and not is_flushing(self):
                    # A flush is let through: this task's query has begun it, and it writes objects of the task in the
                    # block.
                    refuse_in_block_of_other_task(self)
                self.note_write(clause)
                if getattr(clause, "is_update", False) and self.identity_map and "mapper" in kwargs:
                    note_originals_of(self, kwargs["mapper"])
                if innermost_block(self) is not None and not is_flushing(self):
                    self.note_work_in_block()
            if self.on_begin is not None and self.begins_with_next_call and in_greenlet():
                # The statement has not come through the door: lazy loading of `AsyncAttrs`, for instance.
                await_only(self.begin_with_hook(self.on_begin))
            if reads:
                # The common case, without a call.
                if self.reads is None:
                    self.reads = [clause]
                else:
                    self.note_another_read(clause)
        elif (args or kwargs) and not only_reads(kwargs.get("clause")):
            if self.notes_writes:
                self.note_write()
            if innermost_block(self) is not None and not is_flushing(self):
                self.note_work_in_block()
        bind = super().get_bind(*args, **kwargs)
        if bind is not self.bind:
            # The user's class, or `binds`, has chosen an engine of its own.
            teach(bind)
        return bind if self.translate_bind is None else self.translate_bind(bind)

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - as SQLAlchemy calls it
        # An ended session refuses here what `get_bind` does not see: an object that is only added makes no statement,
        # and would be lost; and `session.connection(bind_arguments={"bind": …})` does not ask `get_bind`.
        if self.door is not None:
            self.door.refuse_if_ended()
            if not self.in_transaction():
                self.interrupted = None
                if self.reads is not None and len(self.reads) > 1:
                    self.forget_earlier_reads()
                self.look_back()
                if self.rereading is not None:
                    self.rereading.is_ahead = False
        return super()._autobegin_t(begin)

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - as SQLAlchemy has it
        refuse_in_block_of_other_task(self)
        if not self.in_transaction():
            self.forget_reads()
        if nested and self.on_begin is not None and self.begins_with_next_call and in_greenlet():
            # If the hook set something inside of the savepoint, the savepoint's roll-back would undo that.
            await_only(self.begin_with_hook(self.on_begin))
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
        try:
            super().rollback()
        finally:
            # SQLAlchemy does not call `_give_back_lost` where the driver has failed to roll back.
            self.give_back_lost()

    def look_back(self) -> None:
        """Note whether there are objects that were loaded before the transaction that is about to begin."""
        if self.rereading is None or not self.rereading.is_ahead:
            self.rereading = Rereading(self) if self.identity_map else None

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        # Looked up before the call: an expired object, which `objects` leaves out, is read by the call itself.
        rereading = self.rereading
        earlier = None if rereading is None else rereading.objects(self)
        found = super().get(entity, ident, **options)
        if found is None:
            return None
        state: InstanceState[Any] = object_state(found)
        if (
            earlier is not None
            and rereading is not None
            and state in earlier
            # The query would flush these changes first. An object that is to be deleted would be gone.
            and not (state.modified or found in self.deleted)
        ):
            # The object is read anew once in each transaction, however often it is asked for.
            rereading.keep_loaded_for(state, self)
            with keeping_changes(self):
                found = super().get(entity, ident, **{**options, "populate_existing": True})
            earlier.discard(state)
        elif state.callables:
            try:
                load_kept(state)
            except ObjectDeletedError:
                # The row is gone. For an expired object, `get` of SQLAlchemy asks for the row, and returns ``None``.
                self.expire(found)
                return super().get(entity, ident, **options)
        return found

    def _identity_lookup(self, *args: Any, **options: Any) -> Any:
        found = super()._identity_lookup(*args, **options)
        if not self._keeps_values or options.get("lazy_loaded_from") is None or isinstance(found, _NO_OBJECT):
            return found
        # A relationship to a single object is about to be loaded, or set. When it is set, an object that has expired
        # counts as unknown, and SQLAlchemy does nothing on its side.
        state: InstanceState[Any] = object_state(found)
        passive = options["passive"]
        if not kept_columns(state) or not passive & PassiveFlag.RELATED_OBJECT_OK:
            return found
        if not passive & PassiveFlag.SQL_OK:
            return LoaderCallableStatus.PASSIVE_NO_RESULT
        if in_greenlet():
            try:
                load_kept(state)
            except ObjectDeletedError:
                self.expire(found)
                return super()._identity_lookup(*args, **options)
        return found

    def flush(self, objects: Any = None) -> None:
        if not has_to_flush(self):
            super().flush(objects)
            return
        is_in_block = innermost_block(self) is not None
        # If the flush of several objects fails, more is undone than what has failed.
        is_much = is_in_block and len(self.new) + len(self.dirty) + len(self.deleted) > 1
        try:
            if self.door is None:
                super().flush(objects)
            else:
                self._flush_and_note_changes(objects)
        except BaseException:
            if is_much:
                self.note_work_in_block()
            raise
        if is_in_block:
            self.note_work_in_block()

    def _expunge_states(self, states: Any, to_transient: bool = False) -> None:  # noqa: FBT001, FBT002 - SQLAlchemy's
        if to_transient and self.door is not None:
            # SQLAlchemy calls this in each roll-back, before it expires the objects; twice, if a listener changes some.
            self.give_back_lost()
            self._lost = LoadedValues(self, self.get_nested_transaction())
        elif self._keeps_values:
            # `make_transient`, which comes this way as well, forgets what is not shown.
            show_kept(self, states, before_close=True)
        super()._expunge_states(states, to_transient)

    def give_back_lost(self) -> None:
        """Give the objects back what they have lost by the roll-back that was made just now."""
        lost, self._lost = self._lost, None
        if lost is not None:
            self._keeps_values = True
            lost.keep()
            if not lost.are_of_savepoint:
                # `run_sync` may begin the next transaction by a query, which is too late to add a listener of queries.
                self.look_back()

    def show_kept(self, *, before_close: bool = False) -> None:
        """Give the objects what is kept of them since a roll-back, as for code that reads their ``__dict__``."""
        if self._keeps_values:
            self._keeps_values = False
            show_kept(self, before_close=before_close)

    def expunge_all(self) -> None:
        self.give_back_lost()
        self.show_kept(before_close=True)
        super().expunge_all()

    def _flush_and_note_changes(self, objects: Any) -> None:
        # Only new objects have no originals: those of the children of a deleted object are noted as well.
        if self.identity_map.check_modified() or self.deleted:
            note_originals(self)
        worker: Any = getcurrent()
        if type(worker) is not CallGreenlet:
            if in_greenlet():
                # SQLAlchemy's own, in which attributes of `AsyncAttrs` are loaded: it has not come through the door.
                await_only(pass_door(self.door, self.flush, (objects,), {}))
            else:
                super().flush(objects)
            return
        changes, outer = ConcurrentChanges(self), worker.waiting
        try:
            if self.shown_values:
                # What other tasks change meanwhile is written by this flush. A query that flushes first must not take
                # what is about to be written for changes made while it waits for its rows.
                worker.waiting = None
                refuse_stale_changes(self)
            worker.waiting = changes
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
        if self.door is not None or self.notes_writes:
            self.note_write()
        connection = super().connection(*args, **kwargs)
        if self.door is not None:
            set_door_of_connection(connection, self.door)
        if in_greenlet():
            lend_driver_connection(connection)
        return connection

    async def begin_with_hook(self, on_begin: OnBegin, *, has_connection: bool = False) -> None:
        """Begin the transaction by what `on_begin` does, unless a statement has been made in it.

        Args:
            on_begin: the session's own.
            has_connection: whether the transaction has taken its connection just now, for `on_begin` to come next.
        """
        session = async_session(self)
        assert session is not None, "the asynchronous session is making this call"
        if self._has_begun_with_hook() or (not has_connection and not self.begins_with_next_call):
            return
        # The hook's own statements are the first ones of the transaction.
        self.on_begin = None
        door = self.door
        assert door is not None
        try:
            # The hook may have tasks of its own make its statements, as `asyncio.wait_for` does on Python 3.11.
            # What was only added so far must not be flushed by the hook's statements: it would be written before them.
            async with door.turn():
                with self.no_autoflush:
                    await begin_transaction(session)
                    if not self.in_transaction():
                        # A hook that makes no statement begins none, and would be awaited again.
                        begin_without_statement(self)
                    await on_begin(session)
            self.note_set_up()
            if (transaction := self.get_transaction()) is not None:
                self._begun_with_hook = ref(transaction)
        except BaseException:
            # Without what the hook was to set, a role for instance, no statement may be made in this transaction. In
            # the middle of a flush or a commit, SQLAlchemy rolls it back by itself when it gets the error.
            with suppress(IllegalStateChangeError):
                await call_in_greenlet(self.rollback)
            raise
        finally:
            self.on_begin = on_begin

    def _has_begun_with_hook(self) -> bool:
        begun = None if self._begun_with_hook is None else self._begun_with_hook()
        return begun is not None and begun is self.get_transaction()

    def await_hooks_again(self) -> None:
        """Await `on_begin` before the next statement, also where that was done in this transaction: it has grown."""
        self._begun_with_hook = None

    def close(self) -> None:
        if self._may_be_closed_here():
            self.close_unasked()

    def close_unasked(self) -> None:
        """Close the session, whatever work it holds: for the unit of work that ends it."""
        try:
            super().close()
        finally:
            self._tell_end()

    def _may_be_closed_here(self) -> bool:
        """Return whether the running code may close the session, also where it was given it by ``run_sync``."""
        if self.door is None or is_at_rest(self):
            return True
        session = async_session(self)
        return session is None or self.may_be_closed(session, None)

    def may_be_closed(self, session: AsyncSession, exc: BaseException | None) -> bool:
        """Return whether the running code may close the session; a unit of work that ends its own session may.

        Args:
            session: the asynchronous session of this one.
            exc: the exception that leaves an ``async with`` block of the session.
        """
        if self.door is None or self.before_close is None or self.door.is_held():
            return True
        return not self.door.has_ended and self.before_close(session, exc)

    def invalidate(self) -> None:
        try:
            super().invalidate()
        finally:
            self._tell_end()

    def _tell_end(self) -> None:
        if self.on_end is not None and not self.in_transaction():
            self.on_end()


@event.listens_for(GuardedSession, "after_soft_rollback")
def _give_back_lost(session: GuardedSession, transaction: SessionTransaction) -> None:
    session.give_back_lost()


def guard_of(session: AsyncSession) -> GuardedSession:
    """Return the synchronous session of `session`, which is known to be guarded."""
    return session.sync_session  # type: ignore[return-value]  # a cast would cost time


def door_of(session: AsyncSession) -> Door | None:
    """Return the door of a session; ``None`` where no unit of work has taken it."""
    sync_session = session.sync_session
    return sync_session.door if isinstance(sync_session, GuardedSession) else None
