"""ctxdb's own figures: each is a pair of blocks, one with ctxdb and one that does the same without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.database import create_engine, pool_of, read, write
from benchmarks.frameworks import FRAMEWORKS, Framework
from benchmarks.frameworks._framework import Caller, Handle, by_ctxdb, by_hand, do_nothing
from benchmarks.measure import Block
from ctxdb_core import DBConnect, db_session, new_db_ctx

NO_DATABASE = "no database"
LOOKUP = "await db_session(db)"

_AT_ONCE = 20
_IDLE_REQUESTS = 100
_IN_SEQUENCE = 20
_IN_A_CROWD = 40
_LOOKUPS = 20_000


@dataclass(frozen=True)
class Pair:
    """One figure.

    Args:
        framework: the framework that answers the requests; empty where there is none.
        work: what is done, as the heading of a table says it.
        without: does the work without ctxdb.
        by_ctxdb: does the same work with ctxdb.
        is_share: whether the figure is what ctxdb takes as a share of what is taken `without` it. Otherwise it is
            what ctxdb adds.
    """

    framework: str
    work: str
    without: Block
    by_ctxdb: Block
    is_share: bool

    @property
    def name(self) -> str:
        """The row of a table that holds several kinds of work."""
        return f"{self.framework}, {self.work}" if self.framework else self.work


@asynccontextmanager
async def open_pairs(url: str) -> AsyncIterator[list[Pair]]:
    """Provide the pairs, with every application running and every connection of their pools open.

    Pairs of the same work follow each other.
    """
    options = pool_of(_AT_ONCE)
    async with AsyncExitStack() as stack:
        db = DBConnect.from_url(url, **options)
        stack.push_async_callback(db.close)
        engine = create_engine(url, options)
        stack.push_async_callback(engine.dispose)
        session_maker = async_sessionmaker(engine, expire_on_commit=False)
        pairs = [await stack.enter_async_context(_lookup(url))]
        for framework in FRAMEWORKS:
            without, by_adapter = await _run(stack, framework, do_nothing, do_nothing)
            pairs.append(
                Pair(
                    framework.name,
                    NO_DATABASE,
                    partial(without.sequence, _IDLE_REQUESTS),
                    partial(by_adapter.sequence, _IDLE_REQUESTS),
                    is_share=False,
                )
            )
        for statement, work in (("SELECT", read), ("INSERT", write)):
            handles = (by_hand(session_maker, work), by_ctxdb(db, work))
            callers = [(framework.name, await _run(stack, framework, *handles)) for framework in FRAMEWORKS]
            for name, (without, by_adapter) in callers:
                for caller in (without, by_adapter):
                    # Every connection of the pool is open, and has the statement prepared.
                    for _ in range(3):
                        await caller.crowd(_IN_A_CROWD, _AT_ONCE)
                pairs.append(
                    Pair(
                        name,
                        f"one {statement}, in sequence",
                        partial(without.sequence, _IN_SEQUENCE),
                        partial(by_adapter.sequence, _IN_SEQUENCE),
                        is_share=True,
                    )
                )
            for name, (without, by_adapter) in callers:
                pairs.append(
                    Pair(
                        name,
                        f"one {statement}, {_AT_ONCE} at once",
                        partial(without.crowd, _IN_A_CROWD, _AT_ONCE),
                        partial(by_adapter.crowd, _IN_A_CROWD, _AT_ONCE),
                        is_share=True,
                    )
                )
        yield pairs


async def _run(
    stack: AsyncExitStack, framework: Framework, without: Handle, by_adapter: Handle
) -> tuple[Caller, Caller]:
    return (
        await stack.enter_async_context(framework.run(without, adapter=False)),
        await stack.enter_async_context(framework.run(by_adapter, adapter=True)),
    )


@asynccontextmanager
async def _lookup(url: str) -> AsyncIterator[Pair]:
    db = DBConnect.from_url(url, **pool_of(1))

    async def look_up() -> int:
        for _ in range(_LOOKUPS):
            await db_session(db)
        return _LOOKUPS

    async def do_not() -> int:
        for _ in range(_LOOKUPS):
            pass
        return _LOOKUPS

    async with db, _unit_of_work(db) as run:
        yield Pair("", LOOKUP, do_not, partial(run, look_up), is_share=False)


@asynccontextmanager
async def _unit_of_work(db: DBConnect) -> AsyncIterator[Callable[[Block], Awaitable[int]]]:
    """Provide what runs a block in a unit of work that has its session, which no request of another pair sees."""
    opened, over = asyncio.get_running_loop().create_future(), asyncio.Event()

    async def keep_open() -> None:
        async with new_db_ctx():
            await db_session(db)
            opened.set_result(copy_context())
            await over.wait()

    keeper = asyncio.create_task(keep_open())
    context = await opened

    async def run(block: Block) -> int:
        async def count() -> int:
            return await block()

        return await asyncio.create_task(count(), context=context)

    try:
        yield run
    finally:
        over.set()
        await keeper
