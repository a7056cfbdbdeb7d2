"""`UnitFollower`: puts together, for each unit of work, what the events of its transactions tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, Literal, TypeAlias

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._units.unit import UnitOfWork, running_unit
from ctxdb_core._units.watcher import Headers
from ctxdb_core.errors import ArgumentTypeError
from ctxdb_core.events import DBEvent, TransactionBegun, TransactionCommitted, TransactionRolledBack

__all__ = ["FollowedTransaction", "FollowedUnit", "Outcome", "UnitFollower", "check_databases"]

Outcome: TypeAlias = Literal["committed", "rolled_back", "commit_failed"]
"""How a transaction has ended. A unit of work has the worst outcome of its transactions."""

_WORST_FIRST: tuple[Outcome, ...] = ("commit_failed", "rolled_back", "committed")


def check_databases(dbs: Iterable[DBConnect]) -> tuple[DBConnect, ...]:
    """Return the databases to follow.

    Raises:
        ArgumentTypeError: there is no database, or one of them is no `DBConnect`.
    """
    found = tuple(dbs)
    if not found:
        raise ArgumentTypeError("Name the databases to follow, each a `DBConnect`.")
    for db in found:
        if not isinstance(db, DBConnect):
            raise ArgumentTypeError(f"A `DBConnect` is needed here, and {type(db).__name__} is given.")
    return found


class FollowedTransaction:
    """A transaction that is under way, or has just ended."""

    __slots__ = ("duration", "error", "held", "host", "outcome", "state", "unit")

    def __init__(self, event: TransactionBegun, unit: FollowedUnit | None) -> None:
        self.host = event.host
        self.unit = unit
        """The unit of work whose code has begun it; ``None`` outside of any."""
        self.state: Any = None
        """The follower's own."""
        # Set at its end.
        self.outcome: Outcome
        self.duration: float
        """Seconds until the database had ended it."""
        self.held: float
        """Seconds until its connection was given back."""
        self.error: BaseException | None = None


class FollowedUnit:
    """A unit of work that has begun a transaction: a `UnitWatcher`."""

    __slots__ = (
        "_on_end",
        "error",
        "held",
        "id",
        "outcome",
        "request",
        "started",
        "state",
        "status",
        "transactions",
    )

    def __init__(self, unit: UnitOfWork, on_end: Callable[[FollowedUnit], object]) -> None:
        self._on_end = on_end
        self.id = unit.id
        self.request = unit.request
        """Method and path, without the query; ``None`` outside of requests."""
        self.started: float = unit.opened or perf_counter()
        """When it opened its first session, by `time.perf_counter`."""
        self.transactions = 0
        self.held = 0.0
        """Seconds for which its transactions have held connections, all of them together."""
        self.outcome: Outcome | None = None
        """``None`` until the first of its transactions has ended."""
        self.status: int | None = None
        """The status of the response, where an ASGI adapter tells it."""
        self.error: BaseException | None = None
        self.state: Any = None
        """The follower's own."""

    def response_starts(self, status: int) -> Headers:
        """Note the status."""
        self.status = status
        return ()

    def unit_ends(self, error: BaseException | None) -> None:
        """Tell the follower."""
        self.error = error
        self._on_end(self)
        # The traceback refers to the failed code, and that to the unit: kept, they would be a reference cycle.
        self.error = None

    def add(self, transaction: FollowedTransaction) -> None:
        """Count a transaction that has ended."""
        self.transactions += 1
        self.held += transaction.held
        self.outcome = next(each for each in _WORST_FIRST if each in (self.outcome, transaction.outcome))


class UnitFollower:
    """Follows the transactions of databases, and the units of work that they belong to.

    A subclass overrides the four methods that are told what happens; they are called in the task that causes it, and
    must not wait for anything.

    Raises:
        ArgumentTypeError: there is no database, or one is no `DBConnect`.
    """

    def __init__(self, dbs: Iterable[DBConnect]) -> None:
        # The keys are the ids of sessions, each of which has one transaction at a time.
        self._under_way: dict[int, FollowedTransaction] = {}
        self._stops = [db.on_event(self._hear) for db in check_databases(dbs)]

    def stop(self) -> None:
        """Follow nothing more, from the next event on."""
        for stop in self._stops:
            stop()

    def unit_begins(self, unit: FollowedUnit) -> None:
        """Be told of the first transaction of a unit, before `transaction_begins`."""

    def transaction_begins(self, transaction: FollowedTransaction, event: TransactionBegun) -> None:
        """Be told that a transaction has taken its connection."""

    def transaction_ends(self, transaction: FollowedTransaction) -> None:
        """Be told that a transaction has ended, and that its connection was given back."""

    def unit_ends(self, unit: FollowedUnit) -> None:
        """Be told that a unit has ended which has had transactions."""

    def _hear(self, event: DBEvent) -> None:
        match event:
            case TransactionBegun():
                unit = running_unit()
                transaction = FollowedTransaction(event, None if unit is None else self._follow_unit(unit))
                self._under_way[event.session_id] = transaction
                self.transaction_begins(transaction, event)
            case TransactionCommitted():
                self._end(event, "committed", None)
            case TransactionRolledBack():
                self._end(event, "commit_failed" if event.commit_failed else "rolled_back", event.error)

    def _follow_unit(self, unit: UnitOfWork) -> FollowedUnit:
        known = unit.watchers.get(self)
        if isinstance(known, FollowedUnit):
            return known
        followed = FollowedUnit(unit, self.unit_ends)
        unit.watch(followed, owner=self)
        self.unit_begins(followed)
        return followed

    def _end(
        self, event: TransactionCommitted | TransactionRolledBack, outcome: Outcome, error: BaseException | None
    ) -> None:
        transaction = self._under_way.pop(event.session_id, None)
        if transaction is None:
            # The transaction had begun before this follower listened.
            return
        transaction.outcome = outcome
        transaction.duration = event.duration
        transaction.held = event.connection_held
        transaction.error = error
        if transaction.unit is not None:
            transaction.unit.add(transaction)
        self.transaction_ends(transaction)
        transaction.error = None
