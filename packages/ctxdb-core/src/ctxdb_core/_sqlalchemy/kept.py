"""Values that objects had loaded before a roll-back, kept beside the objects: see `loaded`.

SQLAlchemy asks the ``callables`` of an object's state to load an attribute that has no value, and forgets these as soon
as the attribute is loaded otherwise, or expired. So a callable tells that a value is kept. The attribute counts as not
loaded: queries fill it, and a change of it is written whatever was kept.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.mutable import MutableBase
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, Mapper, PassiveFlag, RelationshipDirection, Session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._sqlalchemy.private import changed_states, commit_values

__all__ = [
    "CONTAINERS",
    "Kept",
    "SessionWithShownValues",
    "expire_kept",
    "keep",
    "kept_columns",
    "load_kept",
    "names_of",
    "refuse_stale_changes",
    "show_kept",
    "still_kept",
]

logger = logging.getLogger("ctxdb")

_LOST = "What %s had loaded before a roll-back could not be kept"

# What SQLAlchemy lets code change in place, without a copy of what was loaded.
CONTAINERS = (MutableBase, dict, list, set)

_KEPT = "ctxdb.kept"
_UNKNOWN = object()


class Kept(NamedTuple):
    """What an object shows after a roll-back."""

    values: Mapping[str, Any]
    """The values by the names of the attributes; of a collection its members."""
    changed: AbstractSet[str]
    """The attributes whose containers the code had changed in place before the roll-back."""


class Shown(NamedTuple):
    """What the columns of an object have shown since a roll-back."""

    values: dict[str, Any]
    copies: dict[str, Any]
    """The containers as they were when they were shown: code may change one in place."""


_NOTHING = Kept({}, frozenset())


class SessionWithShownValues(Session):
    """A synchronous session that knows which values of before a roll-back the code has seen."""

    shown_values: WeakKeyDictionary[InstanceState[Any], Shown] | None = None
    """What objects have shown; ``None`` if they have shown nothing."""


class _Names(NamedTuple):
    """The names of the attributes of a class that may be kept."""

    columns: frozenset[str]
    collections: frozenset[str]
    all: frozenset[str]


def names_of(mapper: Mapper[Any]) -> _Names:
    """Return the names of the attributes that may be kept."""
    names = _names_by_mapper.get(mapper)
    if names is None:
        columns, relationships = frozenset(mapper.column_attrs.keys()), mapper.relationships
        collections = frozenset(each.key for each in relationships if each.uselist)
        names = _names_by_mapper[mapper] = _Names(columns, collections, columns.union(relationships.keys()))
    return names


_names_by_mapper: WeakKeyDictionary[Mapper[Any], _Names] = WeakKeyDictionary()


class _Keeper:
    """Loads an attribute by showing what was kept of it, where SQLAlchemy cannot ask the database."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, state: InstanceState[Any], passive: PassiveFlag) -> Any:
        """Load the attribute: SQLAlchemy calls this as it calls the loader of a relationship."""
        may_ask = bool(passive & PassiveFlag.SQL_OK)
        if may_ask and (state.session is None or not in_greenlet()):
            _show(state, [self.key, *_foreign_keys(state, self.key)], state.session)
            if self.key in state.dict:
                return LoaderCallableStatus.ATTR_WAS_SET
        impl: Any = state.manager[self.key].impl
        if impl.accepts_scalar_loader and impl.load_on_unexpire:
            if not may_ask:
                return LoaderCallableStatus.PASSIVE_NO_RESULT
            load_kept(state, passive)
            return LoaderCallableStatus.ATTR_WAS_SET
        return impl.callable_(state, passive) if impl.callable_ else LoaderCallableStatus.ATTR_EMPTY


class _Keepers(dict[str, _Keeper]):
    """The keepers by the names of attributes. Each object has what is kept of it for itself."""

    def __missing__(self, key: str) -> _Keeper:
        self[key] = keeper = _Keeper(key)
        return keeper


