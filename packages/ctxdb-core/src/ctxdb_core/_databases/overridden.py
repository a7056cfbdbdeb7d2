"""`Override`: a block in which a `DBConnect` leads to another database."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from ctxdb_core._databases.attempt_all import attempt_all
from ctxdb_core._databases.engines import Engines
from ctxdb_core._databases.loop_engine import EngineCreator
from ctxdb_core.errors import ArgumentValueError

__all__ = ["Override", "override"]

DBT = TypeVar("DBT")
DBT_co = TypeVar("DBT_co", covariant=True)


class Overridden(Protocol):
    """A database that is replaced by another one, until one of these methods is called."""

    def abandon(self) -> None:
        """Put the database back, and let go of the other one's engines without waiting for anything."""

    async def retire(self) -> None:
        """Put the database back, and wait until the idle connections of the other one are closed."""


class Override(Generic[DBT_co]):
    """A block in which a `DBConnect` leads to another database: see `DBConnect.overridden`.

    Args:
        db: the `DBConnect`, which ``with`` returns.
        begin: makes the `DBConnect` lead to the other database.
    """

    def __init__(self, db: DBT_co, begin: Callable[[], Overridden]) -> None:
        self._db = db
        self._begin = begin
        self._overridden: Overridden | None = None

    def __enter__(self) -> DBT_co:
        if self._overridden is not None:
            raise ArgumentValueError("This block was entered already: call `overridden` for each block.")
        self._overridden = self._begin()
        return self._db

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._overridden is not None
        self._overridden.abandon()

    async def __aenter__(self) -> DBT_co:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._overridden is not None
        await self._overridden.retire()


def override(db: DBT, engines: Engines, host: str | None, engine_creator: EngineCreator) -> Override[DBT]:
    """Return a block in which `db` leads to another database.

    Args:
        db: the `DBConnect`.
        engines: its engines.
        host: the host that `engine_creator` is called with.
        engine_creator: creates the engines of the other database.
    """
    return Override(db, lambda: _OverriddenEngines(engines, host, engine_creator))


class _OverriddenEngines:
    def __init__(self, engines: Engines, host: str | None, engine_creator: EngineCreator) -> None:
        self._engines = engines
        self._replacement = engines.replace(
            host=host,
            engine_creator=engine_creator,
            # The user's session maker, also where a testing tool has put another one in its place.
            session_maker_creator=engines.own_target.session_maker_creator,
            before_create_session=None,
            listeners=(),
            keeps_host=True,
        )

    def abandon(self) -> None:
        for engine in self._engines.put_back(self._replacement).all:
            engine.abandon()

    async def retire(self) -> None:
        await attempt_all([engine.retire for engine in self._engines.put_back(self._replacement).all])
