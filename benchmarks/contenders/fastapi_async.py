"""fastapi-async-sqlalchemy: its middleware, which works with Starlette as well."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.contenders._contender import Contender, Endpoint, Lookup, Respond
from benchmarks.database import EngineOptions, Work


class FastAPIAsync(Contender):
    """Its ``SQLAlchemyMiddleware`` with ``commit_on_exit=True``, and ``db.session`` in the handler."""

    name: ClassVar[str] = "fastapi-async-sqlalchemy"
    remark: ClassVar[str] = "on BaseHTTPMiddleware until 0.7"

    def __init__(self, url: str, options: EngineOptions) -> None:
        super().__init__(url, options)
        # A pair of its own: the ready-made one of the package is global.
        self._middleware, self._db = create_middleware_and_session_proxy()

    def middleware(self) -> list[Middleware]:
        return [Middleware(self._middleware, custom_engine=self.engine, commit_on_exit=True)]

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        db = self._db

        async def handle(request: Request) -> Response:
            await work(db.session)
            return respond()

        return handle

    @asynccontextmanager
    async def lookup(self) -> AsyncIterator[Lookup]:
        db = self._db

        async def ask(times: int) -> None:
            for _ in range(times):
                db.session  # noqa: B018 - a property that looks the session up

        # Its session maker is made together with the middleware.
        self._middleware(self.app([]), custom_engine=self.engine)
        async with db():
            yield ask
