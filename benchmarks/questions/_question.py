"""`Question`: what all questions have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.contenders import Contender, MissingContenderError, load
from benchmarks.report import Table


@dataclass(frozen=True)
class Settings:
    """How a run is to be done.

    Args:
        url: the database.
        rounds: how often each contender has its turn; ``None`` for the question's own number.
        quick: whether to take less time, for figures that are less exact.
    """

    url: str
    rounds: int | None = None
    quick: bool = False

    def rounds_of(self, usual: int, quick: int) -> int:
        """Return how many rounds to do."""
        return self.rounds or (quick if self.quick else usual)


class Question:
    """Something that is measured."""

    name: ClassVar[str]
    """What ``--only`` calls it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    async def answer(self) -> list[Table]:
        """Measure, and return the tables."""
        raise NotImplementedError


def load_all(names: tuple[str, ...]) -> tuple[dict[str, type[Contender]], list[str]]:
    """Return the contenders that can be had here, by name, and a line for each of the others."""
    found: dict[str, type[Contender]] = {}
    missing: list[str] = []
    for name in names:
        try:
            found[name] = load(name)
        except MissingContenderError as exc:
            missing.append(str(exc))
    return found, missing
