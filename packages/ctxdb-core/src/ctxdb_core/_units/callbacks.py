"""Callbacks that wait for a commit, each with the savepoint that it would go with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.orm import SessionTransaction

__all__ = ["WaitingCallback", "drop_undone", "hand_up"]


@dataclass(slots=True)
class WaitingCallback:
    """A callback, and the innermost savepoint that was open when it was registered; ``None`` outside of any."""

    callback: Callable[[], object]
    savepoint: SessionTransaction | None


def hand_up(waiting: list[WaitingCallback], savepoint: SessionTransaction) -> None:
    """Let the callbacks of a savepoint that was released go with what is around it."""
    around = savepoint.parent
    # A flush has a transaction of its own, which is none of the database's.
    while around is not None and not around.nested:
        around = around.parent
    for each in waiting:
        if each.savepoint is savepoint:
            each.savepoint = around


def drop_undone(waiting: list[WaitingCallback], savepoint: SessionTransaction) -> None:
    """Forget the callbacks of a savepoint that has ended; those of a released one have been handed up before."""
    waiting[:] = [each for each in waiting if each.savepoint is not savepoint]