_keepers = _Keepers()


def keep(state: InstanceState[Any], kept: Kept) -> None:
    """Keep what an object had loaded, which SQLAlchemy has expired."""
    state.info[_KEPT] = kept
    _give_keepers(state, kept.values)
    # SQLAlchemy would load what is left of an object that is expired as a whole, and not what is kept.
    state.expired = False


def still_kept(state: InstanceState[Any]) -> Kept | None:
    """Return what is kept of an object, and was neither shown nor loaded since."""
    if not state.callables or _KEPT not in state.info:
        return None
    kept: Kept = state.info[_KEPT]
    values = {key: kept.values[key] for key in _kept_in(state)}
    return Kept(values, kept.changed) if values else None


def _kept_in(state: InstanceState[Any]) -> list[str]:
    return [key for key, each in state.callables.items() if type(each) is _Keeper]


def _give_keepers(state: InstanceState[Any], keys: Iterable[str]) -> None:
    unneeded = state.dict.keys() | state.committed_state.keys()
    keepers: dict[str, Any] = {
        key: _keepers[key] for key in keys if key not in unneeded or _has_to_be_loaded(state, key)
    }
    # States without callables share one empty mapping.
    state.callables = {**state.callables, **keepers} if state.callables else keepers
    state.expired_attributes.difference_update(keepers)


def kept_columns(state: InstanceState[Any]) -> list[str]:
    """Return the columns that are kept of an object; where there are any, it is as good as expired."""
    names = names_of(state.mapper).columns
    return [key for key in _kept_in(state) if key in names and _has_to_be_loaded(state, key)]


def expire_kept(state: InstanceState[Any]) -> None:
    """Have the columns expire that are kept of an object, as after a roll-back without ctxdb."""
    if columns := kept_columns(state):
        for key in columns:
            del state.callables[key]
        state.expired_attributes.update(columns)
        state.expired = True


def load_kept(state: InstanceState[Any], passive: PassiveFlag = PassiveFlag.PASSIVE_OFF) -> None:
    """Load what is kept of an object, as SQLAlchemy loads what has expired of it: together with eager relationships.

    Raises:
        ObjectDeletedError: its row is gone.
        BaseException: the error of the query.
    """
    if not kept_columns(state):
        return
    manager: Any = state.manager
    # What the code has done to a collection that is not loaded is not to be applied to what its flush has made of it.
    changed = state.dict.keys() | state.committed_state.keys()
    keys = {key for key in _kept_in(state) if key not in changed and manager[key].impl.load_on_unexpire}
    manager.expired_attribute_loader(state, keys, passive)


def _has_to_be_loaded(state: InstanceState[Any], key: str) -> bool:
    """Return whether SQLAlchemy would load an attribute at a look: it has no value, but perhaps additions to one."""
    unknown = LoaderCallableStatus.NO_VALUE
    return key not in state.dict and state.committed_state.get(key, unknown) is unknown


def show_kept(
    session: SessionWithShownValues, states: Iterable[InstanceState[Any]] | None = None, *, before_close: bool = False
) -> None:
    """Give the objects of a session all that is kept of them.

    Args:
        session: the session.
        states: the objects; ``None`` for all that the session has.
        before_close: whether the objects leave it next, so that it will not write what code makes of the values.
    """
    for state in session.identity_map.all_states() if states is None else states:
        if state.callables:
            _show(state, _kept_in(state), None if before_close else session)
        # SQLAlchemy makes a dictionary of each state whose ``info`` is asked for.
        if "info" in vars(state):
            # Also where a query has loaded all that was kept: it would be pickled with the object.
            state.info.pop(_KEPT, None)


