"""Changes that other tasks make while a session flushes: SQLAlchemy would forget them.

A flush waits for the database several times. Meanwhile, another task of the unit of work may change an object, which is
no call of the session that could wait for its turn. At its end, the flush takes all objects for written, those changes
included: a row would keep its old value, and the response would be a success. So this module notes the changes whenever
the flush has waited, and marks the objects as changed once more when the flush has ended. The next flush writes them,
at the latest the flush of the commit.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import InstanceState, LoaderCallableStatus, Session
from sqlalchemy.orm.attributes import flag_dirty

from ctxdb_core._sqlalchemy.private import changed_states, pending_states, set_warning_of_changes

__all__ = ["ConcurrentChanges"]

_NO_VALUE = LoaderCallableStatus.NO_VALUE

MOST_WATCHED = 1000
"""How many objects a flush may write for changes of these objects to be noted.

A flush waits once for each thousand rows: a look at all of its objects each time would take time that grows with the
square of their number. A larger flush notes only the changes of objects that it does not write.
"""

Changes = dict[InstanceState[Any], dict[str, Any]]
"""For each object, the attributes that were changed, with their values from before."""


class ConcurrentChanges:
    """The changes that other tasks make while `session` flushes."""

    __slots__ = ("_changed", "_clean", "_session", "_warns", "_watched", "_were_changed")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._changed: Changes = {}
        self._clean: set[InstanceState[Any]] = set()
        """The changed objects that the flush does not write."""

    def begin_waiting(self) -> None:
        """Note the state of the objects, as other tasks are about to run."""
        session = self._session
        self._were_changed = changed_states(session).copy()
        watched = [*self._were_changed, *pending_states(session), *self._clean]
        self._watched = (
            [(state, state.dict.copy(), state.committed_state.copy()) for state in watched]
            if len(watched) <= MOST_WATCHED
            else ()
        )
        # An object that another task adds is written by the next flush: SQLAlchemy has nothing to warn of.
        self._warns = set_warning_of_changes(session, enabled=False)

    def end_waiting(self) -> None:
        """Note the changes, as the flush goes on."""
        set_warning_of_changes(self._session, enabled=self._warns)
        changed_now = changed_states(self._session)
        if len(changed_now) != len(self._were_changed):
            for state in changed_now - self._were_changed:
                self._note(state, state.committed_state)
                # SQLAlchemy would warn at the end of the flush that the change of such an object is lost.
                changed_now.discard(state)
                self._clean.add(state)
        for state, values, were_changed in self._watched:
            now, originals = state.dict, state.committed_state
            if len(originals) != len(were_changed):
                # New originals tell of first changes, and of collections that were changed in place.
                self._note(state, {name: value for name, value in originals.items() if name not in were_changed})
            if not _are_equal(now, values):
                before = {name: value for name, value in values.items() if now.get(name, _NO_VALUE) is not value}
                self._note(state, {name: value for name, value in before.items() if name in were_changed})
        del self._watched, self._were_changed

    def mark(self) -> None:
        """Mark the objects as changed, now that the flush has ended well."""
        self.leave()
        for state, before in self._changed.items():
            instance = state.obj()
            if instance is not None and state.persistent:
                for name, value in before.items():
                    # For an attribute that has been expired, the database has the value that counts.
                    if name not in state.expired_attributes:
                        state.committed_state.setdefault(name, value)
                flag_dirty(instance)
                changed_states(self._session).add(state)

    def leave(self) -> None:
        """Put back the changes that were hidden from SQLAlchemy. A failed flush rolls back and expires its objects."""
        changed_states(self._session).update(state for state in self._clean if state.modified)

    def _note(self, state: InstanceState[Any], before: dict[str, Any]) -> None:
        if before:
            # The oldest note has the value that the flush has seen.
            self._changed[state] = {**before, **self._changed.get(state, {})}


def _are_equal(now: dict[str, Any], before: dict[str, Any]) -> bool:
    try:
        return now == before
    except Exception:  # noqa: BLE001 - values of the user's, which may not tell whether they are equal
        return False
