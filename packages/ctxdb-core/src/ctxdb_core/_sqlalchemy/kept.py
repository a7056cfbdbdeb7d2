"""Values that objects had loaded before a roll-back, kept beside the objects: see `loaded`.

SQLAlchemy asks the ``callables`` of an object's state to load an attribute that has no value, and forgets these as soon
as the attribute is loaded otherwise, or expired. So a callable is where a kept value lies. The attribute counts as not
loaded: queries fill it, and a change of it is written whatever was kept.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.mutable import MutableBase
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, PassiveFlag, RelationshipDirection, Session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util.concurrency import in_greenlet

from ctxdb_core._sqlalchemy.private import changed_states

__all__ = [
    "CONTAINERS",
    "LOST",
    "KeptValue",
    "SessionWithShownValues",
    "expire_kept",
    "keep",
    "kept_values",
    "refuse_stale_changes",
    "show_kept",
]

logger = logging.getLogger("ctxdb")

LOST = "What %s had loaded before a roll-back could not be kept"

# What SQLAlchemy lets code change in place, without a copy of what was loaded.
CONTAINERS = (MutableBase, dict, list, set)

_SHOWN = "ctxdb.shown"


class KeptValue(NamedTuple):
    """What an attribute shows after a roll-back."""

    value: Any
    """The value; for a collection its members."""
    was_changed: bool
    """Whether it is a container that the code has changed in place before the roll-back."""


class _Shown(NamedTuple):
    value: Any
    before: Any
    """The value as it was when it was shown: a container is changed in place."""
    was_changed: bool


class SessionWithShownValues(Session):
    """A synchronous session that knows which values of before a roll-back the code has seen."""

    shown_values: WeakKeyDictionary[InstanceState[Any], dict[str, _Shown]] | None = None
    """The values, by objects and attributes; ``None`` if there are none."""


class _Keeper:
    """Loads an attribute by showing what was kept of it, where SQLAlchemy cannot ask the database."""

    __slots__ = ("kept", "key")

    def __init__(self, key: str, kept: KeptValue) -> None:
        self.key = key
        self.kept = kept

    def __call__(self, state: InstanceState[Any], passive: PassiveFlag) -> Any:
        """Load the attribute: SQLAlchemy calls this as it calls the loader of a relationship."""
        may_ask = bool(passive & PassiveFlag.SQL_OK)
        if may_ask and (state.session is None or not in_greenlet()):
            _show(state, self.key)
            if self.key in state.dict:
                return LoaderCallableStatus.ATTR_WAS_SET
        impl: Any = state.manager[self.key].impl
        if not impl.accepts_scalar_loader:
            return impl.callable_(state, passive) if impl.callable_ else LoaderCallableStatus.ATTR_EMPTY
        if not may_ask:
            return LoaderCallableStatus.PASSIVE_NO_RESULT
        columns = expire_kept(state)
        try:
            return impl.get(state, state.dict, passive)
        except BaseException:
            _give_keepers(state, {key: each for key, each in columns.items() if _has_to_be_loaded(state, key)})
            raise


def keep(state: InstanceState[Any], kept: Mapping[str, KeptValue]) -> None:
    """Keep what an object had loaded, which SQLAlchemy has expired."""
    keepers = {key: _Keeper(key, each) for key, each in kept.items() if _has_to_be_loaded(state, key)}
    if keepers:
        _give_keepers(state, keepers)
        # SQLAlchemy would load what is left of an object that is expired as a whole, and not what is kept.
        state.expired = False


def kept_values(state: InstanceState[Any]) -> dict[str, KeptValue]:
    """Return what is kept of an object, and was neither shown nor loaded since."""
    return {key: each.kept for key, each in _keepers_of(state).items()}


def _keepers_of(state: InstanceState[Any]) -> dict[str, _Keeper]:
    return {key: each for key, each in state.callables.items() if isinstance(each, _Keeper)}


def _give_keepers(state: InstanceState[Any], keepers: Mapping[str, _Keeper]) -> None:
    # States without callables share one empty mapping.
    state.callables = {**state.callables, **keepers}
    state.expired_attributes.difference_update(keepers)


def expire_kept(state: InstanceState[Any]) -> dict[str, _Keeper]:
    """Have SQLAlchemy load the columns that are kept of an object, as after a roll-back; return what has kept them."""
    columns = {
        key: each
        for key, each in _keepers_of(state).items()
        if state.manager[key].impl.accepts_scalar_loader and _has_to_be_loaded(state, key)
    }
    for key in columns:
        del state.callables[key]
    state.expired_attributes.update(columns)
    return columns


def _has_to_be_loaded(state: InstanceState[Any], key: str) -> bool:
    """Return whether SQLAlchemy would load an attribute at a look: it has no value, but perhaps additions to one."""
    unknown = LoaderCallableStatus.NO_VALUE
    return key not in state.dict and state.committed_state.get(key, unknown) is unknown


def show_kept(session: Session) -> None:
    """Give the objects of a session all that is kept of them, before they leave it."""
    for state in session.identity_map.all_states():
        for key in _keepers_of(state):
            _show(state, key)


def _show(state: InstanceState[Any], key: str) -> None:
    """Give an object what is kept of one of its attributes, as if it had just been loaded."""
    keeper, instance, session = state.callables.pop(key, None), state.obj(), state.session
    if not isinstance(keeper, _Keeper) or instance is None or not _has_to_be_loaded(state, key):
        return
    value, was_changed = keeper.kept
    is_column = key in state.mapper.column_attrs
    try:
        before = copy.deepcopy(value) if is_column and isinstance(value, CONTAINERS) else value
        set_committed_value(instance, key, value)
    except Exception as exc:
        # The key or the position of a collection's member cannot be read, for instance, as its column stays expired.
        if not isinstance(exc, SQLAlchemyError):
            logger.warning(LOST, state.class_, exc_info=True)
        if session is not None:
            session.expire(instance, [key])
        return
    if is_column and isinstance(session, SessionWithShownValues):
        if session.shown_values is None:
            session.shown_values = WeakKeyDictionary()
        session.shown_values.setdefault(state, {})[key] = _Shown(value, before, was_changed)
    for column in _foreign_keys(state, key):
        _show(state, column)


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
        shown = session.shown_values.get(state, {})
        changed = {key for name in state.committed_state for key in (name, *_foreign_keys(state, name))}
        seen = {key: shown[key] for key in changed & shown.keys() if _is_changed_from(state, key, shown[key].value)}
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


def _are_still_true(session: Session, state: InstanceState[Any], seen: Mapping[str, _Shown]) -> bool:
    if any(each.was_changed for each in seen.values()):
        return False
    assert state.key is not None, "it is persistent"
    mapper = state.mapper
    columns = {key: mapper.column_attrs[key] for key in seen if key in mapper.column_attrs}
    query = select(*(each.class_attribute for each in columns.values())).where(
        *(column == value for column, value in zip(mapper.primary_key, state.key[1], strict=True))
    )
    with session.no_autoflush:
        row = session.execute(query).one_or_none()
    return row is not None and all(
        each.columns[0].type.compare_values(seen[key].before, value)
        for (key, each), value in zip(columns.items(), row, strict=True)
    )
