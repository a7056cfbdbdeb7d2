"""What do the adapters cost in each framework, against the bare framework and against hand-written code?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from benchmarks.apart import Apart, run_apart
from benchmarks.frameworks import FRAMEWORKS
from benchmarks.measure import Figure, differences, measure_in_turns, ratios, take_turns
from benchmarks.pairs import WORKS, open_idle, open_side
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table

_AIM = Aim(0.90)


class Frameworks(Question):
    """An idle request, a SELECT and an INSERT in each framework."""

    name: ClassVar[str] = "frameworks"

    async def answer(self) -> list[Table]:
        """Measure, and return a table for each kind of request."""
        openers = {
            _side(framework.name, adapter=adapter): partial(
                open_side, self.settings.url, framework.name, adapter=adapter
            )
            for framework in FRAMEWORKS
            for adapter in (False, True)
        }
        tables = [await self._compare_idle()]
        with run_apart(openers) as processes:
            tables += [await self._compare(work, processes) for work in WORKS]
        return tables

    async def _compare_idle(self) -> Table:
        # In one process: what an adapter adds is less than what one process differs from another.
        rows = []
        for framework in FRAMEWORKS:
            bare, by_ctxdb = f"{framework.name}, bare", f"{framework.name}, ctxdb"
            async with open_idle(framework, adapter=False) as without, open_idle(framework, adapter=True) as with_it:
                blocks = {bare: without, by_ctxdb: with_it}
                samples = await take_turns(blocks, self.settings.rounds_of(200, 60), f"{framework.name}, idle")
            added = differences(samples, by_ctxdb, bare).scaled(1e6)
            rows += [Row(bare, _microseconds(samples[bare])), Row(by_ctxdb, _microseconds(samples[by_ctxdb]), added)]
        title = "A request that uses no database: microseconds of CPU that the adapter adds"
        return Table(title, "µs of CPU", "added", rows, absolute_digits=2, figure_digits=2)

    async def _compare(self, work: str, processes: Mapping[str, Apart]) -> Table:
        rows = []
        for framework in FRAMEWORKS:
            by_hand, by_ctxdb = (_side(framework.name, adapter=adapter) for adapter in (False, True))
            measures = {name: partial(processes[name].measure, work) for name in (by_hand, by_ctxdb)}
            rounds = self.settings.rounds_of(120, 20)
            samples = await measure_in_turns(measures, rounds, f"{framework.name}, {work}")
            share = ratios(samples, by_ctxdb, by_hand)
            rows.append(Row(by_hand, _microseconds(samples[by_hand])))
            rows.append(Row(by_ctxdb, _microseconds(samples[by_ctxdb]), share, _AIM))
        return Table(f"A request with {work}: CPU as a share of the hand-written handler's", "µs of CPU", "share", rows)


def _side(framework: str, *, adapter: bool) -> str:
    return f"{framework}, {'ctxdb' if adapter else 'hand-written'}"


def _microseconds(seconds: Sequence[float]) -> float:
    return Figure.of(seconds).median * 1e6
