"""What does a request with one statement cost, against the same handler written by hand?"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from starlette.responses import Response

from benchmarks.asgi import PATH, Caller
from benchmarks.contenders import BASELINE, Contender, Route
from benchmarks.database import Work, pool_of, read, write
from benchmarks.measure import Block, Figure, ratios, take_turns
from benchmarks.questions._question import Question, load_all
from benchmarks.report import Aim, Row, Table

_AT_ONCE = 20
_IN_SEQUENCE = 20
_IN_A_CROWD = 40
_AIM = Aim(0.90)
_READ_ONLY_AIM = Aim(0.75)
_READ_ONLY = "ctxdb, read_only"


class Requests(Question):
    """One SELECT and one INSERT, in sequence and many at once."""

    name: ClassVar[str] = "requests"

    async def answer(self) -> list[Table]:
        """Measure, and return a table for each statement and way of sending requests."""
        contenders, missing = load_all(
            (
                BASELINE,
                "floor",
                "ctxdb",
                "ctxdb, observed",
                _READ_ONLY,
                "hand-written middleware",
                "context-async-sqlalchemy",
                "context-async-sqlalchemy (http)",
                "fastapi-async-sqlalchemy",
                "advanced-alchemy",
                "sqlalchemy-tx-context",
            )
        )
        options = pool_of(_AT_ONCE)
        opened = [contender(self.settings.url, options) for contender in contenders.values()]
        tables = []
        try:
            for statement, work in (("SELECT", read), ("INSERT", write)):
                taking_part = [one for one in opened if statement == "SELECT" or one.name != _READ_ONLY]
                callers = {one.name: _caller(one, work) for one in taking_part}
                for caller in callers.values():
                    # Every connection of the pool is open, and has the statement prepared.
                    for _ in range(3):
                        await caller.crowd(_IN_A_CROWD, _AT_ONCE)
                sequence: dict[str, Block] = {
                    name: partial(caller.sequence, _IN_SEQUENCE) for name, caller in callers.items()
                }
                tables.append(await self._compare(statement, "in sequence", sequence, 120, missing))
                crowd: dict[str, Block] = {
                    name: partial(caller.crowd, _IN_A_CROWD, _AT_ONCE) for name, caller in callers.items()
                }
                tables.append(await self._compare(statement, f"{_AT_ONCE} at once", crowd, 60, missing))
        finally:
            for contender in opened:
                await contender.close()
        return tables

    async def _compare(
        self, statement: str, how: str, blocks: dict[str, Block], rounds: int, missing: list[str]
    ) -> Table:
        samples = await take_turns(blocks, self.settings.rounds_of(rounds, rounds // 8), f"{statement} requests {how}")
        rows = []
        for name in blocks:
            microseconds = Figure.of(samples[name]).median * 1e6
            if name == BASELINE:
                rows.append(Row(name, microseconds, remark="async with session_maker.begin()"))
                continue
            aim = {"ctxdb": _AIM, _READ_ONLY: _READ_ONLY_AIM}.get(name)
            rows.append(Row(name, microseconds, ratios(samples, name, BASELINE), aim, _remark(name)))
        return Table(
            f"A request with one {statement}, {how}: CPU as a share of the hand-written handler's",
            "µs of CPU",
            "share",
            rows,
            notes=missing,
        )


def _caller(contender: Contender, work: Work) -> Caller:
    return Caller(contender.app([Route(PATH, partial(Response, b"ok"), work)]))


def _remark(name: str) -> str:
    return load_all((name,))[0][name].remark
