"""What can go wrong while the demo is watched: each fault is something that runs as long as it is switched on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import httpx
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core import DBConnect
from ctxdb_demo.cleanup import see_through

__all__ = ["BackendKiller", "Fault", "Faults", "Leak", "read_slowly", "repeat"]

SLOW_READER_SECONDS = 0.1
"""Between two parts of a response."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong."""

    title: str
    description: str
    run: Callable[[], Awaitable[None]]
    """Runs until it is cancelled, or has nothing more to do."""


class Faults:
    """Switches faults on and off; an asynchronous context manager that switches them off at its end.

    Args:
        faults: all faults, by name.
    """

    def __init__(self, faults: Mapping[str, Fault]) -> None:
        self.faults = faults
        self._running: dict[str, asyncio.Task[None]] = {}

    def states(self) -> dict[str, bool]:
        """Return which ones are on."""
        return {name: name in self._running and not self._running[name].done() for name in self.faults}

    async def switch(self, name: str, *, on: bool) -> None:
        """Switch a fault on or off; nothing happens if it is so already."""
        if on and not self.states()[name]:
            self._running[name] = asyncio.ensure_future(self._run(self.faults[name]))
        elif not on and (task := self._running.pop(name, None)) is not None:
            task.cancel()
            await see_through(asyncio.wait([task]))

    async def _run(self, fault: Fault) -> None:
        # It is there to break things, and the application under load gives errors of its own.
        with suppress(httpx.HTTPError):
            await fault.run()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for name in self.faults:
            await self.switch(name, on=False)


async def repeat(call: Callable[[], Awaitable[object]], seconds: float) -> None:
    """Call again and again, whatever the application answers, with a pause between."""
    while True:
        with suppress(httpx.HTTPError):
            await call()
        await asyncio.sleep(seconds)


async def read_slowly(client: httpx.AsyncClient, path: str) -> None:
    """Read a large response little by little."""
    while True:
        async with client.stream("GET", path) as response:
            async for _ in response.aiter_bytes():
                await asyncio.sleep(SLOW_READER_SECONDS)


class Leak:
    """What a bad handler does: it opens sessions beside the request's, and never closes them.

    Args:
        db: where.
        most: how many connections are left for good; a pool that has none left would show nothing more.
    """

    def __init__(self, db: DBConnect, most: int) -> None:
        self._db = db
        self._most = most
        self._sessions: list[AsyncSession] = []

    async def forget_one(self) -> int:
        """Take a connection and forget it; return how many are forgotten now."""
        if len(self._sessions) < self._most:
            session = await self._db.create_session()
            self._sessions.append(session)
            await session.execute(text("SELECT 'nobody closes this'"))
        return len(self._sessions)

    async def run(self, client: httpx.AsyncClient, path: str) -> None:
        """Have the bad handler called again and again; in the end, close what it has left."""
        try:
            await repeat(lambda: client.post(path), 1.0)
        finally:
            await see_through(self._close())

    async def _close(self) -> None:
        sessions, self._sessions = self._sessions, []
        for session in sessions:
            # The killer may have ended this very connection.
            with suppress(Exception):
                await session.close()


class BackendKiller:
    """Ends processes of the server that serve the application, and no others.

    Args:
        dbs: the application's.
    """

    def __init__(self, *dbs: DBConnect) -> None:
        self._in_use: list[int] = []
        self._taken = asyncio.Event()
        for db in dbs:
            db.on_engine(self._follow)

    def _follow(self, host: str, engine: AsyncEngine) -> None:
        if engine.dialect.name != "postgresql":
            return

        def note(connection: Any, record: ConnectionPoolEntry, proxy: object) -> None:
            driver = connection.driver_connection
            asked = getattr(driver, "get_server_pid", None)
            record.info["pid"] = driver.info.backend_pid if asked is None else asked()
            self._in_use.append(record.info["pid"])
            self._taken.set()

        def forget(connection: object, record: ConnectionPoolEntry) -> None:
            pid = record.info.pop("pid", None)
            if pid in self._in_use:
                self._in_use.remove(pid)

        event.listen(engine.sync_engine, "checkout", note)
        event.listen(engine.sync_engine, "checkin", forget)

    async def run(self, kill: Callable[[int], Awaitable[object]]) -> None:
        """Have one killed after the other, each while a request is using it: nobody notices the death of an idle one.

        Args:
            kill: kills the process of a number.
        """
        while True:
            self._taken.clear()
            await self._taken.wait()
            if self._in_use:
                await kill(self._in_use.pop())
                await asyncio.sleep(0.5)
