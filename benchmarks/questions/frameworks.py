"""What do the adapters of the other frameworks cost, each against its bare framework and against hand-written code?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import ClassVar

from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.database import create_engine, pool_of, read, write
from benchmarks.frameworks import FRAMEWORKS, Framework
from benchmarks.frameworks._framework import by_ctxdb, by_hand, do_nothing
from benchmarks.measure import Block, Figure, differences, ratios, take_turns
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table
from ctxdb_core import DBConnect

_AT_ONCE = 20
_IDLE_REQUESTS = 100
_IN_SEQUENCE = 20
_IN_A_CROWD = 40
_AIM = Aim(0.90)


class Frameworks(Question):
    """An idle request, a SELECT and an INSERT in each framework beside Starlette."""

    name: ClassVar[str] = "frameworks"

    async def answer(self) -> list[Table]:
        """Measure, and return the tables."""
        return [await self._idle(), *await self._requests()]

    async def _idle(self) -> Table:
        rows = []
        for framework in FRAMEWORKS:
            async with AsyncExitStack() as stack:
                blocks: dict[str, Block] = {}
                for name, adapter in (("bare", False), ("ctxdb", True)):
                    caller = await stack.enter_async_context(framework.run(do_nothing, adapter=adapter))
                    blocks[name] = partial(caller.sequence, _IDLE_REQUESTS)
                samples = await take_turns(blocks, self.settings.rounds_of(200, 60), f"{framework.name}, no database")
            microseconds = {name: Figure.of(values).scaled(1e6) for name, values in samples.items()}
            rows.append(Row(f"{framework.name}, bare", microseconds["bare"].median))
            added = differences(samples, "ctxdb", "bare").scaled(1e6)
            rows.append(Row(f"{framework.name}, ctxdb", microseconds["ctxdb"].median, added))
        return Table(
            "A request that uses no database: microseconds of CPU that the adapter adds",
            "µs of CPU",
            "added",
            rows,
            absolute_digits=2,
            figure_digits=2,
        )

    async def _requests(self) -> list[Table]:
        tables = []
        options = pool_of(_AT_ONCE)
        db = DBConnect.from_url(self.settings.url, **options)
        engine = create_engine(self.settings.url, options)
        session_maker = async_sessionmaker(engine, expire_on_commit=False)
        try:
            for statement, work in (("SELECT", read), ("INSERT", write)):
                handles = {"hand-written": (by_hand(session_maker, work), False), "ctxdb": (by_ctxdb(db, work), True)}
                found: dict[str, list[Row]] = {"in sequence": [], f"{_AT_ONCE} at once": []}
                for framework in FRAMEWORKS:
                    async with AsyncExitStack() as stack:
                        callers = {
                            name: await stack.enter_async_context(framework.run(handle, adapter=adapter))
                            for name, (handle, adapter) in handles.items()
                        }
                        for caller in callers.values():
                            for _ in range(3):
                                await caller.crowd(_IN_A_CROWD, _AT_ONCE)
                        one = {name: partial(caller.sequence, _IN_SEQUENCE) for name, caller in callers.items()}
                        many = {name: partial(caller.crowd, _IN_A_CROWD, _AT_ONCE) for name, caller in callers.items()}
                        for how, blocks in zip(found, (one, many), strict=True):
                            found[how] += await self._compare(framework, f"{statement} requests {how}", blocks)
                for how, rows in found.items():
                    title = f"A request with one {statement}, {how}: CPU as a share of the hand-written handler's"
                    tables.append(Table(title, "µs of CPU", "share", rows))
        finally:
            await db.close()
            await engine.dispose()
        return tables

    async def _compare(self, framework: Framework, label: str, blocks: Mapping[str, Block]) -> list[Row]:
        samples = await take_turns(blocks, self.settings.rounds_of(120, 20), f"{framework.name}, {label}")
        microseconds = {name: Figure.of(values).scaled(1e6).median for name, values in samples.items()}
        share = ratios(samples, "ctxdb", "hand-written")
        return [
            Row(f"{framework.name}, hand-written", microseconds["hand-written"]),
            Row(f"{framework.name}, ctxdb", microseconds["ctxdb"], share, _AIM),
        ]
