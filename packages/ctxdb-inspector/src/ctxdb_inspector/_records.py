"""The inspector's records of a unit of work, and of a connection that was taken."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from time import perf_counter
from types import CodeType
from typing import Any, Protocol

from sqlalchemy.exc import StatementError

from ctxdb_core.adapters import CodePlace, Headers, UnitOfWork

__all__ = ["HEADER", "LONGEST_REQUEST", "LONGEST_STATEMENT", "HoldRecord", "UnitRecord", "describe"]

HEADER = "x-ctxdb-unit"
"""The header field of a response that tells the id of the unit of work, if that has taken a connection."""

_HEADER = HEADER.encode()

LONGEST_STATEMENT = 2000
"""How many characters of a statement are kept."""
LONGEST_REQUEST = 300
"""How many characters of a request's method and path are kept."""
_LONGEST_ERROR = 200
_MOST_HOLDS = 40
_KEPT_HOLDS = 20


class HeldPool(Protocol):
    """The pool that a connection was taken from."""

    name: str
    held: dict[Any, HoldRecord]
    """What is known of each connection that is in use."""


# Records are made without arguments, and what makes one sets the attributes that it knows: most of the others are set
# later, if at all, and a constructor of Python's would be called for each connection that the application takes.


class HoldRecord:
    """A connection that was taken from its pool."""

    pool: HeldPool
    place: tuple[CodeType | None, int]
    """The instruction that has taken it, as a `CodePlace` has it."""
    taken: float
    statements: int
    settled: int
    """How many statements there had been at the last commit or roll-back."""
    statement: str | None = None
    """The last statement: its text, without parameters."""
    running_since: float | None = None
    """Since when the statement is running; ``None`` between statements."""
    commit_at: float | None = None
    """When the last commit or roll-back began."""
    outcome: str | None = None
    """How the last transaction has ended, in a word or two; "committing" while COMMIT is under way."""
    error: str | None = None
    returned: float | None = None
    unit: UnitRecord | None = None
    """The unit of work whose code has taken the connection, until it is given back."""

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
        filename, line, function = CodePlace(*self.place).describe()
        return {
            "pool": self.pool.name,
            "taken": wall(self.taken),
            "returned": wall(self.returned),
            "where": f"{filename}:{line}",
            "function": function,
            "statements": self.statements,
            "statement": self.statement,
            "running_since": wall(self.running_since),
            "commit_at": wall(self.commit_at),
            "outcome": self.result,
            "error": self.error,
            # The unit of work has ended, or was thrown away, and the connection is still out.
            "leaked": self.returned is None and unit is not None and unit.is_over,
            "streamed": unit is not None and unit.responded is not None and self.taken > unit.responded,
        }


class UnitOwner(Protocol):
    """What keeps the records."""

    live: set[UnitRecord]
    """Those of units that are at work."""
    ended: deque[UnitRecord]
    """The last ones of those that have ended."""


def _no_unit() -> None:
    """Return the unit of a record whose unit has ended."""


class ForgottenHolds:
    """The sum of the connections that a unit of work has given back, and of which no record is kept."""

    __slots__ = ("count", "error", "results", "seconds")

    def __init__(self) -> None:
        self.count: int = 0
        self.seconds: float = 0.0
        """How long the unit has held them, all together."""
        self.results: set[str | None] = set()
        self.error: str | None = None
        """The error of the first commit that has failed."""

    def add(self, hold: HoldRecord) -> None:
        """Add a connection that was given back."""
        self.count += 1
        self.seconds += (hold.returned or hold.taken) - hold.taken
        self.results.add(hold.result)
        if hold.result == "commit failed":
            self.error = self.error or hold.error


