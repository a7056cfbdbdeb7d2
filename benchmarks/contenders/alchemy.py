"""advanced-alchemy: its Starlette extension."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

from advanced_alchemy.extensions.starlette import AdvancedAlchemy, AsyncSessionConfig, SQLAlchemyAsyncConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp

from benchmarks.contenders._contender import Contender, Endpoint, Lookup, Respond, Route
from benchmarks.database import Work


class AdvancedAlchemyStarlette(Contender):
    """Its Starlette extension with ``commit_mode="autocommit"``."""

    name: ClassVar[str] = "advanced-alchemy"
    remark: ClassVar[str] = "commits when the response has left"

    def app(self, routes: Sequence[Route]) -> ASGIApp:
        alchemy = self._extension()
        app = Starlette(routes=[StarletteRoute(route.path, self._alchemy_endpoint(alchemy, route)) for route in routes])
        alchemy.init_app(app)
        return app

    def _extension(self) -> AdvancedAlchemy:
        return AdvancedAlchemy(
            SQLAlchemyAsyncConfig(
                engine_instance=self.engine,
                session_config=AsyncSessionConfig(expire_on_commit=False),
                commit_mode="autocommit",
            )
        )

    def _alchemy_endpoint(self, alchemy: AdvancedAlchemy, route: Route) -> Endpoint:
        if route.work is None:
            return self._endpoint(route)
        work: Work = route.work
        respond: Respond = route.respond

        async def handle(request: Request) -> Response:
            session = alchemy.get_async_session(request)
            await work(session)
            return respond()

        return handle

    @asynccontextmanager
    async def lookup(self) -> AsyncIterator[Lookup]:
        alchemy = self._extension()
        alchemy.init_app(Starlette())
        request = Request({"type": "http"})

        async def ask(times: int) -> None:
            for _ in range(times):
                alchemy.get_async_session(request)

        session = alchemy.get_async_session(request)
        try:
            yield ask
        finally:
            await session.close()
