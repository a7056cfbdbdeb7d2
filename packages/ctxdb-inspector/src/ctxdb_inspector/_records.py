"""The inspector's records of a unit of work, and of a connection that was taken."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any
from weakref import ref

from sqlalchemy.exc import DBAPIError

from ctxdb_core.adapters import Headers, Place, UnitOfWork
from ctxdb_inspector._pool_track import PoolTrack

__all__ = ["HEADER", "HoldRecord", "UnitRecord", "describe"]

HEADER = "x-ctxdb-unit"
"""The header field of a response that tells the id of the unit of work, if that has taken a connection."""

_HEADER = HEADER.encode()

_LONGEST_STATEMENT = 2000
_LONGEST_ERROR = 200


class HoldRecord:
    """A connection that was taken from its pool."""

    # Defaults are the class's: one of these is made for each connection that the application takes.
    returned: float | None = None
    statements = 0
    statement: str | None = None
    """The last statement: its text, without parameters."""
    running_since: float | None = None
    """Since when the statement is running; ``None`` between statements."""
    commit_at: float | None = None
    """When the last commit or roll-back began."""
    has_begun = False
    """Whether a statement was made since the last commit or roll-back."""
    outcome: str | None = None
    """How the last transaction has ended, in a word or two; "committing" while COMMIT is under way."""
    error: str | None = None

    def __init__(self, pool: PoolTrack, place: Place, taken: float) -> None:
        self.pool = pool
        self.place = place
        self.taken = taken

    @property
    def result(self) -> str | None:
        """The outcome as the page shows it: a connection that is lost in the middle of COMMIT tells nothing more."""
        if self.outcome != "committing":
            return self.outcome
        return None if self.returned is None else "commit failed"

    def as_json(self, unit: UnitRecord | None, wall: Callable[[float | None], float | None]) -> dict[str, Any]:
        """Return what the page shows.

        Args:
            unit: the unit of work whose code has taken the connection.
            wall: makes times of the clock on the wall of those of `perf_counter`.
        """
        filename, line, function = self.place.describe()
        return {
            "pool": self.pool.name,
            "taken": wall(self.taken),
            "returned": wall(self.returned),
            "where": f"{filename}:{line}",
            "function": function,
            "statements": self.statements,
            "statement": None if self.statement is None else self.statement[:_LONGEST_STATEMENT],
            "running_since": wall(self.running_since),
            "commit_at": wall(self.commit_at),
            "outcome": self.result,
            "error": self.error,
            # The unit of work has ended, or was thrown away, and the connection is still out.
            "leaked": self.returned is None and unit is not None and unit.is_over,
            "streamed": unit is not None and unit.responded is not None and self.taken > unit.responded,
        }


class UnitRecord:
    """A unit of work that has taken a connection: a `UnitWatcher` of `ctxdb_core`."""

    # Defaults are the class's, as for `HoldRecord`.
    ended: float | None = None
    responded: float | None = None
    status: int | None = None
    error: str | None = None
    sequence = 0
    """The higher, the later the unit has ended; 0 while it is at work."""

    def __init__(self, unit: UnitOfWork, owner: object, on_end: Callable[[UnitRecord], object]) -> None:
        self._unit = ref(unit)
        self._on_end = on_end
        self.owner = owner
        """The recorder: several may watch one unit."""
        self.id = unit.id
        self.request = unit.request
        self.started: float = unit.opened or perf_counter()
        self.holds: list[HoldRecord] = []

    def response_starts(self, status: int) -> Headers:
        """Note the status, and have the response tell the id."""
        self.status = status
        self.responded = perf_counter()
        return ((_HEADER, self.id.encode()),)

    def unit_ends(self, error: BaseException | None) -> None:
        """Note the end."""
        self.ended = perf_counter()
        if error is not None:
            self.error = describe(error)
        self._on_end(self)

    @property
    def is_lost(self) -> bool:
        """Whether the unit was thrown away, and nothing has ended it."""
        return self.ended is None and self._unit() is None

    @property
    def is_over(self) -> bool:
        """Whether the unit has ended, or was thrown away."""
        return self.ended is not None or self.is_lost

    @property
    def outcome(self) -> str:
        """How it ended: in one word or two, the worst of what its transactions have come to."""
        if self.is_lost:
            return "never ended"
        outcomes = {hold.result for hold in self.holds}
        for outcome in ("commit failed", "rolled back"):
            if outcome in outcomes:
                return outcome
        if self.ended is None:
            return "at work"
        if self.error is not None:
            return "rolled back"
        return "committed" if "committed" in outcomes else "ended"

    def as_json(self, wall: Callable[[float | None], float | None]) -> dict[str, Any]:
        """Return what the page shows; `wall` as for `HoldRecord`."""
        commit_errors = [hold.error for hold in self.holds if hold.result == "commit failed"]
        return {
            "id": self.id,
            # The code that took the first connection names a unit outside of requests.
            "request": self.request or (self.holds[0].place.describe()[2] if self.holds else "a unit of work"),
            "is_request": self.request is not None,
            "started": wall(self.started),
            "ended": wall(self.ended),
            "responded": wall(self.responded),
            "status": self.status,
            "outcome": self.outcome,
            "error": commit_errors[0] if commit_errors else self.error,
            "holds": [hold.as_json(self, wall) for hold in self.holds],
        }


def describe(error: BaseException) -> str:
    """Return the class and the first line of an error, without what SQLAlchemy adds: the parameters of the statement.

    The lines that follow are left out, as PostgreSQL's ``DETAIL`` shows values.
    """
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:_LONGEST_ERROR]
