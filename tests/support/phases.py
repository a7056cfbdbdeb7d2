"""The table of phases, as the tests of an adapter show it: each row that a request can pass has a test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

import pytest

from ctxdb_core.adapters import TRANSITIONS, Phase, check_transition

Test = Callable[..., Awaitable[None]]
Transition = tuple[Phase, Phase]


class ShownTransitions:
    """Marks the tests of the rows of the table, and knows the rows without one.

    Args:
        skipped: the phases that no request of the adapter enters.
        not_taken: rows between phases that it does enter, which none passes.
    """

    def __init__(self, *, skipped: Collection[Phase] = (), not_taken: Collection[Transition] = ()) -> None:
        self._skipped = skipped
        self._not_taken = not_taken
        self._shown: set[Transition] = set()

    def __call__(self, current: Phase, following: Phase) -> Callable[[Test], Test]:
        """Mark the test of one row."""

        def mark(test: Test) -> Test:
            self._shown.add((current, following))
            return test

        return mark

    def assert_complete(self) -> None:
        """Check that each row that a request can pass has a test, and no other row."""
        reachable = {
            (current, following)
            for current in Phase
            for following in TRANSITIONS[current]
            if current not in self._skipped
            and following not in self._skipped
            and (current, following) not in self._not_taken
        }
        assert self._shown == reachable


def noted_transitions(monkeypatch: pytest.MonkeyPatch, check: str) -> list[Transition]:
    """Return a list that gets each transition from now on, in their order.

    Args:
        monkeypatch: puts the adapter's function back when the test is over.
        check: the dotted name by which the adapter calls `check_transition`.
    """
    seen: list[Transition] = []

    def note(current: Phase, following: Phase) -> None:
        check_transition(current, following)
        seen.append((current, following))

    monkeypatch.setattr(check, note)
    return seen
