"""What does the inspector add to a request with one statement, while nobody looks at it?"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from starlette.responses import Response

from benchmarks.asgi import PATH, Caller
from benchmarks.contenders import Route
from benchmarks.contenders.ctxdb import CtxDB
from benchmarks.database import pool_of, read, write
from benchmarks.measure import Block, Figure, ratios, take_turns
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table
from ctxdb_inspector import inspector

_REQUESTS = 40
_AIM = Aim(1.03)
_WITHOUT, _WITH = "ctxdb", "ctxdb, inspected"


class Inspected(Question):
    """One SELECT and one INSERT, with and without the inspector."""

    name: ClassVar[str] = "inspector"

    async def answer(self) -> list[Table]:
        """Measure, and return a table for each statement."""
        plain, inspected = (CtxDB(self.settings.url, pool_of(2)) for _ in range(2))
        inspector(inspected.db)
        tables = []
        try:
            for statement, work in (("SELECT", read), ("INSERT", write)):
                blocks: dict[str, Block] = {}
                for name, contender in ((_WITHOUT, plain), (_WITH, inspected)):
                    caller = Caller(contender.app([Route(PATH, partial(Response, b"ok"), work)]))
                    # The connection is open, and has the statement prepared; the inspector keeps what it keeps at most.
                    await caller.sequence(600)
                    blocks[name] = partial(caller.sequence, _REQUESTS)
                samples = await take_turns(blocks, self.settings.rounds_of(300, 80), f"{statement} with the inspector")
                microseconds = {name: Figure.of(values).median * 1e6 for name, values in samples.items()}
                tables.append(
                    Table(
                        f"A Starlette request with one {statement}: CPU with the inspector as a share of that without",
                        "µs of CPU",
                        "share",
                        [
                            Row(_WITHOUT, microseconds[_WITHOUT]),
                            Row(_WITH, microseconds[_WITH], ratios(samples, _WITH, _WITHOUT), _AIM),
                        ],
                    )
                )
        finally:
            await plain.close()
            await inspected.close()
        return tables
