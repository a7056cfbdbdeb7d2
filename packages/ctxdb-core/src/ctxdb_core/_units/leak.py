"""`LeakGuard`: says so when the sessions of a unit of work are thrown away instead of being ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctxdb_core._databases.connect import DBConnect

__all__ = ["LeakGuard"]


_OF_UNITS = (
    "A unit of work was garbage-collected with an open session on {}: nobody has committed or rolled back its work. "
    "Let `async with new_db_ctx():` end it, or `finalize()` for each `begin()`."
)


class LeakGuard:
    """Warns when it is garbage-collected while there are `sessions`: to be kept by nothing but their unit of work.

    It is made for the first session, and the unit has no ``__del__``: a request without database use shall not pay for
    this. As the source of the warning, it lets tracemalloc tell where that session was opened.
    """

    __slots__ = ("__weakref__", "_message", "_sessions")

    def __init__(self, sessions: Collection[DBConnect], message: str = _OF_UNITS) -> None:
        self._sessions = sessions
        self._message = message

    def disarm(self) -> None:
        """Keep quiet from now on: the sessions were ended."""
        self._sessions = ()

    # Bound now: when the interpreter ends, modules may have lost their names.
    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if self._sessions:
            names = ", ".join(map(repr, self._sessions))
            # The warning keeps this guard as its source; it must not keep the sessions alive, too.
            self.disarm()
            _warn(self._message.format(names), ResourceWarning, source=self)
