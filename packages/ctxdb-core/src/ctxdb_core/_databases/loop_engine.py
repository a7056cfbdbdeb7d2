"""`LoopEngine`: one host's engine on one event loop, from its creation to the last of its server connections."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet, finalize

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core._databases.borrowed import BorrowedEngine, is_in_memory
from ctxdb_core._databases.url import without_secrets
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.guards import teach
from ctxdb_core._sqlalchemy.lost_commits import note_reader, resolve_lost_commits
from ctxdb_core._sqlalchemy.session_factory import SessionFactory
from ctxdb_core.errors import ArgumentTypeError

EngineCreator = Callable[[str], AsyncEngine]
# Of any session class: the type of a session maker is invariant.
SessionMakerCreator = Callable[[AsyncEngine], async_sessionmaker[Any]]


class Lifetime(enum.Enum):
    """How long an engine lives."""

    OF_LOOP = "until it is retired, and at the latest until its event loop shuts down: its connections serve no other"
    UNTIL_RETIRED = "until it is retired: its one connection holds a database in memory, and serves every event loop"
    OF_OWNER = "as long as its owner wishes: it is not disposed of here"


# An engine that is garbage-collected leaves its connections unclosed: each is kept until it has been disposed of.
_live: set[LoopEngine] = set()


def has_engines(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether engines belong to `loop` that have not been disposed of."""
    return any(engine.loop is loop for engine in _live)


class _Drain:
    """Closes the connections that come back to an engine's pools, as long as it is active."""

    active = False

    def close_returned(self, dbapi_connection: object, connection_record: ConnectionPoolEntry) -> None:
        if self.active and dbapi_connection is not None:
            connection_record.invalidate()


# An engine hands its listeners on to each of its pools, and they cannot be taken back from there.
_drains: WeakKeyDictionary[Engine, _Drain] = WeakKeyDictionary()


CLOSE_SECONDS = 2.0
"""How long an engine's idle connections have to be closed, before they are thrown away."""

# After so many attempts, a pool that makes no progress is given up.
_MOST_ATTEMPTS = 100


async def _dispose_in_time(engine: AsyncEngine) -> None:
    """Close the idle connections, also if their server does not answer: a frozen one would never let go of them."""
    seconds = CLOSE_SECONDS
    for _ in range(_MOST_ATTEMPTS):
        try:
            async with asyncio.timeout(seconds):
                await engine.dispose()
        except TimeoutError:
            # The driver has thrown away the connection that it was closing, as drivers do on a cancellation.
            seconds = CLOSE_SECONDS / 20
        else:
            return


