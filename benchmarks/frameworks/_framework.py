"""`Framework`: the applications that are compared in one framework."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Protocol, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.database import Work
from ctxdb_core import DBConnect, db_session

Handle: TypeAlias = Callable[[], Awaitable[None]]
"""What the only route does before it answers "ok"."""


class Caller(Protocol):
    """Sends requests, and sees to it that they succeed."""

    async def sequence(self, requests: int) -> int:
        """Send `requests` one after the other; return how many it were."""

    async def crowd(self, requests: int, workers: int) -> int:
        """Send `requests`, `workers` at once; return how many it were."""


class Framework:
    """One framework: how an application is made in it, and called without a socket."""

    name: ClassVar[str]

    def run(self, handle: Handle, *, adapter: bool) -> AbstractAsyncContextManager[Caller]:
        """Run an application whose only route awaits `handle`, with ctxdb's adapter or without."""
        raise NotImplementedError


async def do_nothing() -> None:
    """Use no database."""


def by_hand(session_maker: async_sessionmaker[AsyncSession], work: Work) -> Handle:
    """Return what one writes without a library."""

    async def handle() -> None:
        async with session_maker.begin() as session:
            await work(session)

    return handle


def by_ctxdb(db: DBConnect, work: Work) -> Handle:
    """Return what one writes with ctxdb."""

    async def handle() -> None:
        await work(await db_session(db))

    return handle


Running: TypeAlias = AsyncIterator[Caller]
