"""`LazySessionMaker`: a session maker that is there before any engine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from ctxdb_core._databases.borrowed import BorrowedEngine
from ctxdb_core._databases.engines import Engines
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.lost_commits import note_reader
from ctxdb_core._sqlalchemy.session_factory import SessionFactory, guarded

__all__ = ["LazySessionMaker", "session_class_of", "session_without_loop"]

SessionT = TypeVar("SessionT", bound=AsyncSession)


class LazySessionMaker(async_sessionmaker[SessionT]):
    """Makes each session anew on the engine that its database has then: see `DBConnect.lazy_session_maker`."""

    def __init__(self, create: Callable[..., SessionT], find_class: Callable[[], type[SessionT]]) -> None:
        # `async_sessionmaker.__init__` would need the session class, and so an engine, now.
        self.kw = {}
        self._create = create
        self._find_class = find_class

    @property
    def class_(self) -> type[SessionT]:  # type: ignore[override]  # only read, by libraries that want to know the kind
        """The class of the sessions."""
        return self._find_class()

    def __call__(self, **local_kw: Any) -> SessionT:
        """Return a new session, which its caller closes."""
        options = {**self.kw, **local_kw}
        if "info" in self.kw and "info" in local_kw:
            options["info"] = {**cast("dict[Any, Any]", self.kw["info"]), **local_kw["info"]}
        return self._create(**options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._create.__self__!r}>"  # type: ignore[attr-defined]  # a bound method


def session_without_loop(engines: Engines, options: dict[str, Any]) -> AsyncSession:
    """Return a session that is made before any event loop runs: it is on the engine of the loop that uses it.

    Raises:
        HostNotSetError: no host is known yet.
    """
    maker = _maker_without_loop(engines)
    session = SessionFactory(maker, note_reader if engines.resolve_commits else None)(**options)
    placeholder = session.sync_session.bind

    def translate(bind: Engine | Connection) -> Engine | Connection:
        return engines.of_running_loop().engine.sync_engine if bind is placeholder else bind

    if "bind" not in options:
        guard_of(guarded(session)).translate_bind = translate
    return session


def session_class_of(engines: Engines) -> type[AsyncSession]:
    """Return the class of the sessions on a database, which is that of its session maker."""
    engine = next(iter(engines.target.engines.values()), None)
    if engine is None and not engines.target.knows_host:
        return AsyncSession
    maker = _maker_without_loop(engines) if engine is None else engine.session_maker
    return maker.class_


def _maker_without_loop(engines: Engines) -> async_sessionmaker[Any]:
    """Return a session maker whose engine is never used: it opens nothing."""
    engines.check_knows_host()
    target = engines.target
    creator = target.engine_creator
    engine = creator.engine if isinstance(creator, BorrowedEngine) else creator(target.host or "")
    return target.session_maker_creator(engine)
