"""What do the adapters cost in each framework, against the bare framework and against hand-written code?"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import ClassVar

from benchmarks.measure import Figure, differences, ratios, take_turns
from benchmarks.pairs import NO_DATABASE, Pair, open_pairs
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table

_WITHOUT = "without"
_CTXDB = "ctxdb"
_AIM = Aim(0.90)


class Frameworks(Question):
    """An idle request, a SELECT and an INSERT in each framework."""

    name: ClassVar[str] = "frameworks"

    async def answer(self) -> list[Table]:
        """Measure, and return a table for each kind of request."""
        async with open_pairs(self.settings.url) as pairs:
            with_framework = [pair for pair in pairs if pair.framework]
            return [await self._compare(list(group)) for _, group in groupby(with_framework, attrgetter("work"))]

    async def _compare(self, pairs: list[Pair]) -> Table:
        work = pairs[0].work
        is_idle = work == NO_DATABASE
        rounds = self.settings.rounds_of(200, 60) if is_idle else self.settings.rounds_of(120, 20)
        rows = []
        for pair in pairs:
            blocks = {_WITHOUT: pair.without, _CTXDB: pair.by_ctxdb}
            samples = await take_turns(blocks, rounds, pair.name)
            without, by_ctxdb = (Figure.of(samples[name]).median * 1e6 for name in blocks)
            if is_idle:
                added = differences(samples, _CTXDB, _WITHOUT).scaled(1e6)
                rows += [Row(f"{pair.framework}, bare", without), Row(f"{pair.framework}, ctxdb", by_ctxdb, added)]
            else:
                share = ratios(samples, _CTXDB, _WITHOUT)
                rows.append(Row(f"{pair.framework}, hand-written", without))
                rows.append(Row(f"{pair.framework}, ctxdb", by_ctxdb, share, _AIM))
        if is_idle:
            title = "A request that uses no database: microseconds of CPU that the adapter adds"
            return Table(title, "µs of CPU", "added", rows, absolute_digits=2, figure_digits=2)
        return Table(f"A request with {work}: CPU as a share of the hand-written handler's", "µs of CPU", "share", rows)
