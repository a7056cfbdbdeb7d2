"""What one writes without a library: in the handler, in a middleware, or as a FastAPI dependency; and the floor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.util import greenlet_spawn
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.contenders._contender import Contender, Endpoint, Lookup, Respond, Route
from benchmarks.database import EngineOptions, Work


class HandWritten(Contender):
    """``async with session_maker.begin()`` in the handler: what all others are compared with."""

    name: ClassVar[str] = "hand-written"

    def __init__(self, url: str, options: EngineOptions) -> None:
        super().__init__(url, options)
        self.session_maker = async_sessionmaker(self.engine, expire_on_commit=False)

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        session_maker = self.session_maker

        async def handle(request: Request) -> Response:
            async with session_maker.begin() as session:
                await work(session)
            return respond()

        return handle


class Floor(HandWritten):
    """The least that a session, a statement, a commit and a close can cost: with them alone, and no error handled."""

    name: ClassVar[str] = "floor"
    remark: ClassVar[str] = "the same round trips on the happy path alone: no error is handled, nothing is shielded"

    def middleware(self) -> list[Middleware]:
        return [Middleware(_FloorMiddleware)]

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        session_maker = self.session_maker

        async def handle(request: Request) -> Response:
            session = session_maker()
            await work(session)
            await greenlet_spawn(session.sync_session.commit)
            session.sync_session.close()
            return respond()

        return handle

    @asynccontextmanager
    async def lookup(self) -> AsyncIterator[Lookup]:
        async def ask(times: int) -> None:
            for _ in range(times):
                await _look_up("session")

        token = _floor.set({"session": self.session_maker()})
        try:
            yield ask
        finally:
            _floor.reset(token)


_floor: ContextVar[dict[str, AsyncSession]] = ContextVar("floor")


async def _look_up(key: str) -> AsyncSession:
    return _floor.get()[key]


class _FloorMiddleware:
    """A container in a context variable and a look at each message, and nothing else."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _FloorExchange(send)
        token = _floor.set(exchange.sessions)
        try:
            await self.app(scope, receive, exchange.send)
        finally:
            _floor.reset(token)


class _FloorExchange:
    __slots__ = ("forward", "sessions", "started")

    def __init__(self, forward: Send) -> None:
        self.forward = forward
        self.sessions: dict[str, AsyncSession] = {}

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.started = True
        return self.forward(message)


class HandWrittenMiddleware(HandWritten):
    """A transaction around the whole request: it is over when the response has gone."""

    name: ClassVar[str] = "hand-written middleware"
    remark: ClassVar[str] = "commits when the response has left"

    def middleware(self) -> list[Middleware]:
        return [Middleware(_TransactionMiddleware, session_maker=self.session_maker)]

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        async def handle(request: Request) -> Response:
            await work(_session.get())
            return respond()

        return handle


_session: ContextVar[AsyncSession] = ContextVar("session")


class _TransactionMiddleware:
    def __init__(self, app: ASGIApp, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self.app = app
        self.session_maker = session_maker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        async with self.session_maker.begin() as session:
            token = _session.set(session)
            try:
                await self.app(scope, receive, send)
            finally:
                _session.reset(token)


class YieldDependency(HandWritten):
    """FastAPI's own pattern: a dependency that yields the session inside its transaction."""

    name: ClassVar[str] = "FastAPI yield dependency"
    remark: ClassVar[str] = "commits when the response has left"
    depends_options: ClassVar[dict[str, Any]] = {}
    """What `Depends` is given beside the dependency."""

    def app(self, routes: Sequence[Route]) -> ASGIApp:
        session_maker = self.session_maker
        options = self.depends_options

        async def session_of_request() -> AsyncIterator[AsyncSession]:
            async with session_maker.begin() as session:
                yield session

        app = FastAPI()
        for route in routes:
            app.add_api_route(route.path, _fastapi_endpoint(route, session_of_request, options), response_model=None)
        return app


def _fastapi_endpoint(
    route: Route, session_of_request: Callable[[], AsyncIterator[AsyncSession]], options: dict[str, Any]
) -> Callable[..., Awaitable[Response]]:
    work, respond = route.work, route.respond
    if work is None:

        async def without_database() -> Response:
            return respond()

        return without_database

    async def handle(session: AsyncSession) -> Response:
        await work(session)
        return respond()

    # FastAPI resolves annotations in the module's namespace, where the dependency of this very application is not.
    handle.__annotations__ = {
        "session": Annotated[AsyncSession, Depends(session_of_request, **options)],
        "return": Response,
    }
    return handle
