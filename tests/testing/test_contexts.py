"""A test's own unit of work, and sessions whose work is rolled back."""

from __future__ import annotations

import gc
import warnings

import httpx
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tests.support.database import Database, Item, insert
from tests.support.stacks import Endpoint

from ctxdb_core import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    TransactionContext,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    on_commit,
)
from ctxdb_core.adapters import is_context_initiated
from ctxdb_core.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from ctxdb_starlette import DBSessionMiddleware


async def test_a_rollback_session_keeps_nothing(db: DBConnect, database: Database) -> None:
    async with rollback_session(db) as session:
        session.add(Item(name="one"))
        await session.flush()
    assert await database.names() == []


async def test_a_rollback_session_keeps_nothing_that_was_committed_in_it(db: DBConnect, database: Database) -> None:
    async with rollback_session(db) as session:
        session.add(Item(name="one"))
        await session.commit()
        session.add(Item(name="two"))
        await session.rollback()
        assert (await session.scalars(select(Item.name))).all() == ["one"]
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
async def test_a_rollback_session_keeps_nothing_where_the_driver_begins_no_transaction(database: Database) -> None:
    options = {"isolation_level": None}
    async with DBConnect.from_url(database.url, connect_args=options) as db, rollback_session(db) as session:
        session.add(Item(name="one"))
        await session.commit()
    assert await database.names() == []


async def test_a_rollback_session_lets_the_error_of_the_block_out(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with rollback_session(db) as session:
            session.add(Item(name="one"))
            await session.commit()
            raise LookupError
    assert await database.names() == []


async def test_a_rollback_session_of_a_read_only_database_reads(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as db, rollback_session(db) as session:
        assert (await session.scalars(select(Item.name))).all() == []


async def test_a_test_context_that_closes_commits_what_is_open(db: DBConnect, database: Database) -> None:
    called: list[str] = []
    async with set_test_context(auto_close=True):
        session = await insert(db, "one")
        on_commit(db, lambda: called.append("committed"))
    assert await database.names() == ["one"]
    assert called == ["committed"]
    with pytest.raises(ContextClosedError):
        await session.execute(text("SELECT 1"))


async def test_a_test_context_that_closes_rolls_back_when_the_block_raises(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with set_test_context(auto_close=True):
            await insert(db, "one")
            raise LookupError
    assert await database.names() == []
    assert not is_context_initiated()


async def test_a_test_context_leaves_its_sessions_to_the_test(db: DBConnect, database: Database) -> None:
    async with set_test_context():
        session = await insert(db, "one")
    assert not is_context_initiated()
    assert (await session.scalars(select(Item.name))).all() == ["one"]
    await session.rollback()
    await session.close()
    assert await database.names() == []


async def test_a_session_that_a_test_forgets_in_mid_transaction_is_warned_of(database: Database) -> None:
    async def forget(db: DBConnect) -> None:
        async with set_test_context():
            # The transaction has begun without a connection, of which SQLAlchemy would warn as well.
            await (await db_session(db)).begin()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with DBConnect.from_url(database.url) as db:
            await forget(db)
            gc.collect()
    messages = [str(warning.message) for warning in caught]
    assert any("set_test_context" in message and "auto_close=True" in message for message in messages), messages


async def test_a_session_that_a_test_has_ended_is_not_warned_of(db: DBConnect) -> None:
    async def work() -> None:
        async with set_test_context():
            session = await insert(db, "one")
        await session.rollback()

    async def read_nothing() -> None:
        async with set_test_context():
            await db_session(db)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        await work()
        await read_nothing()
        gc.collect()
    assert not [warning for warning in caught if "set_test_context" in str(warning.message)]


async def test_a_session_that_is_made_without_an_await_is_on_the_tests_connection(
    db: DBConnect, database: Database
) -> None:
    context = TransactionContext(db)
    async with rollback_session(db) as session:
        async with set_test_context(), put_savepoint_session_in_ctx(db, session):
            await close_db_session(db)
            context.get_session().add(Item(name="one"))
            await commit_db_session(db)
        assert (await session.scalars(select(Item.name))).all() == ["one"]
    assert await database.names() == []


async def post(endpoint: Endpoint) -> int:
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return (await client.post("/")).status_code


async def test_a_middleware_joins_the_tests_unit_of_work(db: DBConnect, database: Database) -> None:
    async def endpoint(request: Request) -> Response:
        await insert(db, "one")
        return PlainTextResponse("")

    async with set_test_context():
        assert await post(endpoint) == 200
        session = await db_session(db)
        assert (await session.scalars(select(Item.name))).all() == ["one"]
        assert await database.names() == []
        await close_db_session(db)
    assert await database.names() == []


async def test_the_applications_commits_release_savepoints_that_the_test_sees(
    db: DBConnect, database: Database
) -> None:
    async def endpoint(request: Request) -> Response:
        await insert(db, "one")
        await commit_db_session(db)
        with pytest.raises(IntegrityError):
            await insert(db, "one")
        await (await db_session(db)).rollback()
        await close_db_session(db)
        await insert(db, "two")
        await commit_db_session(db)
        return PlainTextResponse("")

    async with rollback_session(db) as session:
        session.add(Item(name="prepared"))
        await session.flush()
        async with set_test_context(), put_savepoint_session_in_ctx(db, session):
            assert await post(endpoint) == 200
        assert set((await session.scalars(select(Item.name))).all()) == {"prepared", "one", "two"}
    assert await database.names() == []


async def test_a_savepoint_session_is_put_into_test_contexts_only(db: DBConnect) -> None:
    async with rollback_session(db) as session, new_db_ctx():
        with pytest.raises(ContextNotInitiatedError, match="set_test_context"):
            async with put_savepoint_session_in_ctx(db, session):
                pytest.fail("the block was entered")
