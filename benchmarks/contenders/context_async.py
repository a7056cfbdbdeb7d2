"""context-async-sqlalchemy: its pure ASGI middleware, and the one on ``BaseHTTPMiddleware``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    init_db_session_ctx,
    reset_db_session_ctx,
)
from context_async_sqlalchemy.starlette_utils import StarletteHTTPDBSessionMiddleware
from sqlalchemy.ext.asyncio import async_sessionmaker
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.contenders._contender import Contender, Endpoint, Lookup, Respond
from benchmarks.database import EngineOptions, Work


class ContextAsync(Contender):
    """Its ``ASGIHTTPDBSessionMiddleware``."""

    name: ClassVar[str] = "context-async-sqlalchemy"
    remark: ClassVar[str] = "commits when the response has left"

    def __init__(self, url: str, options: EngineOptions) -> None:
        super().__init__(url, options)
        self.connection = DBConnect(
            engine_creator=lambda host: self.engine,
            session_maker_creator=lambda engine: async_sessionmaker(engine, expire_on_commit=False),
            host="benchmarks",
        )

    def middleware(self) -> list[Middleware]:
        return [Middleware(ASGIHTTPDBSessionMiddleware)]

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        connection = self.connection

        async def handle(request: Request) -> Response:
            session = await db_session(connection)
            await work(session)
            return respond()

        return handle

    @asynccontextmanager
    async def lookup(self) -> AsyncIterator[Lookup]:
        connection = self.connection

        async def ask(times: int) -> None:
            for _ in range(times):
                await db_session(connection)

        token = init_db_session_ctx()
        try:
            await db_session(connection)
            yield ask
        finally:
            await reset_db_session_ctx(token)


class ContextAsyncHTTP(ContextAsync):
    """Its middleware for Starlette."""

    name: ClassVar[str] = "context-async-sqlalchemy (http)"
    remark: ClassVar[str] = "on BaseHTTPMiddleware"

    def middleware(self) -> list[Middleware]:
        return [Middleware(StarletteHTTPDBSessionMiddleware)]
