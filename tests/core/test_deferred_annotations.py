"""Functions whose annotations name what only type checkers import, as they may from Python 3.14 on (PEP 649)."""

# There is no `from __future__ import annotations` here: with that, no annotation is evaluated on any Python.

import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util import greenlet_spawn

from ctxdb_core import DBConnect, db_session, new_db_ctx
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import Request

pytestmark = pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated where they are written")


async def test_a_commit_policy_is_asked_for_its_parameters_alone() -> None:
    def commit(status: int, request: Request) -> bool:
        return True

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    ASGIHTTPDBSessionMiddleware(app, commit_policy=commit)


async def test_the_functions_of_a_database_are_asked_for_their_parameters_alone() -> None:
    def make_engine(host: str) -> AsyncEngine:
        return create_async_engine("sqlite+aiosqlite://")

    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=False)

    async with DBConnect(make_engine, make, "here") as db, new_db_ctx():
        await (await db_session(db)).connection()


async def test_the_methods_of_a_session_class_are_not_asked_for_their_annotations() -> None:
    class Session(AsyncSession):
        async def count(self, *requests: Request) -> int:
            return await greenlet_spawn(len, requests)

    def make(engine: Any) -> async_sessionmaker[Session]:
        return async_sessionmaker(engine, class_=Session)

    async with DBConnect.from_url("sqlite+aiosqlite://", session_maker_creator=make) as db, new_db_ctx():
        assert await (await db_session(db)).count() == 0
