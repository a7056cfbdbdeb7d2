"""`Registration`: what the rest of the process knows of a unit of work: its id, its watchers, that it is open."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from time import perf_counter
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.status import open_units
from ctxdb_core._units.leak import UNIT_LEAKED, LeakGuard
from ctxdb_core._units.watcher import UnitWatcher

__all__ = ["NO_WATCHERS", "Registration"]

NO_WATCHERS: Mapping[object, UnitWatcher] = {}
"""The watchers of a unit of work that has none."""


class Registration(LeakGuard):
    """Knows the id and the watchers of a unit of work; and tells `DBConnect.status` that the unit has open sessions.

    A unit makes it for its first session, watcher or id, whichever comes first. Nothing but the unit keeps it: if it is
    garbage-collected with open sessions, the unit has leaked.
    """

    __slots__ = ("_reference", "closing", "id", "opened", "watchers")

    _reference: ref[object]

    def __init__(self) -> None:
        # As `LeakGuard.__init__`, without the call: each request that uses a database makes one of these.
        self._sessions, self._message = (), UNIT_LEAKED
        self.id: str | None = None
        """What tells the unit from all others; ``None`` as long as nothing has asked for it."""
        self.watchers: Mapping[object, UnitWatcher] = NO_WATCHERS
        """What is told of the response and of the end of the unit. The keys are the objects that have set it up."""
        self.opened: float | None = None
        """When the unit opened its first session, by `time.perf_counter`; ``None`` before that."""
        self.closing: tuple[AsyncSession, ...] = ()
        """The sessions that `close_session` has not closed yet: it may have to wait for a statement of another task."""

    def begin(self, unit: object, sessions: Collection[object]) -> None:
        """Note that a unit of work opens its first session; `sessions` are its open ones, as they are at any time."""
        self.opened = perf_counter()
        self._sessions = sessions
        self._reference = reference = ref(unit, open_units.discard)
        open_units.add(reference)

    def end(self) -> None:
        """Note that the unit has ended, and with it its sessions."""
        if self.opened is not None:
            self._sessions = ()
            open_units.discard(self._reference)
