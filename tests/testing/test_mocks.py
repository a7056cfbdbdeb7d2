"""Mocks in the place of sessions."""

from __future__ import annotations

from unittest.mock import AsyncMock, Mock, create_autospec

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tests.support.database import Item

from ctxdb_core import (
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    rollback_db_session,
)
from ctxdb_core.testing import put_session_in_ctx, set_test_context
from ctxdb_starlette import DBSessionMiddleware


@pytest.fixture
def db() -> DBConnect:
    """A database that nobody can reach."""
    return DBConnect.from_url("postgresql+asyncpg://nobody@db.invalid/shop")


@pytest.fixture(params=["spec", "autospec", "bare"])
def session(request: pytest.FixtureRequest) -> AsyncMock:
    if request.param == "spec":
        return AsyncMock(spec=AsyncSession)
    mock: AsyncMock = AsyncMock() if request.param == "bare" else create_autospec(AsyncSession, instance=True)
    return mock


async def names(db: DBConnect) -> list[str]:
    return list((await (await db_session(db)).scalars(select(Item.name))).all())


async def test_a_mock_is_the_session_and_answers_as_it_is_told(db: DBConnect, session: AsyncMock) -> None:
    session.scalars.return_value = Mock(all=Mock(return_value=["one"]))
    async with set_test_context(), put_session_in_ctx(db, session) as same:
        assert same is session
        assert await names(db) == ["one"]
        assert await db_session(db) is session
    session.scalars.assert_awaited_once()
    session.commit.assert_not_called()
    session.close.assert_not_called()


@pytest.mark.parametrize("auto_close", [True, False])
async def test_a_test_context_calls_nothing_of_a_mock_at_its_end(
    db: DBConnect, session: AsyncMock, auto_close: bool
) -> None:
    async with set_test_context(auto_close=auto_close), put_session_in_ctx(db, session):
        await db_session(db)
    assert session.mock_calls == []


async def test_early_ends_call_the_methods_of_the_mock(db: DBConnect, session: AsyncMock) -> None:
    async with set_test_context(), put_session_in_ctx(db, session):
        await commit_db_session(db)
        await rollback_db_session(db)
        await close_db_session(db)
        assert await db_session(db) is session
    assert [call[0] for call in session.mock_calls] == ["commit", "rollback", "close"]


async def test_the_blocks_of_atomic_db_session_end_by_the_mocks_commit_and_rollback(
    db: DBConnect, session: AsyncMock
) -> None:
    async with set_test_context(), put_session_in_ctx(db, session):
        async with atomic_db_session(db) as same:
            assert same is session
        session.commit.assert_awaited_once_with()
        with pytest.raises(LookupError):
            async with atomic_db_session(db):
                raise LookupError
        session.rollback.assert_awaited_once_with()
        session.commit.assert_awaited_once_with()


async def test_a_handler_behind_the_middleware_gets_the_mock(db: DBConnect, session: AsyncMock) -> None:
    async def endpoint(request: Request) -> PlainTextResponse:
        (await db_session(db)).add(Item(name="one"))
        return PlainTextResponse("", 201)

    session.add = Mock()
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with set_test_context(), put_session_in_ctx(db, session), client:
        assert (await client.post("/")).status_code == 201
    session.add.assert_called_once()


async def test_a_mock_is_the_session_inside_of_its_block_alone(db: DBConnect, session: AsyncMock) -> None:
    async with set_test_context():
        async with put_session_in_ctx(db, session):
            pass
        real = await db_session(db)
        assert isinstance(real, AsyncSession)
        assert real is not session
        await close_db_session(db)


async def test_a_mock_needs_a_test_context(db: DBConnect, session: AsyncMock) -> None:
    async with new_db_ctx():
        with pytest.raises(ContextNotInitiatedError, match=r"put_session_in_ctx\(\) needs the unit of work of a test"):
            async with put_session_in_ctx(db, session):
                pytest.fail("the block was entered")
