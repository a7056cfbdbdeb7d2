"""Functions that create engines: how they are called, and the errors for arguments that are no such function."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ctxdb_core._databases.arguments import looks_like_url, parameters_of, why_no_engine_creator
from ctxdb_core._databases.database import Database
from ctxdb_core._databases.loop_engine import EngineCreator
from ctxdb_core._databases.url import host_of
from ctxdb_core.errors import ArgumentTypeError

__all__ = [
    "HostlessCreator",
    "check_creator_of_other",
    "check_engine_creator",
    "taking_host",
    "try_engine_options",
]


class HostlessCreator:
    """Creates engines by a function that takes no host."""

    def __init__(self, create: Callable[[], AsyncEngine]) -> None:
        self._create = create
        self._first: AsyncEngine | None = None

    def __call__(self, host: str) -> AsyncEngine:
        engine, self._first = self._first, None
        return self._create() if engine is None else engine

    def find_host(self) -> str:
        """Return the host of the engine that is created next."""
        engine: object = self._create()
        if not isinstance(engine, AsyncEngine):
            # `LoopEngine` raises the error for it.
            return "unknown"
        self._first = engine
        return host_of(engine.url)


def taking_host(creator: EngineCreator | Callable[[], AsyncEngine]) -> EngineCreator:
    """Return `creator` as a function of a host, also if it takes none."""
    if parameters_of(creator) == 0:
        return HostlessCreator(cast("Callable[[], AsyncEngine]", creator))
    return cast("EngineCreator", creator)


def try_engine_options(create: EngineCreator, host: str) -> None:
    """Create an engine that is never used, for the errors of its options.

    Raises:
        ArgumentTypeError: `create_async_engine` does not take an option.
    """
    try:
        create(host)
    except TypeError as exc:
        raise ArgumentTypeError(f"from_url() passes its options on to `create_async_engine`: {exc}") from exc


def check_engine_creator(creator: object) -> None:
    """Raise the error that says what to write if `creator` is no function that creates an engine."""
    if isinstance(creator, AsyncEngine):
        hint = "an engine is given: there is `DBConnect.from_engine(engine)` for that"
    elif isinstance(creator, Engine):
        hint = (
            "a synchronous Engine is given: make it by `sqlalchemy.ext.asyncio.create_async_engine`, for "
            "`DBConnect.from_engine(engine)`"
        )
    elif looks_like_url(creator):
        hint = "a URL is given: there is `DBConnect.from_url(url)` for that"
    elif isinstance(creator, async_sessionmaker):
        hint = (
            "a session maker is given: pass its engine, and how it makes sessions, by "
            "`DBConnect.from_engine(engine, session_maker_creator=...)`"
        )
    elif isinstance(creator, Database):
        hint = "a DBConnect is given already"
    else:
        reason = why_no_engine_creator(creator)
        if reason is None:
            return
        hint = f"{reason}, for instance `def create(host): return create_async_engine(...)`"
    raise ArgumentTypeError(f"DBConnect() takes a function that creates the engine for a host; {hint}.")


def check_creator_of_other(creator: object) -> None:
    """Raise the error that says what to pass if `creator` is no function that creates another database's engine."""
    reason: str | None
    if isinstance(creator, AsyncEngine | Engine):
        reason = "an engine is given, which serves one event loop: pass its URL, or a function that creates it"
    elif isinstance(creator, Database):
        reason = "a DBConnect is given: pass the URL that it was made from"
    else:
        reason = why_no_engine_creator(creator)
    if reason is not None:
        raise ArgumentTypeError(
            f"The URL of a database is needed here, or a function that creates an engine for a host; {reason}."
        )