def _show(state: InstanceState[Any], keys: Iterable[str], session: Session | None) -> None:
    """Give an object what is kept of some attributes, as if it had just been loaded, and note that in `session`."""
    instance = state.obj()
    if instance is None:
        return
    names, kept, values = names_of(state.mapper), state.info.get(_KEPT, _NOTHING), {}
    for key in keys:
        if type(state.callables.get(key)) is _Keeper:
            del state.callables[key]
            if _has_to_be_loaded(state, key):
                values[key] = kept.values[key]
    collections = names.collections & values.keys()
    scalars = {key: each for key, each in values.items() if key not in collections} if collections else values
    commit_values(state, scalars)
    # The members of a collection that is a dictionary are asked for their keys.
    for key in collections:
        try:
            set_committed_value(instance, key, values[key])
        except Exception as exc:
            # The key or the position of a member cannot be read, for instance, as its column stays expired.
            if not isinstance(exc, SQLAlchemyError):
                logger.warning(_LOST, state.class_, exc_info=True)
            if state.session is not None:
                state.session.expire(instance, [key])
    if isinstance(session, SessionWithShownValues):
        if session.shown_values is None:
            session.shown_values = WeakKeyDictionary()
        shown = session.shown_values.setdefault(state, Shown({}, {}))
        for key in names.columns & values.keys():
            shown.values[key] = value = values[key]
            if isinstance(value, CONTAINERS):
                shown.copies[key] = _UNKNOWN if key in kept.changed else _copy_of(value)


def _copy_of(value: object) -> object:
    for kind in (dict, list, set):
        if isinstance(value, kind):
            return kind(value)
    try:
        return copy.copy(value)
    except Exception:  # noqa: BLE001 - a class of the user's
        return _UNKNOWN


def _foreign_keys(state: InstanceState[Any], key: str) -> Iterator[str]:
    """Return the attributes whose columns a relationship to a single object sets."""
    relationship = state.mapper.relationships.get(key)
    if relationship is not None and relationship.direction is RelationshipDirection.MANYTOONE:
        for column in relationship.local_columns:
            yield state.mapper.get_property_by_column(column).key


def refuse_stale_changes(session: SessionWithShownValues) -> None:
    """Compare what is about to be written with the rows where the code has seen values that a roll-back had kept.

    Raises:
        StaleDataError: another transaction has changed one of these values since.
    """
    assert session.shown_values is not None, "there is something to compare"
    for state in [*changed_states(session)]:
        if (shown := session.shown_values.get(state)) is None:
            continue
        changed = {key for name in state.committed_state for key in (name, *_foreign_keys(state, name))}
        values = {key: shown.values[key] for key in changed & shown.values.keys()}
        seen = {key: shown.copies.get(key, each) for key, each in values.items() if _is_changed_from(state, key, each)}
        if seen and not _are_still_true(session, state, seen):
            raise StaleDataError(
                f"{state.class_.__name__}.{', '.join(sorted(seen))}: the code has seen the value of before the "
                "roll-back and changed it, and the row has another value now. Read the object anew before you change "
                "it: `await session.refresh(...)`, or a query."
            )


def _is_changed_from(state: InstanceState[Any], key: str, value: object) -> bool:
    original = state.committed_state.get(key, LoaderCallableStatus.NO_VALUE)
    # A container that is changed in place is there still, and so is a foreign key before the flush.
    return (state.dict.get(key) if isinstance(original, LoaderCallableStatus) else original) is value


def _are_still_true(session: Session, state: InstanceState[Any], seen: Mapping[str, object]) -> bool:
    if _UNKNOWN in seen.values():
        return False
    assert state.key is not None, "it is persistent"
    mapper = state.mapper
    columns = [mapper.column_attrs[key] for key in seen]
    query = select(*(each.class_attribute for each in columns)).where(
        *(column == value for column, value in zip(mapper.primary_key, state.key[1], strict=True))
    )
    with session.no_autoflush:
        row = session.execute(query).one_or_none()
    return row is not None and all(
        each.columns[0].type.compare_values(seen[each.key], value) for each, value in zip(columns, row, strict=True)
    )
