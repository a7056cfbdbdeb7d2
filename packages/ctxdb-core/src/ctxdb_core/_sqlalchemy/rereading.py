"""Objects that are read again in a later transaction are fresh; others keep the values that they have.

A session keeps one object for each row. SQLAlchemy fills it when it is loaded first, and leaves it alone when a query
returns the row again: in the same transaction that is what a transaction is about. Other sessions expire their objects
at a commit, so that the next look loads them. Sessions of ctxdb do not, as asyncio code cannot load by looking: so a
server-sent event that asks for a row's state, again and again, would see its first state for ever.

So from the second transaction of a session on, its queries fill the objects anew that they return, and ``get`` asks the
database once for each object of an earlier transaction. A relationship, a deferred column or a subclass's column that
was loaded, and is not a part of the query, keeps what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from greenlet import getcurrent  # what SQLAlchemy's asyncio extra is made of
from sqlalchemy import Result, event, inspect
from sqlalchemy.engine import ChunkedIteratorResult
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, Mapper, ORMExecuteState, QueryContext, Session
from sqlalchemy.orm.attributes import flag_dirty, set_attribute
from sqlalchemy.orm.collections import collection_adapter

from ctxdb_core._sqlalchemy.greenlets import CallGreenlet
from ctxdb_core._sqlalchemy.private import changed_states, commit_values, flushes_before, follow_parts, listen_once

__all__ = ["Rereading", "keeping_changes", "note_changes"]

_NO_VALUE = LoaderCallableStatus.NO_VALUE

# Relationships whose objects are loaded with the object itself.
_EAGER = ("immediate", "joined", "selectin", "subquery")


class Rereading:
    """The objects that `session` has from its earlier transactions, as it begins another transaction."""

    __slots__ = ("_earlier", "is_ahead", "kept")

    def __init__(self, session: Session) -> None:
        self.is_ahead = True
        """Whether the transaction that this object was made for has yet to begin."""
        self.kept: WeakKeyDictionary[InstanceState[Any], dict[str, Any]] = WeakKeyDictionary()
        """What each object had loaded on demand when the last query began that fills objects anew."""
        self._earlier: WeakSet[InstanceState[Any]] | None = None
        """The objects; looked up at the first query, as there may be none."""
        listen_once(session, "do_orm_execute", _read_anew)

    def objects(self, session: Session) -> WeakSet[InstanceState[Any]]:
        """Return the objects of earlier transactions that have not been read again by `Session.get`."""
        if self._earlier is None:
            # SQLAlchemy reads an expired object anew by itself.
            self._earlier = WeakSet(each for each in session.identity_map.all_states() if not each.expired)
        return self._earlier

    def keep_loaded_for(self, state: InstanceState[Any], session: Session) -> None:
        """Keep what is loaded as `state` is read anew, and what its relationships lead to."""
        is_alone = all(each.lazy not in _EAGER for each in state.mapper.relationships)
        self.keep_loaded([state] if is_alone else session.identity_map.all_states())

    def keep_loaded(self, states: Iterable[InstanceState[Any]]) -> None:
        """Keep what `states` have loaded on demand until now, as a query begins that may fill these objects anew.

        That is more than the objects of earlier transactions had: this transaction may have loaded a relationship by
        one query, and returns the object by another one.
        """
        self.kept = WeakKeyDictionary({each: loaded for each in states if (loaded := _loaded_on_demand(each))})


def _loaded_on_demand(state: InstanceState[Any]) -> dict[str, Any]:
    """Return the values of the relationships, and of the columns that not every query loads, that have been loaded."""
    loaded = {key: state.dict[key] for key in _keys_loaded_on_demand(state.mapper) if key in state.dict}
    if loaded and state.class_ not in _followed:
        event.listen(state.class_, "refresh", _keep_loaded)
        _followed.add(state.class_)
    return loaded


_followed: WeakSet[type[Any]] = WeakSet()
"""The classes that `_keep_loaded` listens to."""


def _keys_loaded_on_demand(mapper: Mapper[Any]) -> tuple[str, ...]:
    """Return the attributes whose values SQLAlchemy forgets if a query fills an object anew without loading them."""
    keys = _keys_by_mapper.get(mapper)
    if keys is None:
        # A query for a base class does not load what its subclasses add.
        common = mapper.base_mapper.column_attrs
        deferred = (each.key for each in mapper.column_attrs if each.deferred or each.key not in common)
        relationships = (each.key for each in mapper.relationships if each.lazy not in ("dynamic", "write_only"))
        keys = _keys_by_mapper[mapper] = (*relationships, *deferred)
    return keys


_keys_by_mapper: WeakKeyDictionary[Mapper[Any], tuple[str, ...]] = WeakKeyDictionary()


def _rereading_of(session: Session) -> Rereading | None:
    return getattr(session, "rereading", None)


def _read_anew(execution: ORMExecuteState) -> Result[Any] | None:
    """Have a query fill the objects of earlier transactions anew: a listener of ``do_orm_execute``."""
    session = execution.session
    rereading = _rereading_of(session)
    if rereading is None or not execution.is_select or execution.is_column_load:
        return None
    options = execution.execution_options
    if not flushes_before(execution) and session.identity_map.check_modified():
        # What the code has set, and not flushed, is not to be overwritten.
        return None
    if not rereading.objects(session) or "populate_existing" in options:
        return None
    rereading.keep_loaded(session.identity_map.all_states())
    execution.update_execution_options(populate_existing=True)
    if options.get("stream_results") or options.get("yield_per"):
        # The rows of a streamed result are not read by this call.
        result = execution.invoke_statement()
        if isinstance(result, ChunkedIteratorResult):
            follow_parts(result, partial(_keep_changes_between, session))
        return result
    with keeping_changes(session):
        return execution.invoke_statement()


@contextmanager
def keeping_changes(session: Session) -> Iterator[None]:
    """Keep what other tasks change on the objects of `session` while the block waits, and fills these objects anew."""
    worker: Any = getcurrent()
    if type(worker) is not CallGreenlet or isinstance(worker.waiting, ChangesDuringQuery):
        # A greenlet of SQLAlchemy's own does not tell when it waits; and the outer block covers an inner one.
        yield
        return
    changes, outer = ChangesDuringQuery(session), worker.waiting
    worker.waiting = changes
    try:
        yield
    finally:
        worker.waiting = outer
        changes.restore()


def _keep_changes_between(session: Session, parts: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """Keep what was changed since an earlier part of a streamed result was read, where a later part has that object."""
    while True:
        worker: Any = getcurrent()
        changes, outer = ChangesDuringQuery(session), getattr(worker, "waiting", None)
        changes.end_waiting()
        worker.waiting = changes
        try:
            part = next(parts, None)
        finally:
            worker.waiting = outer
            changes.restore()
        if part is None:
            return
        yield part


def note_changes() -> None:
    """Note what other tasks have changed, as the running greenlet has fetched rows that it is about to read."""
    waiting = getattr(getcurrent(), "waiting", None)
    if isinstance(waiting, ChangesDuringQuery):
        waiting.end_waiting()


class ChangesDuringQuery:
    """What is changed while `session` waits for the rows of a query that fills its objects anew."""

    __slots__ = ("_changed", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._changed: dict[InstanceState[Any], dict[str, tuple[Any, Any]]] = {}
        """The values of attributes, each with what it was before the change."""

    def begin_waiting(self) -> None:
        """Do nothing: objects that were changed before the query have been flushed."""

    def end_waiting(self) -> None:
        """Note what has been set, as the rows are read next."""
        for state in changed_states(self._session):
            originals = state.committed_state
            values = {name: (state.dict[name], originals[name]) for name in originals if name in state.dict}
            self._changed.setdefault(state, {}).update(values)

    def restore(self) -> None:
        """Set again what the query has overwritten, or takes for read."""
        for state, values in self._changed.items():
            instance = state.obj()
            if instance is None or not state.persistent:
                continue
            for name, (value, original) in values.items():
                if name in state.committed_state or name in state.expired_attributes:
                    # SQLAlchemy knows the change still; or the code has expired the attribute, and does not want the
                    # change any more.
                    continue
                if state.dict.get(name, _NO_VALUE) is value:
                    # The query has loaded other attributes of the object, and SQLAlchemy takes all of them for read.
                    state.committed_state[name] = original
                    flag_dirty(instance)
                else:
                    set_attribute(instance, name, value)


def _keep_loaded(instance: object, context: Any, attributes: object) -> None:
    """Put back what an object has loaded on demand, and a query has not: a listener of ``refresh``."""
    if not isinstance(context, QueryContext):
        # SQLAlchemy tells of an ORM-enabled UPDATE, and of a composite that is read, by the same event.
        return
    # `session.refresh()` reads one object anew, with all that it has loaded on demand: nothing is to be kept then.
    refreshed: Any = context.refresh_state
    rereading = _rereading_of(context.session) if refreshed is None else None
    if rereading is None:
        return
    state: InstanceState[Any] = inspect(instance)
    for key, value in rereading.kept.get(state, {}).items():
        if key not in state.dict:
            commit_values(state, {key: value})
            if key in state.mapper.relationships and state.mapper.relationships[key].uselist:
                # SQLAlchemy has given the collection up, which the code may have at hand, and append to.
                collection_adapter(value).invalidated = False
    # The query may come to the object again, by a relationship of another one.
    rereading.kept[state] = _loaded_on_demand(state)
