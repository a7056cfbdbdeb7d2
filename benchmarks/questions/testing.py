"""How many tests a second does each style of isolating them give?"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from sqlalchemy import make_url, text

from benchmarks.database import read, write
from benchmarks.measure import Figure, end_progress, show_progress
from benchmarks.questions._question import Question
from benchmarks.report import Row, Table
from ctxdb_core import DBConnect, db_session, new_db_ctx, new_non_ctx_session
from ctxdb_core.testing import TableCleaner, shared_transaction
from ctxdb_core.testing._shared import WAIT_SECONDS, SharedTransaction
from ctxdb_core.testing._thread import LoopThread

_TABLES = 50
_TESTS = 20

Isolate = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class _Style:
    name: str
    remark: str
    isolate: Isolate
    """What is done around each test, outside of its event loop: as the fixtures do it."""
    in_block: bool = False
    """Whether the test has `async with shared_transaction(db)` in it."""


class Tests(Question):
    """A test writes a row in one unit of work, and reads in another; there are 50 tables."""

    name: ClassVar[str] = "tests"

    async def answer(self) -> list[Table]:
        """Measure, and return the tables: one with a loop for each test, one with a loop for all."""
        # Tests have event loops of their own: not this one.
        return await asyncio.to_thread(self._answer)

    def _answer(self) -> list[Table]:
        with ExitStack() as stack:
            db = DBConnect.from_url(self.settings.url)
            thread = stack.enter_context(LoopThread())
            thread.call(_create_tables, db)
            stack.callback(thread.call, _drop_tables, db)
            cleaner = TableCleaner(db, test_databases=make_url(self.settings.url).database or "")
            thread.call(cleaner.__aenter__)
            stack.callback(thread.call, cleaner.__aexit__, None, None, None)
            styles = (
                _Style("nothing", "really commits, and leaves it there", nullcontext),
                _Style("shared transaction", "the fixture", lambda: _shared(thread, db)),
                _Style("shared_transaction()", "with a thread and a connection of its own", nullcontext, in_block=True),
                _Style("clean-up", "the fixture: finds the one table", lambda: _after(thread, cleaner.clean)),
                _Style("TRUNCATE", f"all {_TABLES + 1} tables after each test", lambda: _after(thread, _truncate, db)),
            )
            return [self._measure(styles, db, own_loops=own_loops) for own_loops in (True, False)]

    def _measure(self, styles: tuple[_Style, ...], db: DBConnect, *, own_loops: bool) -> Table:
        label = "a loop for each test" if own_loops else "one loop for all tests"
        rates: dict[str, list[float]] = {style.name: [] for style in styles}
        rounds = self.settings.rounds_of(10, 3)
        dice = random.Random(0)
        try:
            for index in range(-1, rounds):
                show_progress(label, index + 1, rounds)
                for style in dice.sample(styles, len(styles)):
                    rate = _run_tests(style, db, own_loops=own_loops)
                    if index >= 0:
                        rates[style.name].append(rate)
        finally:
            end_progress()
        rows = []
        for style in styles:
            figure = Figure.of(rates[style.name])
            rows.append(Row(style.name, figure.median, figure, remark=style.remark))
        return Table(f"Tests a second, {label}", "a second", "a second", rows, absolute_digits=0, figure_digits=0)


def _run_tests(style: _Style, db: DBConnect, *, own_loops: bool) -> float:
    async def test() -> None:
        async with new_db_ctx():
            await write(await db_session(db))
        async with new_non_ctx_session(db) as session:
            await read(session)

    async def run() -> None:
        if style.in_block:
            async with shared_transaction(db):
                await test()
        else:
            await test()

    start = time.perf_counter()
    with asyncio.Runner() as for_all:
        for _ in range(_TESTS):
            with style.isolate():
                if own_loops:
                    with asyncio.Runner() as own:
                        own.run(run())
                else:
                    for_all.run(run())
    return _TESTS / (time.perf_counter() - start)


@contextmanager
def _shared(thread: LoopThread, db: DBConnect) -> Iterator[None]:
    shared = SharedTransaction(thread, (db,), WAIT_SECONDS)
    thread.call(shared.begin)
    yield
    thread.call(shared.end)
    shared.restore()


@contextmanager
def _after(thread: LoopThread, fn: Callable[..., object], *args: object) -> Iterator[None]:
    yield
    thread.call(fn, *args)  # type: ignore[arg-type]  # a coroutine function


async def _create_tables(db: DBConnect) -> None:
    async with (await db.engine()).begin() as connection:
        for number in range(_TABLES):
            await connection.execute(
                text(f"CREATE TABLE benchmark_test_{number} (id SERIAL PRIMARY KEY, name VARCHAR(40) UNIQUE)")
            )


async def _drop_tables(db: DBConnect) -> None:
    async with (await db.engine()).begin() as connection:
        await connection.execute(text(f"DROP TABLE {_names()}"))


async def _truncate(db: DBConnect) -> None:
    async with (await db.engine()).begin() as connection:
        await connection.execute(text(f"TRUNCATE benchmark_items, {_names()} RESTART IDENTITY CASCADE"))
        await connection.execute(text("INSERT INTO benchmark_items (name) VALUES ('read')"))


def _names() -> str:
    return ", ".join(f"benchmark_test_{number}" for number in range(_TABLES))
