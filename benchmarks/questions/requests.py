"""What does a request with one statement cost, against the same handler written by hand?"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import ClassVar

from starlette.responses import Response

from benchmarks.apart import Apart, run_apart
from benchmarks.asgi import PATH, Caller
from benchmarks.contenders import BASELINE, Contender, Route, load
from benchmarks.database import pool_of, read, write
from benchmarks.measure import Block, Figure, measure_in_turns, ratios
from benchmarks.questions._question import Question, load_all
from benchmarks.report import Aim, Row, Table

_AT_ONCE = 20
_IN_SEQUENCE = 20
_IN_A_CROWD = 40
_SEQUENCE = "in sequence"
_CROWD = f"{_AT_ONCE} at once"
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
        openers = {name: partial(_open_blocks, name, self.settings.url) for name in contenders}
        with run_apart(openers) as processes:
            return [
                await self._compare(statement, how, rounds, contenders, processes, missing)
                for statement in ("SELECT", "INSERT")
                for how, rounds in ((_SEQUENCE, 120), (_CROWD, 60))
            ]

    async def _compare(
        self,
        statement: str,
        how: str,
        rounds: int,
        contenders: Mapping[str, type[Contender]],
        processes: Mapping[str, Apart],
        missing: list[str],
    ) -> Table:
        measures = {
            name: partial(process.measure, f"{statement} {how}")
            for name, process in processes.items()
            if name != _READ_ONLY or statement == "SELECT"
        }
        label = f"{statement} requests {how}"
        samples = await measure_in_turns(measures, self.settings.rounds_of(rounds, rounds // 8), label)
        rows = []
        for name in measures:
            microseconds = Figure.of(samples[name]).median * 1e6
            if name == BASELINE:
                rows.append(Row(name, microseconds, remark="async with session_maker.begin()"))
                continue
            aim = {"ctxdb": _AIM, _READ_ONLY: _READ_ONLY_AIM}.get(name)
            remark = contenders[name].remark
            rows.append(Row(name, microseconds, ratios(samples, name, BASELINE), aim, remark))
        return Table(
            f"A request with one {statement}, {how}: CPU as a share of the hand-written handler's",
            "µs of CPU",
            "share",
            rows,
            notes=missing,
        )


@asynccontextmanager
async def _open_blocks(name: str, url: str) -> AsyncIterator[Mapping[str, Block]]:
    """Open a contender, with every connection of its pool, and provide a block for each kind of request."""
    contender = load(name)(url, pool_of(_AT_ONCE))
    blocks: dict[str, Block] = {}
    try:
        for statement, work in (("SELECT", read), ("INSERT", write)):
            if name == _READ_ONLY and statement == "INSERT":
                continue
            caller = Caller(contender.app([Route(PATH, partial(Response, b"ok"), work)]))
            # Every connection of the pool is open, and has the statement prepared.
            for _ in range(3):
                await caller.crowd(_IN_A_CROWD, _AT_ONCE)
            blocks[f"{statement} {_SEQUENCE}"] = partial(caller.sequence, _IN_SEQUENCE)
            blocks[f"{statement} {_CROWD}"] = partial(caller.crowd, _IN_A_CROWD, _AT_ONCE)
        yield blocks
    finally:
        await contender.close()
