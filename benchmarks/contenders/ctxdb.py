"""ctxdb, with an ordinary database and with a read-only one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.contenders._contender import Contender, Endpoint, Lookup, Respond
from benchmarks.database import EngineOptions, Work
from ctxdb_core import DBConnect, db_session, new_db_ctx
from ctxdb_starlette import DBSessionMiddleware


class CtxDB(Contender):
    """`DBSessionMiddleware`, and `db_session` in the handler."""

    name: ClassVar[str] = "ctxdb"
    read_only: ClassVar[bool] = False

    def __init__(self, url: str, options: EngineOptions) -> None:
        self.db = DBConnect.from_url(url, read_only=self.read_only, **options)

    def middleware(self) -> list[Middleware]:
        return [Middleware(DBSessionMiddleware)]

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        db = self.db

        async def handle(request: Request) -> Response:
            session = await db_session(db)
            await work(session)
            return respond()

        return handle

    @asynccontextmanager
    async def lookup(self) -> AsyncIterator[Lookup]:
        db = self.db

        async def ask(times: int) -> None:
            for _ in range(times):
                await db_session(db)

        async with new_db_ctx():
            await db_session(db)
            yield ask

    async def close(self) -> None:
        await self.db.close()


class CtxDBReadOnly(CtxDB):
    """The same, on a `DBConnect` that only reads."""

    name: ClassVar[str] = "ctxdb, read_only"
    read_only: ClassVar[bool] = True


class CtxDBResolving(CtxDB):
    """The same, which has PostgreSQL asked what became of a commit whose answer is lost."""

    name: ClassVar[str] = "ctxdb, resolve_commits"

    def __init__(self, url: str, options: EngineOptions) -> None:
        self.db = DBConnect.from_url(url, resolve_commits=True, **options)


class CtxDBObserved(CtxDB):
    """The same, with a listener, and with a limit for holding connections that is never reached."""

    name: ClassVar[str] = "ctxdb, observed"

    def __init__(self, url: str, options: EngineOptions) -> None:
        self.db = DBConnect.from_url(url, warn_connection_held_after=3600, **options)
        self.db.on_event(lambda event: None)
