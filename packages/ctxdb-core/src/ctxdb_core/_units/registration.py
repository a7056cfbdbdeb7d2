"""`Registration`: a unit of work that has opened a session, as far as the process has to know of it."""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.status import open_units
from ctxdb_core._units.leak import UNIT_LEAKED, LeakGuard

__all__ = ["Registration"]


class Registration(LeakGuard):
    """Says that a unit of work has opened a session and has not ended: to `DBConnect.status`, and where it leaks.

    It is made for the first session of a unit, and kept by nothing but the unit.

    Args:
        unit: the unit of work, an `OpenUnit`.
        sessions: its open sessions, as they are at any time.
    """

    __slots__ = ("_reference", "closing", "opened")

    def __init__(self, unit: object, sessions: Collection[object]) -> None:
        # As `LeakGuard.__init__`, without the call: each request that uses a database makes one of these.
        self._sessions, self._message = sessions, UNIT_LEAKED
        self.opened: float = perf_counter()
        """When the unit opened its first session, by `time.perf_counter`."""
        self.closing: tuple[AsyncSession, ...] = ()
        """The sessions that `close_session` has not closed yet: it may have to wait for a statement of another task."""
        self._reference = reference = ref(unit, open_units.discard)
        open_units.add(reference)

    def end(self) -> None:
        """Note that the unit has ended, and with it its sessions."""
        self.disarm()
        open_units.discard(self._reference)
