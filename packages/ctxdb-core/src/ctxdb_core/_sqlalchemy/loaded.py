"""Keeps what the objects of a session have loaded when its transaction is rolled back, or a savepoint is.

SQLAlchemy expires the objects of a session when its transaction is rolled back, as by an error of a flush, and asyncio
code cannot load an expired attribute by reading it: an access log that reads the user's name behind a 404 would fail.
So the values that had been loaded are kept beside the object, and are shown where the code looks and SQLAlchemy could
not load them. Until then the object is as good as expired, since other transactions may have changed its row: queries,
``run_sync``, ``awaitable_attrs``, ``session.merge()`` and flushes read the row as they do without ctxdb, and what the
code sets is written whatever the value was before. Where a value was shown and the code changes it, the next flush
compares the row with what was shown.

Where the code has changed an attribute since it was loaded, the attribute shows again what had been loaded: what the
code has set is not in the database. An attribute that was set without having been loaded stays expired. A container
that was changed in place (``MutableDict``, `flag_modified`) shows the change: its former value was not kept. In
autocommit, what a flush has written stands, and its objects stay expired.

The roll-back of a savepoint expires the objects that were changed since it was set. What is kept of these are their
values of that time. A container that was changed in place stays expired here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Column, inspect
from sqlalchemy.orm import (
    InstanceState,
    LoaderCallableStatus,
    Mapper,
    RelationshipDirection,
    Session,
    SessionTransaction,
)
from sqlalchemy.orm.collections import collection_adapter

from ctxdb_core._sqlalchemy.binds import is_autocommit
from ctxdb_core._sqlalchemy.kept import (
    CONTAINERS,
    Kept,
    SessionWithShownValues,
    expire_kept,
    keep,
    kept_columns,
    names_of,
    show_kept,
    still_kept,
)
from ctxdb_core._sqlalchemy.private import (
    begin_without_statement,
    changed_in,
    connections_of,
    deleted_in,
)

__all__ = ["LoadedValues", "note_originals", "note_originals_of"]

_LEVELS = "ctxdb.originals"

_Originals: TypeAlias = dict[InstanceState[Any], dict[str, Any]]


class _Level(NamedTuple):
    """What changed objects had loaded when they were first flushed in a transaction, or behind a savepoint."""

    transaction: ref[SessionTransaction]
    originals: _Originals


def note_originals(session: Session) -> None:
    """Remember what changed objects had loaded, before a flush makes SQLAlchemy forget it."""
    changed: list[InstanceState[Any]] = [inspect(each) for each in session.dirty]
    # A flush also changes the foreign keys of objects that have come to a parent, have left it, or have lost it.
    members = [member for state in changed for member in _moved_members(state)]
    members += [member for each in session.deleted for member in _left_members(inspect(each))]
    _note(session, {*changed, *members} if members else changed)


def _moved_members(state: InstanceState[Any]) -> Iterator[InstanceState[Any]]:
    for relationship in state.mapper.relationships:
        if relationship.direction is RelationshipDirection.ONETOMANY and relationship.key in state.committed_state:
            history = state.attrs[relationship.key].history
            yield from _persistent((*history.added, *history.deleted))


def _left_members(deleted: InstanceState[Any]) -> Iterator[InstanceState[Any]]:
    never_loaded = _never_loaded(deleted.mapper)
    for relationship in deleted.mapper.relationships:
        name = relationship.key
        if (
            relationship.direction is RelationshipDirection.ONETOMANY
            and name in deleted.dict
            and name not in never_loaded
        ):
            value = deleted.dict[name]
            yield from _persistent(collection_adapter(value) if relationship.uselist else (value,))


def _persistent(members: Iterable[Any]) -> Iterator[InstanceState[Any]]:
    for member in members:
        # A relationship to a single object may have no member.
        state: InstanceState[Any] | None = None if member is None else inspect(member)
        if state is not None and state.persistent:
            yield state


def note_originals_of(session: SessionWithShownValues, mapper: Mapper[Any]) -> None:
    """Remember what the objects of a class have loaded, before an ORM-enabled UPDATE changes them with their rows."""
    states = [each for each in session.identity_map.all_states() if each.mapper.isa(mapper)]
    kept = {each: values for each in states if (values := _kept_columns_of(each))}
    for each in states:
        # What the statement writes would not be seen.
        if session.shown_values and each in session.shown_values:
            # SQLAlchemy would load only what is left of an object that is expired, and not write to what was shown.
            show_kept(session, [each])
        else:
            expire_kept(each)
    _note(session, states)
    # What is loaded from now on may be what the statement writes: until then, these were the last committed values.
    _add_older(_innermost_level(session).originals, kept)


def _note(session: Session, states: Iterable[InstanceState[Any]]) -> None:
    begin_without_statement(session)
    originals = _innermost_level(session).originals
    for state in states:
        earlier = originals.get(state)
        # A flush changes more than the code has changed: versions, ``onupdate`` columns, keys of related objects.
        # At later flushes, SQLAlchemy knows only what the code has set before: the first note has what was loaded.
        originals[state] = (
            {**_columns_of(state), **_committed(state)} if earlier is None else {**_committed(state), **earlier}
        )


def _committed(state: InstanceState[Any]) -> dict[str, Any]:
    """Return what the attributes that the code has changed since the last flush had before."""
    never_loaded = _never_loaded(state.mapper)
    return {name: value for name, value in state.committed_state.items() if name not in never_loaded}


def _never_loaded(mapper: Mapper[Any]) -> frozenset[str]:
    """Return the relationships whose objects are never loaded: they take no values, and are asked by queries."""
    names = _never_loaded_of.get(mapper)
    if names is None:
        names = frozenset(each.key for each in mapper.relationships if each.lazy in ("dynamic", "write_only"))
        _never_loaded_of[mapper] = names
    return names


_never_loaded_of: WeakKeyDictionary[Mapper[Any], frozenset[str]] = WeakKeyDictionary()


def _columns_of(state: InstanceState[Any]) -> dict[str, Any]:
    values = state.dict
    return {each.key: values[each.key] for each in state.mapper.column_attrs if each.key in values}


def _kept_columns_of(state: InstanceState[Any]) -> dict[str, Any]:
    kept = still_kept(state)
    # `Kept.changed` names containers that show a change.
    return {} if kept is None else {key: kept.values[key] for key in kept_columns(state) if key not in kept.changed}


def _innermost_level(session: Session) -> _Level:
    """Return the notes of the innermost savepoint that is open, or of the transaction if there is none."""
    levels = _open_levels(session)
    around = _open_transactions(session)
    if not levels:
        session.info[_LEVELS] = levels
    # Each savepoint has notes of its own: one that is over leaves its notes to the one around it.
    levels += [_Level(ref(each), {}) for each in around[len(levels) :]]
    return levels[-1]


def _open_levels(session: Session) -> list[_Level]:
    """Return the notes of the open transaction and its open savepoints, from the outside to the inside.

    What an earlier transaction has noted is out of date.
    """
    levels: list[_Level] = session.info.get(_LEVELS, [])
    around = _open_transactions(session)
    if not around or not levels or levels[0].transaction() is not around[0]:
        return []
    while len(levels) > 1 and levels[-1].transaction() not in around:
        over = levels.pop()
        _add_older(levels[-1].originals, over.originals)
    return levels


def _open_transactions(session: Session) -> list[SessionTransaction]:
    """Return the open transaction and the savepoints in it, from the outside to the inside."""
    around = session.get_nested_transaction() or session.get_transaction()
    found: list[SessionTransaction] = []
    while around is not None:
        # A flush has a `SessionTransaction` of its own, which is no transaction of the database.
        if around.nested or around.parent is None:
            found.insert(0, around)
        around = around.parent
    return found


def _oldest(levels: Iterable[_Level]) -> Mapping[InstanceState[Any], dict[str, Any]]:
    """Return the oldest notes of each object in `levels`, which are given from the outside to the inside."""
    oldest: _Originals = {}
    for level in levels:
        _add_older(oldest, level.originals)
    return oldest


def _add_older(older: _Originals, newer: _Originals) -> None:
    """Add notes to those that were made before them, which stand."""
    for state, values in newer.items():
        older[state] = {**values, **older.get(state, {})}


class _Loaded(NamedTuple):
    """What an object has loaded."""

    state: InstanceState[Any]
    values: dict[str, Any]
    originals: dict[str, Any]
    """What changed attributes had loaded."""
    kept: Kept | None
    """What is kept of it since an earlier roll-back."""


class LoadedValues:
    """What the objects that are in `session` now have loaded.

    Args:
        session: the session, in a transaction that is about to be rolled back.
        savepoint: the innermost savepoint, if only that is rolled back.
    """

    __slots__ = ("_objects", "are_of_savepoint")

    def __init__(self, session: Session, savepoint: SessionTransaction | None = None) -> None:
        self.are_of_savepoint = savepoint is not None
        """Whether only a savepoint is rolled back."""
        levels = _open_levels(session)
        ending = _open_transactions(session) if savepoint is None else [savepoint]
        # A roll-back brings back what was deleted.
        states = [*session.identity_map.all_states(), *(state for each in ending for state in deleted_in(each))]
        if savepoint is None:
            originals = _oldest(levels)
            changed = {state for each in ending for state in changed_in(each)}
            if any(is_autocommit(connection) for each in ending for connection in connections_of(each)):
                # What was written stands.
                written = originals.keys() | changed | {state for each in ending for state in deleted_in(each)}
                states = [each for each in states if each not in written]
        else:
            originals = _oldest(each for each in levels if each.transaction() is savepoint)
            # All that these objects had loaded is known. Of an object that only a flush has changed, beside the objects
            # that the code has changed, it is not: such an object stays expired.
            changed = set(originals)
            flushed = changed_in(savepoint)
            states = [each for each in states if each in originals or (each not in flushed and each.modified)]
        self._objects = [
            _Loaded(
                state,
                self._values_of(state, originals, changed),
                {**_committed(state), **originals.get(state, {})},
                still_kept(state),
            )
            for state in states
        ]

    def _values_of(
        self, state: InstanceState[Any], originals: Mapping[InstanceState[Any], object], changed: Container[object]
    ) -> dict[str, Any]:
        # SQLAlchemy notes a change of a relationship that is never loaded among the values.
        never_loaded = _never_loaded(state.mapper)
        values = {name: value for name, value in state.dict.items() if name not in never_loaded}
        if self.are_of_savepoint:
            # The next flush would write a change of a container as a part of a later one.
            for name, original in _committed(state).items():
                if isinstance(original, LoaderCallableStatus):
                    values.pop(name, None)
        if state not in changed:
            return values
        if self.are_of_savepoint:
            # A column that has been loaded since the first flush may have a value of that flush.
            for each in state.mapper.column_attrs:
                values.pop(each.key, None)
        elif state not in originals:
            # A flush has changed it for another object that the code has deleted, for instance.
            for key in _changed_by_flushes(state.mapper):
                values.pop(key, None)
        return values

    def keep(self) -> None:
        """Keep for the objects what they have lost by the roll-back."""
        for each in self._objects:
            state, instance = each.state, each.state.obj()
            if instance is None or state.transient:
                # An object that was inserted and rolled back has what it has.
                continue
            if self.are_of_savepoint and state.session is not None:
                # SQLAlchemy does not know what an ORM-enabled UPDATE has changed behind the savepoint.
                changed = [name for name in each.originals if name in state.dict and name not in state.committed_state]
                if changed:
                    state.session.expire(instance, changed)
            keep(state, _to_keep(each))


def _to_keep(loaded: _Loaded) -> Kept:
    """Return what an object shows after the roll-back of its transaction."""
    names, values = names_of(loaded.state.mapper), loaded.values
    for name in values.keys() - names.all:
        del values[name]
    for name in names.collections & values.keys():
        values[name] = [*collection_adapter(values[name])]
    changed: set[str] = set()
    for name, original in loaded.originals.items():
        value = values.pop(name, None)
        if not isinstance(original, LoaderCallableStatus):
            values[name] = original
        elif name not in names.collections and isinstance(value, CONTAINERS):
            values[name] = value
            changed.add(name)
    if loaded.kept is not None:
        # A container that the code has set without loading it hides what is kept.
        known = values.keys() - (changed & loaded.kept.values.keys())
        changed = (changed & known).union(loaded.kept.changed - known)
        values |= {name: value for name, value in loaded.kept.values.items() if name not in known}
    return Kept(values, changed)


def _changed_by_flushes(mapper: Mapper[Any]) -> Iterator[str]:
    """Return the attributes that a flush changes in objects which the code has not changed."""
    for attribute in mapper.column_attrs:
        for column in attribute.columns:
            if isinstance(column, Column) and (
                column.foreign_keys or column.onupdate or column.server_onupdate or column is mapper.version_id_col
            ):
                yield attribute.key
