"""Keeps what the objects of a session have loaded when the unit of work is rolled back, or a flush fails.

SQLAlchemy expires each object of a session when its transaction is rolled back, as by an error of a flush, and asyncio
code cannot load an expired attribute by reading it: an access log that reads the user's name behind a 404 would fail.
So the values that had been loaded are put back. Where the code has changed an attribute since, the attribute shows
again what had been loaded: what the code has set is not in the database. An attribute that was set without having been
loaded stays expired. A container that was changed in place (``MutableDict``, `flag_modified`) shows the change: its
former value was not kept.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from sqlalchemy import inspect
from sqlalchemy.ext.mutable import MutableBase
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, Session
from sqlalchemy.orm.attributes import set_committed_value

from ctxdb_core._sqlalchemy.private import begin_without_statement, commit_values, deleted_in

__all__ = ["LoadedValues", "note_originals"]

_ORIGINALS = "ctxdb.originals"

# What SQLAlchemy lets code change in place, without a copy of what was loaded.
_CONTAINERS = (MutableBase, dict, list, set)


def note_originals(session: Session) -> None:
    """Remember what changed objects had loaded, before a flush makes SQLAlchemy forget it."""
    begin_without_statement(session)
    originals = _originals_of(session)
    if originals is None:
        originals = {}
        session.info[_ORIGINALS] = (ref(session.get_transaction()), originals)
    for each in session.dirty:
        state: InstanceState[Any] = inspect(each)
        earlier = originals.get(state)
        # A flush changes more than the code has changed: versions, ``onupdate`` columns, keys of related objects.
        # At later flushes, SQLAlchemy knows only what the code has set before: the first note has what was loaded.
        originals[state] = (
            {**_columns_of(state), **state.committed_state} if earlier is None else {**state.committed_state, **earlier}
        )


def _columns_of(state: InstanceState[Any]) -> dict[str, Any]:
    values = state.dict
    return {each.key: values[each.key] for each in state.mapper.column_attrs if each.key in values}


def _originals_of(session: Session) -> dict[InstanceState[Any], dict[str, Any]] | None:
    """Return what was remembered in the open transaction; what an earlier transaction remembered is out of date."""
    transaction, originals = session.info.get(_ORIGINALS, (None, None))
    return originals if transaction is not None and transaction() is session.get_transaction() else None


class LoadedValues:
    """What the objects that are in `session` now have loaded."""

    __slots__ = ("_objects",)

    def __init__(self, session: Session) -> None:
        originals = _originals_of(session) or {}
        states: list[InstanceState[Any]] = [*session.identity_map.all_states(), *deleted_in(session)]
        self._objects = [
            (state, dict(state.dict), {**state.committed_state, **originals.get(state, {})}) for state in states
        ]

    def restore(self) -> None:
        """Give the objects back what they have lost by the roll-back."""
        for state, values, originals in self._objects:
            instance = state.obj()
            if instance is None or state.transient:
                # An object that was inserted and rolled back keeps what it has.
                continue
            commit_values(state, {name: value for name, value in values.items() if name not in originals})
            for name, value in originals.items():
                if not isinstance(value, LoaderCallableStatus):
                    set_committed_value(instance, name, value)
                elif isinstance(values.get(name), _CONTAINERS):
                    set_committed_value(instance, name, values[name])
