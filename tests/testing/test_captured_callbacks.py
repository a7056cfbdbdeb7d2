"""Callbacks of `on_commit` that a test captures."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tests.support.database import Database, insert

from ctxdb_core import DBConnect, commit_db_session, db_session, new_db_ctx, on_commit, run_in_new_ctx
from ctxdb_core.testing import capture_on_commit, shared_transaction
from ctxdb_starlette import DBSessionMiddleware


@pytest.fixture
def sent() -> list[str]:
    return []


async def test_a_callback_is_captured_once_its_commit_has_succeeded(db: DBConnect, sent: list[str]) -> None:
    with capture_on_commit(db) as callbacks:
        async with new_db_ctx():
            await insert(db, "one")
            on_commit(db, lambda: sent.append("one"))
            assert callbacks == []
        assert len(callbacks) == 1
    assert sent == []


async def test_a_callback_of_what_is_rolled_back_is_not_captured(db: DBConnect) -> None:
    with capture_on_commit(db) as callbacks:
        with suppress(LookupError):
            async with new_db_ctx():
                on_commit(db, lambda: None)
                raise LookupError
        async with new_db_ctx():
            with suppress(LookupError):
                async with (await db_session(db)).begin_nested():
                    on_commit(db, lambda: None)
                    raise LookupError
    assert callbacks == []


async def test_captured_callbacks_are_run_in_units_of_work_of_their_own(
    db: DBConnect, database: Database, sent: list[str]
) -> None:
    async def write() -> None:
        await insert(db, "by callback")

    with capture_on_commit(db) as callbacks:
        async with new_db_ctx():
            await insert(db, "one")
            on_commit(db, lambda: sent.append("one"))
            on_commit(db, write)
        await callbacks.run()
        assert callbacks == []
    assert sent == ["one"]
    assert await database.names() == ["by callback", "one"]


async def test_the_error_of_a_captured_callback_is_raised_where_it_is_run(db: DBConnect, sent: list[str]) -> None:
    async def fail() -> None:
        raise LookupError

    with capture_on_commit(db) as callbacks:
        async with new_db_ctx():
            on_commit(db, fail)
            on_commit(db, lambda: sent.append("second"))
        with pytest.raises(LookupError):
            await callbacks.run()
        await callbacks.run()
    assert sent == ["second"]


async def test_callbacks_of_other_databases_and_after_the_block_run(
    db: DBConnect, database: Database, sent: list[str]
) -> None:
    async with DBConnect.from_url(database.url) as other:
        with capture_on_commit(db) as callbacks:
            async with new_db_ctx():
                on_commit(other, lambda: sent.append("other"))
        async with new_db_ctx():
            on_commit(db, lambda: sent.append("after"))
    assert callbacks == []
    assert sent == ["other", "after"]


async def test_the_innermost_block_captures(db: DBConnect) -> None:
    with capture_on_commit(db) as outer:
        with capture_on_commit(db) as inner:
            async with new_db_ctx():
                on_commit(db, lambda: None)
        assert (len(outer), len(inner)) == (0, 1)
        async with new_db_ctx():
            on_commit(db, lambda: None)
        assert (len(outer), len(inner)) == (1, 1)


async def test_early_commits_and_other_event_loops_are_captured(db: DBConnect) -> None:
    async def work() -> None:
        await insert(db, "one")
        on_commit(db, lambda: None)
        await commit_db_session(db)
        on_commit(db, lambda: None)

    with capture_on_commit(db) as callbacks:
        await asyncio.to_thread(asyncio.run, run_in_new_ctx(work))
    assert len(callbacks) == 2


async def test_callbacks_of_a_request_are_there_with_its_response(db: DBConnect, sent: list[str]) -> None:
    async def endpoint(request: Request) -> PlainTextResponse:
        await insert(db, "one")
        on_commit(db, lambda: sent.append("mail"))
        return PlainTextResponse("", int(request.query_params["status"]))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with shared_transaction(db), client:
        for status, captured in ((409, 0), (201, 1)):
            with capture_on_commit(db) as callbacks:
                await client.post(f"/?status={status}")
                assert len(callbacks) == captured
    assert sent == []
