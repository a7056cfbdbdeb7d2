"""ctxdb's own figures: each is a pair of blocks, one with ctxdb and one that does the same without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.database import Work, create_engine, pool_of, read, write
from benchmarks.frameworks import FRAMEWORKS, Framework
from benchmarks.frameworks._framework import Handle, by_ctxdb, by_hand, do_nothing
from benchmarks.measure import Block
from ctxdb_core import DBConnect, db_session, new_db_ctx

NO_DATABASE = "no database"
LOOKUP = "await db_session(db)"

_AT_ONCE = 20
_IDLE_REQUESTS = 100
_IN_SEQUENCE = 20
_IN_A_CROWD = 40
_LOOKUPS = 20_000
_STATEMENTS: Mapping[str, Work] = {"SELECT": read, "INSERT": write}

WORKS = tuple(f"one {statement}, {how}" for statement in _STATEMENTS for how in ("in sequence", f"{_AT_ONCE} at once"))
"""What is done with the database in each framework."""


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
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        pairs = [await enter(_lookup(url))]
        sides: list[tuple[str, Mapping[str, Block], Mapping[str, Block]]] = []
        for framework in FRAMEWORKS:
            name = framework.name
            bare, idle = [await enter(open_idle(framework, adapter=adapter)) for adapter in (False, True)]
            pairs.append(Pair(name, NO_DATABASE, bare, idle, is_share=False))
            without, by_adapter = [await enter(open_side(url, name, adapter=adapter)) for adapter in (False, True)]
            sides.append((name, without, by_adapter))
        for work in WORKS:
            pairs += [Pair(name, work, without[work], by_it[work], is_share=True) for name, without, by_it in sides]
        yield pairs


@asynccontextmanager
async def open_idle(framework: Framework, *, adapter: bool) -> AsyncIterator[Block]:
    """Provide requests without database use in one framework, with ctxdb's adapter or without."""
    async with framework.run(do_nothing, adapter=adapter) as caller:
        yield partial(caller.sequence, _IDLE_REQUESTS)


@asynccontextmanager
async def open_side(url: str, framework: str, *, adapter: bool) -> AsyncIterator[Mapping[str, Block]]:
    """Provide a block for each of `WORKS` in one framework, with ctxdb's adapter, or written by hand without it."""
    [found] = [each for each in FRAMEWORKS if each.name == framework]
    options = pool_of(_AT_ONCE)
    async with AsyncExitStack() as stack:
        blocks: dict[str, Block] = {}
        handle_of: Callable[[Work], Handle]
        if adapter:
            db = DBConnect.from_url(url, **options)
            stack.push_async_callback(db.close)
            handle_of = partial(by_ctxdb, db)
        else:
            engine = create_engine(url, options)
            stack.push_async_callback(engine.dispose)
            handle_of = partial(by_hand, async_sessionmaker(engine, expire_on_commit=False))
        for statement, work in _STATEMENTS.items():
            caller = await stack.enter_async_context(found.run(handle_of(work), adapter=adapter))
            # Every connection of the pool is open, and has the statement prepared.
            for _ in range(3):
                await caller.crowd(_IN_A_CROWD, _AT_ONCE)
            blocks[f"one {statement}, in sequence"] = partial(caller.sequence, _IN_SEQUENCE)
            blocks[f"one {statement}, {_AT_ONCE} at once"] = partial(caller.crowd, _IN_A_CROWD, _AT_ONCE)
        yield blocks


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
