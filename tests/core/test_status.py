"""`DBConnect.status`, and what a unit of work tells its watchers."""

from __future__ import annotations

import asyncio
import gc
import logging
import warnings
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import NullPool
from tests.support.connection import START, Connection
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit

from ctxdb_core import (
    DBConnect,
    close_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from ctxdb_core.adapters import Headers, begin, finalize, running_unit
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware, Message


class Watcher:
    def __init__(self, headers: Headers = ()) -> None:
        self.headers = headers
        self.heard: list[Any] = []

    def response_starts(self, status: int) -> Headers:
        self.heard.append(status)
        return self.headers

    def unit_ends(self, error: BaseException | None) -> None:
        self.heard.append(error)


@pytest.fixture
async def small(database: Database) -> AsyncIterator[DBConnect]:
    async with DBConnect.from_url(database.url, pool_size=1, max_overflow=1) as db:
        yield db


async def use(db: DBConnect) -> None:
    await (await db_session(db)).execute(text("SELECT 1"))


def watch_running_unit(watcher: Watcher) -> None:
    unit = running_unit()
    assert unit is not None
    unit.watch(watcher)


async def test_a_database_that_was_not_used_has_no_pool_and_no_units(small: DBConnect) -> None:
    status = small.status()
    assert status.pools == ()
    assert status.units == ()
    assert status.host == small.host


async def test_a_status_tells_the_connections_in_use_idle_and_waited_for(small: DBConnect) -> None:
    async with new_non_ctx_session(small) as one, new_non_ctx_session(small) as other:
        await one.execute(text("SELECT 1"))
        await other.execute(text("SELECT 1"))
        third = asyncio.create_task(run_in_new_ctx(use, small))
        await eventually(lambda: small.status().pools[0].waiting == 1, lambda: str(small.status()))
        (pool,) = small.status().pools
        assert (pool.in_use, pool.idle, pool.limit) == (2, 0, 2)
    await third
    (pool,) = small.status().pools
    # The pool keeps one, and closes what was taken beyond its size.
    assert (pool.in_use, pool.idle, pool.waiting) == (0, 1, 0)


async def test_a_pool_that_keeps_nothing_has_no_limit(database: Database) -> None:
    async with DBConnect.from_url(database.url, poolclass=NullPool) as db, new_db_ctx():
        await use(db)
        (pool,) = db.status().pools
        assert pool.limit is None


async def test_a_status_tells_the_units_of_work_with_a_session_on_the_database(small: DBConnect) -> None:
    async with new_db_ctx():
        await use(small)
        unit = running_unit()
        assert unit is not None
        (known,) = small.status().units
        assert known.id == unit.id
        assert known.request is None
        assert known.in_transaction
        assert known.open_for >= 0
    assert small.status().units == ()


async def test_a_unit_whose_session_was_closed_is_not_in_the_status(small: DBConnect) -> None:
    async with new_db_ctx():
        await use(small)
        await close_db_session(small)
        assert small.status().units == ()


async def test_a_unit_that_is_thrown_away_leaves_the_status(small: DBConnect) -> None:
    begin()
    await db_session(small)
    assert len(small.status().units) == 1
    unit = running_unit()
    assert unit is not None
    unit.leave()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del unit
        gc.collect()
    assert small.status().units == ()


async def test_a_unit_keeps_its_id(small: DBConnect) -> None:
    async with new_db_ctx():
        unit = running_unit()
        assert unit is not None
        first = unit.id
        assert unit.id == first


async def test_units_have_different_ids(small: DBConnect) -> None:
    async with new_db_ctx():
        outer = running_unit()
        async with new_db_ctx():
            inner = running_unit()
    assert outer is not None
    assert inner is not None
    assert outer.id != inner.id


async def test_no_unit_is_running_outside_of_a_unit_or_in_a_unit_that_has_ended(small: DBConnect) -> None:
    assert running_unit() is None
    ended = asyncio.Event()

    async def later() -> object:
        await ended.wait()
        return running_unit()

    async with new_db_ctx():
        task = asyncio.create_task(later())
        await asyncio.sleep(0)
    ended.set()
    assert await task is None


async def test_a_unit_begun_for_a_request_knows_its_method_and_path(small: DBConnect) -> None:
    unit = begin({"type": "http", "method": "PUT", "path": "/orders/7", "query_string": b"token=secret"})
    assert unit is not None
    assert unit.request == "PUT /orders/7"
    await finalize(unit, commit=False)


async def test_a_unit_inside_of_a_requests_belongs_to_that_request(small: DBConnect) -> None:
    unit = begin({"type": "http", "method": "PUT", "path": "/orders/7"})
    assert unit is not None
    async with new_db_ctx():
        inner = running_unit()
        assert inner is not None
        assert inner is not unit
        assert inner.request == "PUT /orders/7"
    await finalize(unit, commit=False)


async def test_a_watcher_hears_of_the_response_and_its_fields_are_sent(small: DBConnect) -> None:
    watcher = Watcher([(b"x-watched", b"yes")])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        unit = running_unit()
        assert unit is not None
        assert unit.request == "GET /things"
        unit.watch(watcher)
        await use(small)
        assert small.status().units[0].request == "GET /things"
        await send({"type": "http.response.start", "status": 202, "headers": [(b"x-own", b"too")]})
        await send({"type": "http.response.body", "body": b"done"})

    transport = httpx.ASGITransport(ASGIHTTPDBSessionMiddleware(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        response = await client.get("/things?token=secret")
    assert response.headers["x-watched"] == "yes"
    assert response.headers["x-own"] == "too"
    assert watcher.heard == [202, None]


@pytest.mark.parametrize(
    ("kind", "start"), [("http", START), ("websocket", {"type": "websocket.accept", "headers": []})]
)
async def test_a_watcher_hears_of_no_start_behind_one_that_was_refused(
    db: DBConnect, kind: str, start: Message
) -> None:
    watcher = Watcher()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        watch_running_unit(watcher)
        await insert_row_that_fails_at_commit(db)
        with suppress(IntegrityError):
            await send(start)
        await send(start)

    connection = Connection(kind)
    with pytest.raises(IntegrityError) as raised:
        await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == []
    assert watcher.heard == [raised.value]


async def test_a_watcher_hears_of_one_start_where_the_server_is_to_refuse_a_second_one(db: DBConnect) -> None:
    watcher = Watcher()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        watch_running_unit(watcher)
        await use(db)
        await send(START)
        await send({**START, "status": 500})

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.types == ["http.response.start"] * 2
    assert watcher.heard == [200, None]


async def test_a_watcher_hears_of_the_error_that_ended_the_unit(small: DBConnect) -> None:
    watcher, error = Watcher(), LookupError("nothing there")
    with pytest.raises(LookupError):
        async with new_db_ctx():
            unit = running_unit()
            assert unit is not None
            unit.watch(watcher)
            await use(small)
            raise error
    assert watcher.heard == [error]


async def test_a_watcher_that_fails_changes_nothing(small: DBConnect, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Watcher):
        def unit_ends(self, error: BaseException | None) -> None:
            raise ValueError("the watcher's own")

    watcher = Watcher()
    with caplog.at_level(logging.ERROR, "ctxdb"):
        async with new_db_ctx():
            unit = running_unit()
            assert unit is not None
            unit.watch(Failing())
            unit.watch(watcher)
            await use(small)
    assert watcher.heard == [None]
    assert "the watcher's own" in caplog.text


async def test_a_watcher_that_fails_at_the_start_of_the_response_changes_nothing(
    small: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Watcher):
        def response_starts(self, status: int) -> list[tuple[bytes, bytes]]:
            raise ValueError("the watcher's own")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        unit = running_unit()
        assert unit is not None
        unit.watch(Failing())
        unit.watch(Watcher([(b"x-watched", b"yes")]))
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    transport = httpx.ASGITransport(ASGIHTTPDBSessionMiddleware(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        response = await client.get("/")
    assert (response.status_code, response.headers["x-watched"]) == (202, "yes")
    assert "the watcher's own" in caplog.text


async def test_of_two_starts_at_once_a_watcher_is_told_of_the_one_that_is_sent(
    small: DBConnect, database: Database
) -> None:
    watcher = Watcher([(b"x-watched", b"yes")])
    connection = Connection()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        watch_running_unit(watcher)
        await insert(small, "undone")
        await insert_row_that_fails_at_commit(small)
        success = asyncio.create_task(send(START))
        await database.commit_is_held()
        error = asyncio.create_task(send({**START, "status": 504}))
        await asyncio.sleep(0)
        held.close()
        with pytest.raises(IntegrityError):
            await success
        await error

    with ExitStack() as held:
        held.enter_context(database.held_commits())
        await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == [{**START, "status": 504, "headers": [(b"x-watched", b"yes")]}]
    assert watcher.heard == [504, None]
    assert await database.names() == []


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_a_request_has_one_id_however_often_it_is_asked_for(kind: str, small: DBConnect) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        unit = running_unit()
        assert unit is not None
        await use(small)
        identity = unit.identify()
        assert identity == (unit.id, unit.request) == unit.identify()
        identities.append(identity)

    identities: list[tuple[str, str | None]] = []
    middleware = ASGIHTTPDBSessionMiddleware(app)
    method: dict[str, Any] = {"method": "GET"} if kind == "http" else {}
    for _ in range(2):
        await Connection(kind, path="/things", **method).run(middleware)
    (first, request), (second, _) = identities
    assert first != second
    assert request == ("GET /things" if kind == "http" else "WEBSOCKET /things")


async def test_a_unit_without_a_session_does_not_say_since_when_it_has_one(db: DBConnect) -> None:
    async with db, new_db_ctx():
        unit = running_unit()
        assert unit is not None
        assert unit.opened is None
        await db_session(db)
        assert unit.opened is not None
