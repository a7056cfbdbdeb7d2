"""What does it cost to ask for the session when it is there?"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import ClassVar

from benchmarks.contenders import Lookup
from benchmarks.database import pool_of
from benchmarks.measure import Figure, end_progress, show_progress
from benchmarks.questions._question import Question, load_all
from benchmarks.report import Aim, Row, Table

_AIM = Aim(75)
_TIMES = 20_000


class SessionLookup(Question):
    """``await db_session(db)`` in a loop, less the loop."""

    name: ClassVar[str] = "session"

    async def answer(self) -> list[Table]:
        """Measure, and return the table."""
        contenders, missing = load_all(
            (
                "floor",
                "ctxdb",
                "context-async-sqlalchemy",
                "fastapi-async-sqlalchemy",
                "advanced-alchemy",
                "sqlalchemy-tx-context",
            )
        )
        options = pool_of(1)
        nanoseconds: dict[str, list[float]] = {name: [] for name in contenders}
        try:
            async with AsyncExitStack() as stack:
                loops: dict[str, Lookup] = {}
                for name, contender in contenders.items():
                    opened = contender(self.settings.url, options)
                    stack.push_async_callback(opened.close)
                    place = opened.lookup()
                    assert place is not None
                    loops[name] = await stack.enter_async_context(place)
                rounds = self.settings.rounds_of(60, 15)
                for index in range(-1, rounds):
                    show_progress("asking for the session", index + 1, rounds)
                    empty = await _seconds_of(_empty_loop)
                    for name, loop in loops.items():
                        seconds = await _seconds_of(loop) - empty
                        if index >= 0:
                            nanoseconds[name].append(seconds / _TIMES * 1e9)
        finally:
            end_progress()
        rows = []
        for name, values in nanoseconds.items():
            figure = Figure.of(values)
            rows.append(Row(name, figure.median, figure, _AIM if name == "ctxdb" else None, _REMARKS.get(name, "")))
        return [
            Table(
                "Asking for the session when it is there: nanoseconds of CPU, less those of the empty loop",
                "ns of CPU",
                "ns",
                rows,
                absolute_digits=0,
                figure_digits=1,
                notes=missing,
            )
        ]


_REMARKS = {
    "floor": "a coroutine that looks into a context variable and a dict, nothing else",
    "ctxdb": "await db_session(db)",
    "context-async-sqlalchemy": "await db_session(connection)",
    "fastapi-async-sqlalchemy": "db.session",
    "advanced-alchemy": "alchemy.get_async_session(request)",
    "sqlalchemy-tx-context": "db.get_session()",
}


async def _empty_loop(times: int) -> None:
    for _ in range(times):
        pass


async def _seconds_of(loop: Lookup) -> float:
    start = time.process_time()
    await loop(_TIMES)
    return time.process_time() - start