class UnitRecord:
    """A unit of work that has taken a connection: a `UnitWatcher` of `ctxdb_core`."""

    unit: Callable[[], UnitOfWork | None]
    """Leads to the unit until it ends or is thrown away."""
    owner: UnitOwner
    id: str
    request: str | None
    started: float
    holds: tuple[HoldRecord, ...]
    """The connections that it has taken; the last ones, if they are very many."""
    forgotten: ForgottenHolds | None = None
    """The connections that it had taken and given back before those in `holds`, if there are any."""
    responded: float | None = None
    status: int | None = None
    ended: float | None = None
    error: str | None = None
    is_lost: bool = False
    """Whether the unit was thrown away, and nothing has ended it."""
    sequence: int = 0
    """The higher, the later the unit has ended; 0 until it is first shown after its end."""

    def add(self, hold: HoldRecord) -> None:
        """Note that the unit has taken another connection."""
        self.holds += (hold,)
        if len(self.holds) > _MOST_HOLDS:
            self._forget()

    def _forget(self) -> None:
        """Keep the sum of what is long over: a job may make a transaction each second, for days."""
        older, newer = self.holds[:-_KEPT_HOLDS], self.holds[-_KEPT_HOLDS:]
        self.forgotten = self.forgotten or ForgottenHolds()
        for hold in older:
            if hold.returned is not None:
                self.forgotten.add(hold)
        self.holds = (*(hold for hold in older if hold.returned is None), *newer)

    def response_starts(self, status: int) -> Headers:
        """Note the status, and have the response tell the id."""
        self.status = status
        self.responded = perf_counter()
        return ((_HEADER, self.id.encode()),)

    def unit_ends(self, error: BaseException | None) -> None:
        """Note the end."""
        self.ended = perf_counter()
        # What is kept of many units is little: each has left the processor's caches when it makes room for another one.
        self.unit = _no_unit
        if error is not None:
            self.error = describe(error)
        owner = self.owner
        owner.live.discard(self)
        owner.ended.append(self)

    def note_if_lost(self) -> None:
        """Note it if the unit was thrown away."""
        if self.ended is None and self.unit() is None:
            self.is_lost = True
            self.unit_ends(None)

    @property
    def is_over(self) -> bool:
        """Whether the unit has ended, or was thrown away."""
        return self.ended is not None or self.unit() is None

    @property
    def outcome(self) -> str:
        """How it ended: in one word or two, the worst of what its transactions have come to."""
        if self.is_lost:
            return "never ended"
        outcomes = {hold.result for hold in self.holds}
        if self.forgotten is not None:
            outcomes |= self.forgotten.results
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
        holds = list(self.holds)
        forgotten = self.forgotten or ForgottenHolds()
        commit_errors = [hold.error for hold in holds if hold.result == "commit failed"]
        commit_error = forgotten.error or next(iter(commit_errors), None)
        return {
            "id": self.id,
            # The code that took the first connection names a unit outside of requests.
            "request": self.request or (CodePlace(*holds[0].place).describe()[2] if holds else "a unit of work"),
            "is_request": self.request is not None,
            "started": wall(self.started),
            "ended": wall(self.ended),
            "responded": wall(self.responded),
            "status": self.status,
            "outcome": self.outcome,
            "error": commit_error or self.error,
            "forgotten": forgotten.count,
            "forgotten_for": round(forgotten.seconds, 6),
            "holds": [hold.as_json(self, wall) for hold in holds],
        }


# What PostgreSQL says under these classes of SQLSTATE (documentation, appendix A) names constraints, tables and
# columns, and the text of the statement, but none of its parameters.
_WITHOUT_VALUES = {"08", "0A", "23", "25", "28", "2D", "40", "42", "53", "55", "57", "58"}

# SQLAlchemy's errors of asyncpg begin so.
_CLASS = re.compile(r"<class '[\w.]+'>: ")


def describe(error: BaseException) -> str:
    """Return the class and the first line of an error, without the parameters of a statement.

    Neither what SQLAlchemy adds is shown, nor PostgreSQL's ``DETAIL``. Where the first line may name a value, as in
    "invalid input syntax for type integer: ..." or "Duplicate entry ...", it ends before that.
    """
    cause = error
    if isinstance(error, StatementError) and error.orig is not None:
        cause = error.orig
    lines = str(cause).strip().splitlines()
    text = _CLASS.sub("", lines[0]) if lines else ""
    if cause is not error:
        sqlstate = getattr(cause, "sqlstate", None)
        if not (isinstance(sqlstate, str) and sqlstate[:2] in _WITHOUT_VALUES):
            text = re.split(r"['\":(]", text, maxsplit=1)[0].strip()
    return f"{type(error).__name__}: {text}"[:_LONGEST_ERROR]
