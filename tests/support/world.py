"""What a scenario has at hand: an application under test, its database, and a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
import websockets
from tests.support.adapters import IN_PROCESS, Adapter
from tests.support.application import Application, Handler, Reply, Stream
from tests.support.database import Database
from tests.support.server import RawClient, http_client

from ctxdb_core import DBConnect


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
        self.base_url = IN_PROCESS
        self._stack = stack

    async def start(self, *routes: tuple[str, Handler]) -> httpx.AsyncClient:
        """Build the application, serve it, and return a client for it."""
        self.application.routes.update(routes)
        adapter = self.setting.adapter
        app = adapter.build(self.application)
        if not self.setting.over_sockets:
            client = await self._stack.enter_async_context(adapter.call_in_process(app))
            self.base_url = str(client.base_url)
            return client
        self.base_url = await self._stack.enter_async_context(adapter.serve(app))
        return await self._stack.enter_async_context(http_client(self.base_url))

    async def stop(self) -> None:
        """Shut the server down."""
        await self._stack.aclose()

    async def get(self, handler: Callable[[], Awaitable[Reply | Stream]]) -> httpx.Response:
        """Serve one handler, and request it once."""
        client = await self.start(("/", handler))
        return await client.get("/")

    async def statuses(self, client: httpx.AsyncClient, paths: Sequence[str]) -> list[int]:
        """Request all `paths` at once, and return the statuses in their order."""
        if self.base_url != IN_PROCESS:
            return await asyncio.gather(*(self._status(path) for path in paths))
        return [response.status_code for response in await asyncio.gather(*(client.get(path) for path in paths))]

    async def _status(self, path: str) -> int:
        # httpx looks through all of its requests at each step of one of them.
        async with RawClient.connect(self.base_url) as client:
            await client.send(path)
            return await client.read_head()

    def open_socket(self, path: str = "/") -> websockets.connect:
        """Return the connection of a websocket client, to be entered, once the application was started."""
        return websockets.connect(f"{self.base_url.replace('http', 'ws', 1)}{path}", proxy=None)

    async def names(self) -> list[str]:
        return await self.database.names()


@asynccontextmanager
async def open_world(setting: Setting, database: Database) -> AsyncIterator[World]:
    """Provide what a scenario has at hand; check at its end that nothing of it is left on the database."""
    async with database.connect() as db, AsyncExitStack() as stack:
        yield World(setting, database, db, stack)
        # Stopping the server and closing the engines would hide what is still in use.
        await database.assert_quiet()