class LoopEngine:
    """An engine and its session maker, bound to the event loop that was running when they were made.

    Connections of an asyncio driver belong to the loop that opened them, so each loop has an engine of its own. A
    second engine would be a second database in memory, so the one engine of such a database is used on every loop.
    """

    def __init__(
        self,
        host: str,
        engine_creator: EngineCreator,
        session_maker_creator: SessionMakerCreator,
        existing: AsyncEngine | None = None,
        *,
        resolve_commits: bool = False,
    ) -> None:
        self.host = host
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        # A database in memory has one engine, which was made for its first event loop.
        engine = engine_creator(host) if existing is None else existing
        if not isinstance(engine, AsyncEngine):
            raise ArgumentTypeError(
                f"engine_creator({without_secrets(host)!r}) returned {type(engine).__name__}, not an AsyncEngine: "
                "build the engine with `sqlalchemy.ext.asyncio.create_async_engine`."
            )
        self.engine = engine
        self.lifetime: Lifetime = _lifetime_of(engine, engine_creator)
        maker: object = session_maker_creator(engine)
        if isinstance(maker, sessionmaker):
            raise ArgumentTypeError(
                "session_maker_creator returned a sessionmaker, whose sessions are synchronous: return an "
                "`async_sessionmaker(engine, ...)`."
            )
        self.session_maker: async_sessionmaker[Any] = cast("async_sessionmaker[Any]", maker)
        self.new_session: SessionFactory = SessionFactory(self.session_maker, note_reader if resolve_commits else None)
        if engine.sync_engine in _drains:
            # The creator returns an engine that was retired before: it keeps its connections again.
            _drains[engine.sync_engine].active = False
        teach(engine.sync_engine)
        if resolve_commits:
            resolve_lost_commits(engine)
        self._retirement: asyncio.Task[None] | None = None
        if self.lifetime is Lifetime.UNTIL_RETIRED:
            _terminate_with(engine.sync_engine)
        elif self.lifetime is Lifetime.OF_LOOP:
            for other in list(_live):
                if other.loop.is_closed():
                    _live.discard(other)
            _live.add(self)
            self._lifespan = self._live_and_dispose()
            with suppress(StopIteration):
                # The first step registers the generator with the running loop, which will close it before it ends
                # (`loop.shutdown_asyncgens`, called by `asyncio.run` and `asyncio.Runner`).
                self._lifespan.__anext__().send(None)

    async def _live_and_dispose(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            # A loop that ends waits for its generators, but for its tasks only once it has cancelled them; and a task
            # that is cancelled before its first step does nothing.
            if self in _live and self._retirement is not None:
                await asyncio.wait([self._retirement])
            if self in _live:
                await self._dispose()

    async def _dispose(self) -> None:
        # Connections in use outlive `dispose()`, in a pool that is not disposed of again: so each connection that comes
        # back from now on is closed instead of kept.
        drain = _drains.get(self.engine.sync_engine)
        if drain is None:
            drain = _drains[self.engine.sync_engine] = _Drain()
            event.listen(self.engine.pool, "checkin", drain.close_returned)
        drain.active = True
        try:
            await _dispose_in_time(self.engine)
        finally:
            _live.discard(self)

    async def retire(self) -> None:
        """Close every connection that is idle now, and each of the others when it is given back."""
        if self.lifetime is Lifetime.UNTIL_RETIRED:
            await run_to_completion(self._dispose())
        elif self.lifetime is Lifetime.OF_OWNER or self.loop.is_closed():
            return
        elif self.loop is asyncio.get_running_loop():
            await run_to_completion(self._end_lifespan())
        else:
            # Another loop's connections can be closed on that loop only, and it may not be running: no waiting for it.
            self.abandon()

    def abandon(self) -> None:
        """Retire without waiting for it; may be called from anywhere."""
        # A database in memory ends with its engine, which sessions may still use.
        if self.lifetime is Lifetime.OF_LOOP and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._start_retirement)

    async def _end_lifespan(self) -> None:
        if self._retirement is None:
            self._start_retirement()
        assert self._retirement is not None
        await self._retirement

    def _start_retirement(self) -> None:
        if self._retirement is None:
            self._retirement = self.loop.create_task(self._retire())

    async def _retire(self) -> None:
        # A loop that ends cancels this task: the connections that are being closed then are closed all the same.
        await run_to_completion(self._dispose())
        with suppress(RuntimeError):  # the loop is closing it already, and waits for this task
            await self._lifespan.aclose()


def _lifetime_of(engine: AsyncEngine, creator: EngineCreator) -> Lifetime:
    if isinstance(creator, BorrowedEngine) and engine is creator.engine:
        return Lifetime.OF_OWNER
    return Lifetime.UNTIL_RETIRED if is_in_memory(engine) else Lifetime.OF_LOOP


# The engines of databases in memory whose connections are terminated with them.
_terminated: WeakSet[Engine] = WeakSet()


def _terminate_with(engine: Engine) -> None:
    """Have what the pool of `engine` has opened closed when `engine` is collected, without an event loop."""
    if engine in _terminated:
        return
    _terminated.add(engine)
    connections: list[Any] = []

    def note(connection: object, record: ConnectionPoolEntry) -> None:
        connections.append(connection)

    def forget(connection: object, record: ConnectionPoolEntry) -> None:
        connections[:] = [each for each in connections if each is not connection]

    event.listen(engine, "connect", note)
    event.listen(engine, "close", forget)
    finalize(engine, _terminate, engine.dialect, connections)


def _terminate(dialect: Dialect, connections: list[Any]) -> None:
    for connection in connections:
        # Older versions of aiosqlite cannot terminate a connection; their threads do not keep the process from ending.
        with suppress(Exception):
            dialect.do_terminate(connection)
