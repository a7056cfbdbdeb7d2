"""`reads_from`: the code asks for one database, and gets sessions of another one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker
from tests.support.database import Database

from ctxdb_core import DBConnect, TransactionContext, db_session, joining_session, run_in_new_ctx
from ctxdb_core.adapters import begin, finalize
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware


@pytest.fixture
async def main(database: Database) -> AsyncIterator[DBConnect]:
    async with DBConnect(lambda host: database.watch_new(), host="main") as db:
        yield db


@pytest.fixture
async def reader(database: Database) -> AsyncIterator[DBConnect]:
    async with DBConnect(lambda host: database.watch_new(), host="reader") as db:
        yield db


async def is_session_of(session: Any, db: DBConnect) -> bool:
    return session.bind is await db.engine()


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "POST", "PUT", "PATCH", "DELETE", "UNKNOWN"])
async def test_a_request_has_the_sessions_of_the_reader_if_its_method_is_safe(
    main: DBConnect, reader: DBConnect, method: str
) -> None:
    found: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = await db_session(main)
        assert await db_session(main) is session
        await session.execute(text("SELECT 1"))
        found.append(await is_session_of(session, reader))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    transport = httpx.ASGITransport(ASGIHTTPDBSessionMiddleware(app, reads_from={main: reader}))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.request(method, "/")).status_code == 204
    assert found == [method in {"GET", "HEAD", "OPTIONS", "TRACE"}]


async def test_a_session_that_is_made_at_once_belongs_to_the_reader(main: DBConnect, reader: DBConnect) -> None:
    unit = begin(reads_from={main: reader})
    assert unit is not None
    session = TransactionContext(main).get_session()
    assert await is_session_of(session, reader)
    assert session is await db_session(main)
    await finalize(unit, commit=True)


async def test_a_context_with_a_session_maker_has_the_sessions_of_the_reader(
    main: DBConnect, reader: DBConnect
) -> None:
    unit = begin(reads_from={main: reader})
    assert unit is not None
    async with TransactionContext(main, default_session_maker=async_sessionmaker()).session() as session:
        assert await is_session_of(session, reader)
    await finalize(unit, commit=True)


async def test_a_joining_session_asks_nothing_of_the_database_that_is_not_read_from(
    reader: DBConnect, database: Database
) -> None:
    async def refuse(db: DBConnect) -> None:
        raise AssertionError

    main = DBConnect(lambda host: database.watch_new(), host="main", before_create_session_handler=refuse)
    unit = begin(reads_from={main: reader})
    assert unit is not None
    async with joining_session(main) as session:
        assert (await session.execute(text("SELECT 1"))).scalar_one() == 1
    await finalize(unit, commit=True)


async def test_a_database_that_is_overridden_alone_has_no_reader(
    main: DBConnect, reader: DBConnect, database: Database
) -> None:
    async with main.overridden(lambda host: database.watch_new()):
        unit = begin(reads_from={main: reader})
        assert unit is not None
        assert await is_session_of(await db_session(main), main)
        await finalize(unit, commit=True)


async def test_a_unit_of_work_inside_takes_no_second_connection_of_the_pool_of_the_reader(
    main: DBConnect, reader: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async def write() -> bool:
        session = await db_session(main)
        await session.execute(text("SELECT 1"))
        return await is_session_of(session, main)

    unit = begin(reads_from={main: reader})
    assert unit is not None
    await (await db_session(main)).execute(text("SELECT 1"))
    with caplog.at_level(logging.WARNING, "ctxdb"):
        assert await run_in_new_ctx(write)
    assert caplog.records == []
    await finalize(unit, commit=True)
