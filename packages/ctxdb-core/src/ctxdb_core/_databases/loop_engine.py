"""One host's engine on one event loop, from its creation to the last of its server connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core._databases.url import without_secrets
from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.connection_context import connect_without_hidden_variables
from ctxdb_core._sqlalchemy.guards import guard
from ctxdb_core._sqlalchemy.lost_commits import resolve_lost_commits
from ctxdb_core._sqlalchemy.sessions import SessionFactory
from ctxdb_core.errors import ArgumentTypeError

EngineCreator = Callable[[str], AsyncEngine]
SessionMakerCreator = Callable[[AsyncEngine], async_sessionmaker[AsyncSession]]


# An engine that is garbage-collected leaves its connections unclosed: each is kept until it has been disposed of.
_live: set[LoopEngine] = set()


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

# A pool that makes no progress is not waited for, either.
_MOST_ATTEMPTS = 100


async def _dispose_in_time(engine: AsyncEngine) -> None:
    """Close the idle connections, also if their server does not answer: a frozen one would never let go of them."""
    seconds = CLOSE_SECONDS
    for _ in range(_MOST_ATTEMPTS):
        try:
            async with asyncio.timeout(seconds):
                await engine.dispose()
        except TimeoutError:
            # The one that it was waiting for has been thrown away: the drivers do so when they are interrupted.
            seconds = CLOSE_SECONDS / 20
        else:
            return


class LoopEngine:
    """An engine and its session maker, bound to the event loop that was running when they were made.

    Connections of an asyncio driver belong to the loop that opened them, so each loop has an engine of its own. It is
    disposed of when it is retired, and at the latest when its loop shuts down.
    """

    def __init__(
        self,
        host: str,
        engine_creator: EngineCreator,
        session_maker_creator: SessionMakerCreator,
        *,
        resolve_commits: bool = False,
    ) -> None:
        self.host = host
        self.loop = asyncio.get_running_loop()
        engine = engine_creator(host)
        if not isinstance(engine, AsyncEngine):
            raise ArgumentTypeError(
                f"engine_creator({without_secrets(host)!r}) returned {type(engine).__name__}, not an AsyncEngine: "
                "build the engine with `sqlalchemy.ext.asyncio.create_async_engine`."
            )
        self.engine = engine
        self.session_maker = session_maker_creator(engine)
        self.new_session = SessionFactory(self.session_maker)
        if engine.sync_engine in _drains:
            # The creator returns an engine that was retired before: it keeps its connections again.
            _drains[engine.sync_engine].active = False
        connect_without_hidden_variables(engine)
        guard(engine)
        if resolve_commits:
            resolve_lost_commits(engine)
        for other in list(_live):
            if other.loop.is_closed():
                _live.discard(other)
        _live.add(self)
        self._retirement: asyncio.Task[None] | None = None
        self._lifetime = self._live_and_dispose()
        with suppress(StopIteration):
            # The first step registers the generator with the running loop, which will close it before it ends
            # (`loop.shutdown_asyncgens`, called by `asyncio.run` and `asyncio.Runner`).
            self._lifetime.__anext__().send(None)

    async def _live_and_dispose(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self._dispose()

    async def _dispose(self) -> None:
        # Connections in use outlive `dispose()`, in a pool that nobody would look after any more: from now on, what
        # comes back to this engine's pools is closed instead of kept.
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
        if self.loop.is_closed():
            return
        if self.loop is asyncio.get_running_loop():
            await run_to_completion(self._end_lifetime())
        else:
            # Another loop's connections can be closed on that loop only, and it may not be running: no waiting for it.
            self.abandon()

    def abandon(self) -> None:
        """Retire without waiting for it; may be called from anywhere."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._start_retirement)

    async def _end_lifetime(self) -> None:
        if self._retirement is None:
            self._start_retirement()
        assert self._retirement is not None
        await self._retirement

    def _start_retirement(self) -> None:
        if self._retirement is None:
            self._retirement = self.loop.create_task(self._lifetime.aclose())
