"""What a scenario has at hand: an application under test, its database, and a client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import httpx
from tests.support.adapters import Adapter
from tests.support.application import Application, Handler, Reply, Stream
from tests.support.database import Database
from tests.support.server import serve

from ctxdb_core import DBConnect
from ctxdb_core.asgi import ASGIApp


@dataclass(frozen=True)
class Setting:
    """Where a scenario runs."""

    adapter: Adapter
    database_kind: str
    over_sockets: bool

    def __str__(self) -> str:
        return f"{self.adapter.name}-{'sockets' if self.over_sockets else 'in_process'}-{self.database_kind}"


class World:
    """An application under test, its database, and a client."""

    def __init__(self, setting: Setting, database: Database, db: DBConnect, stack: AsyncExitStack) -> None:
        self.setting = setting
        self.database = database
        self.db = db
        self.application = Application(dbs=(db,))
        self.base_url = "http://test"
        self._stack = stack

    async def start(self, *routes: tuple[str, Handler]) -> httpx.AsyncClient:
        """Build the application, serve it, and return a client for it."""
        return await self.start_with(self.setting.adapter.build, *routes)

    async def start_with(
        self, build: Callable[[Application], ASGIApp], *routes: tuple[str, Handler]
    ) -> httpx.AsyncClient:
        """Do the same with another way of building."""
        self.application.routes.update(routes)
        app = build(self.application)
        if self.setting.over_sockets:
            self.base_url = await self._stack.enter_async_context(serve(app))
            client = httpx.AsyncClient(base_url=self.base_url)
        else:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url=self.base_url)
        return await self._stack.enter_async_context(client)

    async def stop(self) -> None:
        """Shut the server down."""
        await self._stack.aclose()

    async def get(self, handler: Callable[[], Awaitable[Reply | Stream]]) -> httpx.Response:
        """Serve one handler, and request it once."""
        client = await self.start(("/", handler))
        return await client.get("/")

    async def names(self) -> list[str]:
        return await self.database.names()
