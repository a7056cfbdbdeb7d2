"""`UnitSettings`: what a unit of work is told when it is opened, by an adapter for instance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.reading import ReadsFrom

__all__ = ["NO_SETTINGS", "UnitSettings", "changing"]


@dataclass(frozen=True, slots=True)
class UnitSettings:
    """The settings of units of work. They never change, so that all requests of a middleware can have the same object.

    A unit whose settings are to be others, as `set_statement_timeout` asks for, gets another object.

    Args:
        before_commit: awaited with each session that is about to be committed.
        statement_timeout: how long statements may take, and when the last of them has to be done; ``None`` without a
            limit.
        reads_from: maps a database to the one whose sessions a unit has in its place; ``None`` to replace none.
    """

    before_commit: BeforeCommit | None = None
    statement_timeout: StatementTimeout | None = None
    reads_from: ReadsFrom | None = None


NO_SETTINGS = UnitSettings()


def changing(**changes: Any) -> Callable[[Any], Any]:
    """Return a function that returns the settings which it is given, with `changes`.

    All units with the same settings get the same object, so that an adapter can change something for each of its
    requests without making an object for each.
    """
    known: tuple[UnitSettings | None, UnitSettings] = (None, NO_SETTINGS)

    def change(settings: UnitSettings) -> UnitSettings:
        nonlocal known
        # One assignment, as event loops of several threads may use the same adapter.
        given, changed = known
        if given is not settings:
            changed = replace(settings, **changes)
            known = (settings, changed)
        return changed

    return change
