"""Which session class public functions return, and what events hold: checked by mypy and pyright, and never run."""

from __future__ import annotations

from typing import Annotated, Any, assert_type

from aiohttp import web
from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from starlette.applications import Starlette

import ctxdb_aiohttp
from ctxdb_core import (
    DBConnect,
    TransactionContext,
    atomic_db_session,
    close_db_session,
    db_session,
    joining_session,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_begin,
    on_commit,
    transactional,
)
from ctxdb_core.events import DBEvent, TransactionCommitted
from ctxdb_core.testing import put_savepoint_session_in_ctx, rollback_session, shared_transaction
from ctxdb_litestar import CtxDBPlugin
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown, provide_session

URL = "postgresql+asyncpg://localhost/shop"


class ShopSession(AsyncSession):
    """Stands for a session class with a method of its own, as SQLModel's `exec`."""

    async def exec(self, statement: str) -> int:
        raise NotImplementedError


def make(engine: AsyncEngine) -> async_sessionmaker[ShopSession]:
    return async_sessionmaker(engine, class_=ShopSession, expire_on_commit=False)


def create(host: str) -> AsyncEngine:
    return create_async_engine(URL)


def create_without_host() -> AsyncEngine:
    return create_async_engine(URL)


plain = DBConnect.from_url(URL)
shop = DBConnect.from_url(URL, session_maker_creator=make, pool_size=5)

assert_type(plain, DBConnect[AsyncSession])
assert_type(shop, DBConnect[ShopSession])
assert_type(DBConnect(create, host="h"), DBConnect[AsyncSession])
assert_type(DBConnect(create, make, "h"), DBConnect[ShopSession])
assert_type(DBConnect(create, session_maker_creator=make), DBConnect[ShopSession])
assert_type(DBConnect(create_without_host), DBConnect[AsyncSession])
assert_type(DBConnect.from_engine(create_async_engine(URL)), DBConnect[AsyncSession])
assert_type(DBConnect.from_engine(create_async_engine(URL), session_maker_creator=make), DBConnect[ShopSession])
assert_type(shop.lazy_session_maker, async_sessionmaker[ShopSession])


async def functions() -> None:
    assert_type(await db_session(plain), AsyncSession)
    assert_type(await db_session(shop), ShopSession)
    assert_type(await (await db_session(shop)).exec("SELECT 1"), int)
    assert_type(await shop.create_session(), ShopSession)
    assert_type(await shop.session_maker(), async_sessionmaker[ShopSession])
    assert_type(await shop.engine(), AsyncEngine)
    async with atomic_db_session(shop) as session:
        assert_type(session, ShopSession)
    async with new_non_ctx_session(shop) as session:
        assert_type(session, ShopSession)
    async with new_non_ctx_atomic_session(shop) as session:
        assert_type(session, ShopSession)
    async with joining_session(shop) as session:
        assert_type(session, ShopSession)
    async with shop.overridden(URL) as other:
        assert_type(other, DBConnect[ShopSession])
    async with shop as same:
        assert_type(same, DBConnect[ShopSession])


async def set_role(session: ShopSession) -> None:
    await session.exec("SET LOCAL ROLE customer")


@transactional(shop)
async def order(count: int) -> str:
    on_begin(shop, set_role)
    on_commit(shop, lambda: None)
    return str(count)


async def contexts(engine: AsyncEngine) -> None:
    assert_type(await order(5), str)
    assert_type(TransactionContext(engine), TransactionContext[AsyncSession])
    assert_type(TransactionContext(engine, default_session_maker=make(engine)), TransactionContext[ShopSession])
    context = TransactionContext(shop, auto_context_on_execute=True)
    assert_type(context, TransactionContext[ShopSession])
    assert_type(context.get_session(), ShopSession)
    assert_type(context.get_session(strict=False), ShopSession | None)
    async with context.transaction() as session:
        assert_type(session, ShopSession)
    async with context.new_session() as session:
        assert_type(session, ShopSession)


async def tools() -> None:
    async with shared_transaction(shop, plain) as session:
        assert_type(session, ShopSession)
    async with rollback_session(shop) as session:
        assert_type(session, ShopSession)
        async with put_savepoint_session_in_ctx(shop, session) as applications:
            assert_type(applications, ShopSession)


async def endpoint(session: Annotated[ShopSession, Depends(provide_session(shop))]) -> int:
    return await session.exec("SELECT 1")


async def of_any_database(db: DBConnect) -> AsyncSession:
    await close_db_session(db)
    return await db_session(db)


async def check(session: ShopSession) -> None:
    await session.exec("SELECT 1")


async def adapters() -> None:
    assert_type(await provide_session(shop)(), ShopSession)
    assert_type(await of_any_database(shop), AsyncSession)
    databases: list[DBConnect[Any]] = [shop, plain]
    close_on_shutdown(*databases)
    CtxDBPlugin(plain, session=shop, before_commit=check)
    Starlette().add_middleware(DBSessionMiddleware, before_commit=check)
    ctxdb_aiohttp.setup(web.Application(), shop, before_commit=check)
    async with new_db_ctx(before_commit=check):
        pass


def hear(event: DBEvent) -> None:
    assert_type(event.db, DBConnect[Any])
    assert_type(event.db.host, str | None)
    if isinstance(event, TransactionCommitted):
        assert_type(event.duration, float)


def check_events() -> None:
    DBConnect.from_url(URL, session_maker_creator=make).on_event(hear)
