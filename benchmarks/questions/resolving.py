"""What does `resolve_commits=True` add to a request with one statement?"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from starlette.responses import Response

from benchmarks.asgi import PATH, Caller
from benchmarks.contenders import Route
from benchmarks.contenders.ctxdb import CtxDB, CtxDBResolving
from benchmarks.database import pool_of, read, write
from benchmarks.measure import Block, Figure, ratios, take_turns
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table

_REQUESTS = 40


class Resolving(Question):
    """One SELECT and one INSERT, with and without commits that are resolved: a reader asks for nothing more."""

    name: ClassVar[str] = "resolve-commits"

    async def answer(self) -> list[Table]:
        """Measure, and return a table for each statement."""
        contenders = [each(self.settings.url, pool_of(2)) for each in (CtxDB, CtxDBResolving)]
        plain, resolving = (each.name for each in contenders)
        tables = []
        try:
            for statement, work, aim in (("SELECT", read, Aim(1.03)), ("INSERT", write, None)):
                blocks: dict[str, Block] = {}
                for contender in contenders:
                    caller = Caller(contender.app([Route(PATH, partial(Response, b"ok"), work)]))
                    # The connection is open, and has its statements prepared.
                    await caller.sequence(_REQUESTS)
                    blocks[contender.name] = partial(caller.sequence, _REQUESTS)
                samples = await take_turns(
                    blocks, self.settings.rounds_of(200, 50), f"{statement} with resolved commits"
                )
                microseconds = {name: Figure.of(values).median * 1e6 for name, values in samples.items()}
                tables.append(
                    Table(
                        f"A Starlette request with one {statement}: CPU with resolved commits as a share of without",
                        "µs of CPU",
                        "share",
                        [
                            Row(plain, microseconds[plain]),
                            Row(resolving, microseconds[resolving], ratios(samples, resolving, plain), aim),
                        ],
                    )
                )
        finally:
            for contender in contenders:
                await contender.close()
        return tables
