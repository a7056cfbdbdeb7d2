"""An engine of the user's in the place of a `DBConnect`."""

from __future__ import annotations

from weakref import WeakValueDictionary

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from ctxdb_core._databases.connect import DBConnect, default_session_maker
from ctxdb_core._databases.url import host_of, without_secrets
from ctxdb_core._sqlalchemy.guards import guard
from ctxdb_core._sqlalchemy.sessions import SessionFactory

__all__ = ["BorrowedEngine"]


class BorrowedEngine(DBConnect):
    """Sessions on an engine that somebody else has made, for his own event loop, and disposes of.

    It gets the guards that every engine gets; they stay on it.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(lambda host: engine)
        self._engine = engine
        self._session_maker = default_session_maker(engine)
        self._new_session_of_engine = SessionFactory(self._session_maker)
        guard(engine)

    @staticmethod
    def of(engine: AsyncEngine) -> BorrowedEngine:
        """Return the one that stands for `engine`: a unit of work has one session for each database."""
        borrowed = _borrowed.get(engine.sync_engine)
        if borrowed is None:
            borrowed = _borrowed[engine.sync_engine] = BorrowedEngine(engine)
        return borrowed

    async def session_maker(self) -> async_sessionmaker[AsyncSession]:
        """Return a session maker for the engine."""
        return self._session_maker

    async def create_session(self) -> AsyncSession:
        """Return a new session that the caller closes."""
        return self.create_session_at_once()

    def create_session_at_once(self) -> AsyncSession:
        """Return a new session that the caller closes."""
        session = self._new_session_of_engine()
        self._follow(session, host_of(self._engine.url))
        return session

    async def engine(self) -> AsyncEngine:
        """Return the engine."""
        return self._engine

    async def close(self) -> None:
        """Do nothing: the engine is not ours."""

    def __repr__(self) -> str:
        return f"<engine {without_secrets(self._engine.url.render_as_string())}>"


# By the engine inside, as two AsyncEngines may share it.
_borrowed: WeakValueDictionary[Engine, BorrowedEngine] = WeakValueDictionary()
