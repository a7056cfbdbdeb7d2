"""`Override`: a block in which a `DBConnect` leads to another database."""

from __future__ import annotations

from types import TracebackType
from typing import Generic, TypeVar

from ctxdb_core._databases.attempt_all import attempt_all
from ctxdb_core._databases.engines import Engines, Replacement
from ctxdb_core._databases.loop_engine import EngineCreator, LoopEngine
from ctxdb_core.errors import ArgumentValueError

__all__ = ["Override"]

DBT_co = TypeVar("DBT_co", covariant=True)


class Override(Generic[DBT_co]):
    """A block in which a `DBConnect` leads to another database: see `DBConnect.overridden`."""

    def __init__(self, db: DBT_co, engines: Engines, host: str | None, engine_creator: EngineCreator) -> None:
        self._db = db
        self._engines = engines
        self._host = host
        self._engine_creator = engine_creator
        self._replacement: Replacement | None = None

    def __enter__(self) -> DBT_co:
        if self._replacement is not None:
            raise ArgumentValueError("This block was entered already: call `overridden` for each block.")
        self._replacement = self._engines.replace(
            host=self._host,
            engine_creator=self._engine_creator,
            # The user's session maker, also where a testing tool has put another one in its place.
            session_maker_creator=self._engines.own_target.session_maker_creator,
            before_create_session=None,
            listeners=(),
            keeps_host=True,
        )
        return self._db

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for engine in self._put_back():
            engine.abandon()

    async def __aenter__(self) -> DBT_co:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await attempt_all([engine.retire for engine in self._put_back()])

    def _put_back(self) -> list[LoopEngine]:
        """Lead to the own database again, and return the engines of the other one."""
        assert self._replacement is not None
        return self._engines.put_back(self._replacement).all
