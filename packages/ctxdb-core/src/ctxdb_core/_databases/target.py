"""`Target`: where a `DBConnect` leads, as one value that never changes and may be replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core._databases.engine_creators import HostlessCreator
from ctxdb_core._databases.loop_engine import EngineCreator, LoopEngine, SessionMakerCreator

__all__ = ["NO_ENGINES", "EngineListener", "LoopEngines", "Target"]

EngineListener: TypeAlias = Callable[[str, AsyncEngine], object]
"""Called with a host and the engine that was made for it."""

LoopEngines: TypeAlias = Mapping[asyncio.AbstractEventLoop, LoopEngine]
"""The engines of one host. They are replaced as a whole and never changed in place, as they are read without a lock."""

NO_ENGINES: Mapping[Any, Any] = MappingProxyType({})


class Target(NamedTuple):
    """Where a `DBConnect` leads, and how it makes engines and sessions: all that may be replaced for a while."""

    engine_creator: EngineCreator
    session_maker_creator: SessionMakerCreator
    host: str | None = None
    before_create_session: Callable[[Any], Awaitable[object]] | None = None
    """Awaited with the `DBConnect` before each session is made."""
    keeps_host: bool = False
    """Whether `change_host` does nothing."""
    listeners: tuple[EngineListener, ...] = ()
    engines: LoopEngines = NO_ENGINES
    """The engines of `host`."""
    kept: Mapping[str, LoopEngines] = NO_ENGINES
    """The engines of other hosts that are going to be used again."""

    @property
    def all(self) -> list[LoopEngine]:
        """Each engine."""
        return [engine for engines in (self.engines, *self.kept.values()) for engine in engines.values()]

    @property
    def knows_host(self) -> bool:
        """Whether an engine can be made."""
        return self.host is not None or isinstance(self.engine_creator, HostlessCreator)
