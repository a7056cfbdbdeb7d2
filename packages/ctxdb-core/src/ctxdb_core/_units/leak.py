"""`LeakGuard`: says so when sessions are thrown away instead of being ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection

__all__ = ["UNIT_LEAKED", "LeakGuard"]


UNIT_LEAKED = (
    "A unit of work was garbage-collected with an open session on {}: nobody has committed or rolled back its work. "
    "Let `async with new_db_ctx():` end it, or `finalize()` for each `begin()`."
)


class LeakGuard:
    """Warns when it is garbage-collected while there are `sessions`: to be kept by nothing but their owner.

    A unit of work makes one for its first session, and has no ``__del__`` itself: a request without database use shall
    not pay for this. As the source of the warning, the guard lets tracemalloc tell where that session was opened.

    Args:
        sessions: the databases that there are sessions on. The guard warns if it is not empty.
        message: the warning, with ``{}`` for the names of these databases.
    """

    __slots__ = ("__weakref__", "_message", "_sessions")

    def __init__(self, sessions: Collection[object], message: str) -> None:
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
