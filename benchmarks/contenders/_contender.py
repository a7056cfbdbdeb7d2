"""`Contender`: one way of giving handlers a session, and the applications that use it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp

from benchmarks.database import EngineOptions, Work, create_engine

Respond: TypeAlias = Callable[[], Response]
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

Lookup: TypeAlias = Callable[[int], Awaitable[None]]
"""Asks for the session as often as it is told to, in a loop."""


@dataclass(frozen=True)
class Route:
    """One path of an application.

    Args:
        path: where.
        respond: makes the response.
        work: what is done with the session before; ``None`` for a handler that asks for no session.
    """

    path: str
    respond: Respond
    work: Work | None = None


class Contender:
    """One way of giving handlers a session; a subclass for each.

    Each has an engine of its own: connections that several used would be warmer than those of one who is alone.

    Args:
        url: the database.
        options: the options of its engine.
    """

    name: ClassVar[str]
    """The contender's name in the tables."""
    remark: ClassVar[str] = ""
    """What a reader of the tables has to know of the contender."""

    def __init__(self, url: str, options: EngineOptions) -> None:
        self.engine = create_engine(url, options)

    def app(self, routes: Sequence[Route]) -> ASGIApp:
        """Return an application with `routes`, in which handlers are given their sessions this contender's way."""
        return Starlette(
            routes=[StarletteRoute(route.path, self._endpoint(route)) for route in routes], middleware=self.middleware()
        )

    def _endpoint(self, route: Route) -> Endpoint:
        if route.work is not None:
            return self.endpoint(route.work, route.respond)
        respond = route.respond

        async def without_database(request: Request) -> Response:
            return respond()

        return without_database

    def middleware(self) -> list[Middleware]:
        """Return the middleware that an application needs."""
        return []

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        """Return a handler that does `work` with a session, and answers."""
        raise NotImplementedError

    def lookup(self) -> AbstractAsyncContextManager[Lookup] | None:
        """Open a block that has a session, and return a loop that asks for it; ``None`` where no call asks for it."""
        return None

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()
