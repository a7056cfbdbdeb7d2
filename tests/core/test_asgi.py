"""The bare ASGI middleware, message by message."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any
from weakref import ref

import anyio
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from tests.support.connection import BODY, START, Connection
from tests.support.database import Database, Item, eventually, insert, insert_row_that_fails_at_commit

from ctxdb_core import (
    AbandonedWorkError,
    ArgumentValueError,
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    on_commit,
    on_rollback,
    rollback_db_session,
    run_in_new_ctx,
    set_rollback_only,
    transactional,
)
from ctxdb_core._units.unit import current_unit
from ctxdb_core.adapters import Phase, UnitOfWork, is_context_initiated
from ctxdb_core.asgi import ASGIApp, ASGIHTTPDBSessionMiddleware, ASGIStreamBoundary, Message, Receive, Scope, Send
from ctxdb_core.asgi.http_exchange import HTTPExchange


def replying(work: Callable[[], Awaitable[object]]) -> ASGIApp:
    """Return an application that does `work` and then answers 200."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        await send(START)
        await send(BODY)

    return app


async def test_scopes_that_are_no_request_are_passed_on() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert not is_context_initiated()
        await send({"type": "lifespan.startup.complete"})

    assert (await Connection("lifespan").run(ASGIHTTPDBSessionMiddleware(app))).types == ["lifespan.startup.complete"]


def sleeping(db: DBConnect) -> ASGIApp:
    """Return an application whose requests wait for the database, and which shuts down at once."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await (await db_session(db)).execute(text("SELECT pg_sleep(600)"))

    return ASGIHTTPDBSessionMiddleware(app)


async def shut_down(app: ASGIApp) -> None:
    connection = await Connection("lifespan", [{"type": "lifespan.shutdown"}]).run(app)
    assert connection.types == ["lifespan.shutdown.complete"]


async def test_the_query_of_a_request_that_outlasts_its_server_is_stopped(db: DBConnect, database: Database) -> None:
    app = sleeping(db)
    request = asyncio.create_task(Connection(method="GET", path="/").run(app))
    await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
    await shut_down(app)
    # No turn of the event loop comes in between: the server's process may end now.
    assert request.done()
    await eventually(lambda: not database.backends("state = 'active'"), "the query runs on")
    with pytest.raises(ContextClosedError):
        await request


async def test_the_query_of_a_request_is_left_alone_when_another_application_shuts_down(
    db: DBConnect, database: Database
) -> None:
    request = asyncio.create_task(Connection(method="GET", path="/").run(sleeping(db)))
    await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
    await shut_down(sleeping(db))
    assert database.backends("query ~ 'pg_sleep' AND state = 'active'")
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_the_query_of_a_unit_inside_of_a_request_that_outlasts_its_server_is_stopped(
    db: DBConnect, database: Database
) -> None:
    async def work() -> None:
        await (await db_session(db)).execute(text("SELECT pg_sleep(600)"))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await run_in_new_ctx(work)

    middleware = ASGIHTTPDBSessionMiddleware(app)
    request = asyncio.create_task(Connection(method="GET", path="/").run(middleware))
    await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
    await shut_down(middleware)
    with pytest.raises(ContextClosedError):
        await request


async def test_the_query_of_a_job_is_left_alone_when_its_application_shuts_down(
    db: DBConnect, database: Database
) -> None:
    async def work() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT pg_sleep(600)"))

    job = asyncio.create_task(work())
    await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
    await shut_down(sleeping(db))
    assert database.backends("query ~ 'pg_sleep' AND state = 'active'")
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job


async def test_unknown_messages_are_passed_on_untouched(db: DBConnect, database: Database) -> None:
    messages: list[Message] = [
        {"type": "http.response.debug", "info": {"template": "x"}},
        {"type": "http.response.early_hint", "links": [b"</style.css>"]},
        {**START, "trailers": True},
        {"type": "http.response.pathsend", "path": "/file"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")
        for message in messages:
            await send(message)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert all(sent is message for sent, message in zip(connection.sent, messages, strict=True))
    assert await database.names() == ["one"]


async def test_the_commit_comes_before_the_start_is_sent(db: DBConnect, database: Database) -> None:
    seen: list[list[str]] = []

    class Watching(Connection):
        async def send(self, message: Message) -> None:
            seen.append(await database.names())
            assert database.checked_out == 0

    await Watching().run(ASGIHTTPDBSessionMiddleware(replying(lambda: insert(db, "one"))))
    assert seen == [["one"], ["one"]]


async def test_an_application_that_answers_nothing_is_rolled_back(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == []


async def test_a_body_whose_end_another_task_sends_is_committed(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await insert(db, "stream")
            on_commit(db, lambda: committed.append("stream"))
            await send({**BODY, "more_body": True})

        await send(START)
        await asyncio.create_task(stream())
        await asyncio.sleep(0)
        await send(BODY)

    committed: list[str] = []
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.types == ["http.response.start", "http.response.body", "http.response.body"]
    assert await database.names() == committed == ["stream"]


async def test_a_body_goes_on_with_its_work_if_another_task_sends_the_rest_for_a_cancelled_one(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await insert(db, "begun")
            on_commit(db, lambda: committed.append("begun"))
            await send({**BODY, "more_body": True})
            sent.set()
            await asyncio.Event().wait()

        await send(START)
        streaming = asyncio.create_task(stream())
        await sent.wait()
        streaming.cancel()
        await asyncio.wait([streaming])
        await send({**BODY, "more_body": True})
        await insert(db, "finished")
        await send(BODY)

    committed: list[str] = []
    sent = asyncio.Event()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.types == ["http.response.start", *["http.response.body"] * 3]
    assert await database.names() == ["begun", "finished"]
    assert committed == ["begun"]


@pytest.mark.parametrize("order", ["the work comes first", "the part comes first"])
async def test_a_body_is_cut_off_with_the_task_that_sends_it_while_another_one_has_done_its_work(
    db: DBConnect, database: Database, order: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_part() -> None:
            if order == "the work comes first":
                await written.wait()
            await send({**BODY, "more_body": True})
            sent.set()
            await asyncio.Event().wait()

        async def make_part() -> None:
            if order == "the part comes first":
                await sent.wait()
            await insert(db, "part")
            written.set()

        await insert(db, "response")
        await send(START)
        sending, making = asyncio.create_task(send_part()), asyncio.create_task(make_part())
        await making
        await sent.wait()
        sending.cancel()
        await asyncio.wait([sending])
        await insert(db, "background")

    sent, written = asyncio.Event(), asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["background", "response"]


async def test_a_body_is_cut_off_on_each_database_that_it_has_written_to(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await insert(db, "first")
            await send({**BODY, "more_body": True})
            sent.set()
            await asyncio.Event().wait()

        await send(START)
        streaming = asyncio.create_task(stream())
        await sent.wait()
        await insert(second_db, "second")
        await end(streaming)
        await insert(db, "background")

    sent = asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["background"]


async def test_background_work_goes_on_with_the_session_of_a_body_that_was_cut_off_in_a_transaction_of_its_own(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await session.execute(text("INSERT INTO item VALUES ('cut off')"))
            await send({**BODY, "more_body": True})
            sent.set()
            await asyncio.Event().wait()

        session = await insert(db, "response")
        await send(START)
        streaming = asyncio.create_task(stream())
        await sent.wait()
        streaming.cancel()
        await asyncio.wait([streaming])
        await session.execute(text("INSERT INTO item VALUES ('background')"))

    sent = asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["background", "response"]


@pytest.mark.parametrize("ends", [False, True])
async def test_a_task_that_has_sent_a_whole_body_undoes_no_background_work(
    db: DBConnect, database: Database, ends: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await insert(db, "body")
            await send({**BODY, "more_body": True})
            await send(BODY)
            sent.set()
            await asyncio.Event().wait()

        await insert(db, "response")
        await send(START)
        tasks.append(asyncio.create_task(stream()))
        await sent.wait()
        await insert(db, "background")
        if ends:
            await end(*tasks)

    tasks: list[asyncio.Task[None]] = []
    sent = asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["background", "body", "response"]
    await end(*tasks)


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancel `tasks`, and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def insert_in_task_that_is_cancelled(db: DBConnect, name: str) -> None:
    """Write a row in a task that has a part in what the running code does, and cancel it before its end."""

    async def write() -> None:
        await insert(db, name)
        has_written.set()
        await asyncio.Event().wait()

    has_written = asyncio.Event()
    writing = asyncio.create_task(write())
    await has_written.wait()
    await end(writing)


async def test_background_work_behind_a_body_that_was_cancelled_before_it_used_a_session_is_committed(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({**BODY, "more_body": True})
            sent.set()
            await asyncio.Event().wait()

        await insert(db, "response")
        await send(START)
        streaming = asyncio.create_task(stream())
        await sent.wait()
        streaming.cancel()
        await asyncio.wait([streaming])
        await insert(db, "background")
        await (await db_session(db)).execute(text("SELECT 1"))

    sent = asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["background", "response"]


async def test_a_body_in_a_block_that_has_joined_its_transaction_stays_in_that_while_a_part_is_sent(
    db: DBConnect,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await db_session(db)
        await send(START)
        await begin_time()
        async with transactional(db):
            await send({**BODY, "more_body": True})
            await begin_time()
        await send(BODY)

    async def begin_time() -> None:
        times.append(await (await db_session(db)).scalar(text("SELECT now()")))

    times: list[object] = []
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert len(set(times)) == 1


@pytest.mark.parametrize(
    "last",
    [
        BODY,
        {**BODY, "more_body": False},
        {"type": "http.response.pathsend", "path": "/dev/null"},
        {"type": "http.response.zerocopysend", "file": 0},
    ],
    ids=["body", "end of a stream", "pathsend", "zerocopysend"],
)
@pytest.mark.parametrize("asks", [False, True])
async def test_the_last_part_of_a_body_that_uses_no_session_begins_the_background_work(
    db: DBConnect, database: Database, last: Message, asks: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({**BODY, "more_body": True})
        if asks:
            on_commit(db, lambda: None)
        await send(last)
        await insert_in_task_that_is_cancelled(db, "background")

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["background"]


async def test_a_success_behind_a_body_without_a_start_waits_for_its_commit(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # A server refuses that.
        await send(BODY)
        await insert(db, "one")
        await send(START)
        assert await database.names() == ["one"]

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))


async def test_the_commit_of_background_work_runs_no_callback_of_a_body_that_was_cut_off(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await insert(db, "kept")
            await commit_db_session(db)
            on_commit(db, lambda: called.append("cut off"))
            await send({**BODY, "more_body": True})
            sent.set()
            await asyncio.Event().wait()

        await send(START)
        streaming = asyncio.create_task(stream())
        await sent.wait()
        streaming.cancel()
        await asyncio.wait([streaming])
        await insert(db, "background")
        on_commit(db, lambda: called.append("background"))

    called: list[str] = []
    sent = asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert called == ["background"]


async def test_a_body_that_is_cut_off_is_rolled_back_although_the_request_is_cancelled(
    db: DBConnect, database: Database
) -> None:
    working = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await insert(db, "stream")
            await send({**BODY, "more_body": True})

        await send(START)
        await asyncio.create_task(stream())
        working.set()
        await asyncio.Event().wait()

    request = asyncio.create_task(Connection().run(ASGIHTTPDBSessionMiddleware(app)))
    await working.wait()
    assert database.checked_out == 1
    request.cancel()
    with suppress(asyncio.CancelledError):
        await request
    assert database.checked_out == 0
    assert await database.names() == []


async def test_a_body_that_is_cancelled_before_it_has_sent_anything_is_rolled_back(
    db: DBConnect, database: Database
) -> None:
    called: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        has_written = asyncio.Event()

        async def make_body() -> None:
            on_commit(db, lambda: called.append("body"))
            await insert(db, "half")
            has_written.set()
            await asyncio.Event().wait()

        await insert(db, "one")
        await send(START)
        body = asyncio.create_task(make_body())
        await has_written.wait()
        body.cancel()
        await asyncio.wait([body])

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert (await database.names(), called) == (["one"], [])


async def test_a_body_keeps_nothing_of_the_tasks_in_which_it_has_used_a_session(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = current_unit.get()
        assert isinstance(exchange, HTTPExchange)
        await send(START)
        for _ in range(5):
            await asyncio.create_task(insert(db, "undone"))
            await rollback_db_session(db)
            await send({**BODY, "more_body": True})
        assert exchange.response is not None
        body = exchange.response.body
        await eventually(lambda: body is not None and len(body.users) <= 1, "tasks are kept")
        await send(BODY)

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))


async def test_a_body_that_is_cancelled_while_it_waits_for_a_connection_commits_nothing(database: Database) -> None:
    called: list[str] = []
    async with database.connect(pool_size=1, max_overflow=0) as db:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def make_body() -> None:
                on_commit(db, lambda: called.append("body"))
                await insert(db, "half")

            await insert(db, "one")
            await send(START)
            engine = await db.engine()
            async with engine.connect():
                body = asyncio.create_task(make_body())
                await asyncio.sleep(0)
                body.cancel()
                await asyncio.wait([body])

        await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert (await database.names(), called) == (["one"], [])


async def test_a_body_that_is_cancelled_before_its_first_statement_has_no_callback_called(db: DBConnect) -> None:
    called: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def make_body() -> None:
            await insert(db, "one")
            await commit_db_session(db)
            await send({**BODY, "more_body": True})
            on_commit(db, lambda: called.append("body"))
            await asyncio.Event().wait()

        await send(START)
        body = asyncio.create_task(make_body())
        await eventually(lambda: bool(connection.types[1:]), "nothing of the body was sent")
        body.cancel()
        await asyncio.wait([body])

    connection = Connection()
    await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert called == []


@pytest.mark.parametrize("background", [True, False])
async def test_a_cut_off_body_has_its_roll_back_callbacks_called(db: DBConnect, background: bool) -> None:
    called: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def make_body() -> None:
            await insert(db, "one")
            on_rollback(db, lambda: called.append("body"))
            await send({**BODY, "more_body": True})
            await asyncio.Event().wait()

        await send(START)
        body = asyncio.create_task(make_body())
        await eventually(lambda: bool(connection.types[1:]), "nothing of the body was sent")
        body.cancel()
        await asyncio.wait([body])
        if background:
            on_rollback(db, lambda: called.append("background, undone"))
            on_commit(db, lambda: called.append("background"))
            await insert(db, "background")

    connection = Connection()
    await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert called == (["body", "background"] if background else ["body"])


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize(("in_helper", "in_request"), [(True, True), (True, False), (False, True)])
async def test_background_work_is_committed_behind_a_helper_that_was_cancelled(
    db: DBConnect, database: Database, is_first: bool, in_helper: bool, in_request: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def wait_behind_a_statement() -> None:
            await (await db_session(db)).execute(text("SELECT 1"))
            waits.set()
            await asyncio.Event().wait()

        if not is_first:
            await insert(db, "before")
        await send(START)
        if is_first:
            await send(BODY)
        if in_helper:
            await asyncio.create_task(insert(db, "helper"))
        waiting = asyncio.create_task(wait_behind_a_statement())
        await waits.wait()
        if in_request:
            await insert(db, "request")
        waiting.cancel()
        await asyncio.wait([waiting])

    waits = asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["before"] * (not is_first) + ["helper"] * in_helper + ["request"] * in_request


@pytest.mark.parametrize("writes_before", [True, False])
async def test_a_body_that_goes_on_behind_an_error_in_its_place_is_refused(
    db: DBConnect, database: Database, writes_before: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if writes_before:
            await insert(db, "response")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with pytest.raises(ContextClosedError):
            await insert(db, "body")
        await send({"type": "http.response.body", "body": b"body"})

    boundary = ASGIStreamBoundary(app)

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        async def replace(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send({"type": "http.response.start", "status": 503, "headers": []})
                await send({"type": "http.response.body", "body": b"refused"})

        await boundary(scope, receive, replace)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(refuse))
    assert [message.get("status", message.get("body")) for message in connection.sent] == [503, b"refused"]
    assert await database.names() == (["response"] if writes_before else [])


async def test_a_request_whose_sessions_are_first_asked_for_on_another_thread_keeps_them_for_its_own_event_loop(
    db: DBConnect, database: Database
) -> None:
    def on_a_loop_of_its_own() -> None:
        with pytest.raises(ContextNotInitiatedError, match="another event loop"):
            asyncio.run(insert(db, "thread"))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.to_thread(on_a_loop_of_its_own)
        await insert(db, "request")
        await asyncio.to_thread(on_a_loop_of_its_own)
        await send(START)
        await send(BODY)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == [START, BODY]
    assert await database.names() == ["request"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_an_exchange_has_all_that_a_unit_of_work_is_made_with(kind: str) -> None:
    """An exchange is made without a call of ``__init__``, which would cost requests that use no database."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        units.append(scope["ctxdb.unit_of_work"])
        kept = {"calls", "origin", "phase", "response", "server"} | ({"source"} if kind == "http" else set())
        assert vars(units[0]).keys() == vars(UnitOfWork()).keys() | kept
        assert units[0].is_on_its_loop()
        assert units[0].loop is UnitOfWork().loop

    units: list[UnitOfWork] = []
    await Connection(kind).run(ASGIHTTPDBSessionMiddleware(app))
    assert units[0].closed


async def test_a_request_with_a_session_needs_no_dict_for_its_attributes_after_many_without(db: DBConnect) -> None:
    """CPython decides by the first thirty instances of a class which attributes have a place without a dict."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/write":
            await insert(db, "one")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        dicts = [each for each in gc.get_referents(scope["ctxdb.unit_of_work"]) if isinstance(each, dict)]
        has_dict.append(any("sessions" in each for each in dicts))

    has_dict: list[bool] = []
    middleware = ASGIHTTPDBSessionMiddleware(app)
    for path in ["/"] * 40 + ["/write"]:
        await Connection(path=path).run(middleware)
    assert has_dict == [False] * 41


@pytest.mark.parametrize("status", [200, 404])
async def test_a_context_variable_that_knows_the_request_keeps_nothing_alive_behind_it(
    db: DBConnect, status: int
) -> None:
    class Request:
        def __init__(self, send: Send) -> None:
            self.send = send

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(send)
        running_request.set(request)
        requests.append(ref(request))
        await insert(db, "one")
        await request.send({"type": "http.response.start", "status": status, "headers": []})
        await request.send({"type": "http.response.body"})

    async def in_a_task(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.create_task(boundary(scope, receive, send))

    running_request: ContextVar[Request] = ContextVar("running_request")
    requests: list[ref[Request]] = []
    boundary = ASGIStreamBoundary(app)
    middleware = ASGIHTTPDBSessionMiddleware(in_a_task)
    # A connection keeps the context that it was opened in.
    async with new_db_ctx():
        await insert(db, "zero")
    gc.disable()
    try:
        await Connection().run(middleware)
        await eventually(lambda: requests[0]() is None, "the request is kept")
    finally:
        gc.enable()


async def test_a_request_without_a_session_is_given_no_helper_objects_and_ends_like_any_other(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchanges.append(scope["ctxdb.unit_of_work"])
        tasks.append(asyncio.create_task(late()))
        await send(START)
        await send(BODY)

    async def late() -> None:
        await ended.wait()
        with pytest.raises(ContextClosedError):
            await db_session(db)

    exchanges: list[Any] = []
    tasks: list[asyncio.Task[None]] = []
    ended = asyncio.Event()
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    ended.set()
    await tasks[0]
    [exchange] = exchanges
    assert (exchange.calls, exchange.response) == (None, None)
    assert exchange.phase is Phase.AFTER


async def test_a_failing_commit_raises_and_sends_nothing(db: DBConnect) -> None:
    connection = Connection()
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(replying(lambda: insert_row_that_fails_at_commit(db))))
    assert connection.sent == []


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize(
    "header",
    [(b"x-name", b"a\r\nb"), (b"x-name", b"a\nX-Other\nb"), (b"x-my name", b"a"), (b"", b"a"), (b"x-\xe9", b"a")],
    ids=["value", "lines", "name", "no name", "letter"],
)
async def test_a_success_whose_headers_no_server_sends_commits_nothing(
    db: DBConnect, database: Database, kind: type[list[Any] | tuple[Any, ...]], header: tuple[bytes, bytes]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "undone")
        await send({**START, "headers": kind([(b"vary", b"accept"), header])})
        await send(BODY)

    connection = Connection()
    with pytest.raises(ArgumentValueError, match=re.escape(f"response header {header[0]!r} ")):
        await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == []
    assert await database.names() == []


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(iter, b"x-name", b"value"), (list, b"x-name", b"t\tab \xe9"), (list, "x-name", "a text, as h11 takes it")],
    ids=["read_once", "with_tab", "text"],
)
async def test_headers_that_a_server_may_take_arrive(
    db: DBConnect, database: Database, kind: Callable[[Any], Any], name: object, value: object
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "stored")
        await send({**START, "headers": kind([(name, value)])})
        await send(BODY)

    connection = Connection()
    await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert list(connection.sent[0]["headers"]) == [(name, value)]
    assert await database.names() == ["stored"]


async def test_whitespace_around_a_header_that_h11_refuses_to_send_is_dropped(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "stored")
        await send({**START, "headers": [(b"x-name", b"\tAda L. "), (b"x-empty", b" "), (b"vary", b"accept")]})
        await send(BODY)

    connection = Connection()
    await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent[0]["headers"] == [(b"x-name", b"Ada L."), (b"x-empty", b""), (b"vary", b"accept")]
    assert await database.names() == ["stored"]


@pytest.mark.parametrize("sends_last_before", [True, False], ids=["background_work", "body"])
async def test_a_request_waits_for_the_callbacks_of_a_commit_that_its_code_has_made_behind_the_start(
    db: DBConnect, sends_last_before: bool
) -> None:
    seen: list[str] = []

    async def note() -> None:
        # A callback that ends at once would be done before anything waits for it.
        for _ in range(100):
            await asyncio.sleep(0)
        seen.append("called")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        if sends_last_before:
            await send(BODY)
        session = await insert(db, "stored")
        on_commit(db, note)
        await session.commit()
        if not sends_last_before:
            await send(BODY)

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert seen == ["called"]


async def test_an_application_that_handles_the_error_itself_cannot_answer_after_all(db: DBConnect) -> None:
    """Nobody can tell for which error the application's response is meant; the server's error response is safe."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        try:
            await send(START)
        except IntegrityError:
            await send({**START, "status": 200})
            await send(BODY)

    connection = Connection()
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == []


async def test_commit_error_surfaces_although_the_application_raises_another_error_from_it(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        try:
            await send(START)
        except IntegrityError as exc:
            raise RuntimeError("response already started") from exc

    with pytest.raises(IntegrityError):
        await Connection().run(ASGIHTTPDBSessionMiddleware(app))


async def test_unrelated_error_of_the_application_is_attached_to_the_commit_error(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        failed = False
        try:
            await send(START)
        except IntegrityError:
            failed = True
        if failed:
            raise LookupError("while cleaning up")

    with pytest.raises(IntegrityError) as caught:
        await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert any("while cleaning up" in note for note in caught.value.__notes__)


async def test_a_consequence_of_the_commit_error_is_not_attached_to_it(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        try:
            await send(START)
        except IntegrityError:
            raise RuntimeError("response already started")  # noqa: B904 - its context leads to the error as well

    with pytest.raises(IntegrityError) as caught:
        await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert not hasattr(caught.value, "__notes__")


async def test_an_error_that_is_among_its_own_causes_is_attached_to_the_commit_error(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        with suppress(IntegrityError):
            await send(START)
        error, cause = LookupError("while cleaning up"), LookupError()
        error.__cause__, cause.__cause__ = cause, error
        raise error

    with pytest.raises(IntegrityError) as caught:
        await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert "while cleaning up" in caught.value.__notes__[0]


async def test_work_behind_a_close_that_was_refused_is_rolled_back(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await insert_row_that_fails_at_commit(db)
        with suppress(IntegrityError):
            await send({"type": "websocket.close"})
        await insert(db, "behind")

    with pytest.raises(IntegrityError):
        await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == []


async def test_a_second_start_commits_nothing_of_the_body(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send(START)
        await send({**BODY, "more_body": True})
        await insert(db, "body")
        await send(START)

    class Server(Connection):
        async def send(self, message: Message) -> None:
            if message["type"] in self.types:
                raise RuntimeError("a second start")
            await super().send(message)

    with pytest.raises(RuntimeError, match="a second start"):
        await Server().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["response"]


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("message", [{**BODY, "more_body": True}, {"type": "http.response.debug", "info": {}}])
async def test_a_message_in_the_middle_of_a_body_without_sessions_is_not_taken_for_its_end(
    db: DBConnect, database: Database, message: Message, asks: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        if asks:
            on_commit(db, lambda: None)
        await send(message)
        await insert_in_task_that_is_cancelled(db, "part")

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == []


async def test_a_cancellation_behind_a_failed_commit_surfaces_and_names_that(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        with suppress(IntegrityError):
            await send(START)
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError) as caught:
        await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert "nothing was committed, as that had failed: IntegrityError" in caught.value.__notes__[0]


async def test_an_error_of_the_application_is_raised_as_it_is_and_not_logged(
    db: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    error = LookupError()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")
        raise error

    with pytest.raises(LookupError) as caught:
        await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert not [record for record in caplog.records if record.name == "ctxdb"]


async def test_a_callback_of_a_body_that_only_reads_waits_for_the_end_of_that(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await (await db_session(db)).execute(text("SELECT 1"))
        on_commit(db, lambda: called.append("committed"))
        on_rollback(db, lambda: called.append("rolled back"))
        await send({**BODY, "more_body": True})
        raise LookupError

    called: list[str] = []
    with pytest.raises(LookupError):
        await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert called == ["rolled back"]


async def test_a_mark_of_a_body_that_only_reads_holds_until_its_end(
    db: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await (await db_session(db)).execute(text("SELECT 1"))
        set_rollback_only()
        await send({**BODY, "more_body": True})
        await insert(db, "one")
        await send(BODY)

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == []
    assert caplog.text == ""


@pytest.mark.parametrize("block", ["begin", "begin_nested"])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("status", [200, 404])
async def test_code_in_a_block_of_its_session_goes_on_when_its_response_has_started(
    db: DBConnect, database: Database, block: str, asks: bool, status: int
) -> None:
    async def before_commit(session: AsyncSession) -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = await db_session(db)
        async with getattr(session, block)():
            await insert(db, "response")
            await send({**START, "status": status})
            await insert(db, "body")
        await send(BODY)

    await Connection().run(ASGIHTTPDBSessionMiddleware(app, before_commit if asks else None))
    assert await database.names() == (["body", "response"] if status == 200 else ["body"])


async def test_a_body_goes_on_although_the_transaction_that_has_read_for_it_cannot_be_committed(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Session):
        def commit(self) -> None:
            failures.append(LookupError("the class's own"))
            raise failures[-1]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await (await db_session(db)).execute(text("SELECT 1"))
        await send({**BODY, "more_body": True})
        held.append(database.checked_out)
        await send(BODY)

    failures: list[Exception] = []
    held: list[int] = []
    async with DBConnect(
        lambda host: database.watch_new(),
        lambda engine: async_sessionmaker(engine, sync_session_class=Failing),
        host="a",
    ) as db:
        connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.types == ["http.response.start", *["http.response.body"] * 2]
    assert (len(failures), held) == (1, [0])
    assert "a transaction on <DBConnect host='a'> that had only read could not be ended" in caplog.text


async def test_a_part_of_a_body_holds_no_connection_although_another_task_reads_before_it_is_sent(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        reading = asyncio.create_task(read())
        asked: Any = (await db.engine()).sync_engine
        event.listen(asked, "before_cursor_execute", let_read)
        try:
            await send({**BODY, "more_body": True})
        finally:
            event.remove(asked, "before_cursor_execute", let_read)
        held.append(database.checked_out)
        await reading
        await send(BODY)

    def let_read(connection: object, cursor: object, statement: str, *args: object) -> None:
        if "txid_current_if_assigned" in statement:
            is_asked.set()

    async def read() -> None:
        # While the database is asked whether the transaction has only read.
        await is_asked.wait()
        await (await db_session(db)).execute(text("SELECT 2"))

    is_asked = asyncio.Event()
    held: list[int] = []
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert held == [0]


async def test_a_body_that_has_written_is_committed_although_it_has_left_a_result_open(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        session = await db_session(db)
        result = await session.stream(text("SELECT generate_series(1, 5000)"))
        assert await result.fetchone()
        await insert(db, "body")
        await send(BODY)

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["body"]


async def test_a_middleware_that_is_installed_twice_works_once(db: DBConnect, database: Database) -> None:
    seen: list[object] = []

    async def before_commit(session: object) -> None:
        seen.append(session)

    inner = ASGIHTTPDBSessionMiddleware(replying(lambda: insert(db, "one")), before_commit)
    await Connection().run(ASGIHTTPDBSessionMiddleware(inner, before_commit))
    assert len(seen) == 1
    assert await database.names() == ["one"]


async def test_a_scope_used_again_is_another_request(db: DBConnect, database: Database) -> None:
    names = iter(["one", "two"])
    app = ASGIHTTPDBSessionMiddleware(replying(lambda: insert(db, next(names))))
    connection = Connection()
    await connection.run(app)
    await connection.run(app)
    assert await database.names() == ["one", "two"]


async def test_a_request_leaves_the_context_of_its_server_as_it_was(db: DBConnect) -> None:
    async def fail() -> None:
        await insert(db, "one")
        raise LookupError

    for work in (fail, lambda: insert(db, "one"), lambda: insert_row_that_fails_at_commit(db)):
        with suppress(LookupError, IntegrityError):
            await Connection().run(ASGIHTTPDBSessionMiddleware(replying(work)))
        assert not is_context_initiated()


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit])
async def test_every_exception_rolls_back(db: DBConnect, database: Database, exception: type[BaseException]) -> None:
    async def fail() -> None:
        await insert(db, "one")
        raise exception

    with pytest.raises(exception):
        await Connection().run(ASGIHTTPDBSessionMiddleware(replying(fail)))
    assert database.checked_out == 0
    assert await database.names() == []


async def test_a_cancel_scope_around_the_request_leaks_nothing(db: DBConnect, database: Database) -> None:
    entered = asyncio.Event()

    async def hang() -> None:
        await insert(db, "one")
        entered.set()
        await asyncio.Event().wait()

    async with anyio.create_task_group() as group:
        group.start_soon(Connection().run, ASGIHTTPDBSessionMiddleware(replying(hang)))
        await entered.wait()
        group.cancel_scope.cancel()
    assert database.checked_out == 0
    assert await database.names() == []


async def test_a_response_started_in_a_task_that_is_cancelled_is_committed_whole(
    db: DBConnect, database: Database
) -> None:
    """Starlette cancels the task of a stream as soon as the client has gone."""
    await database.query(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END $$"
    )
    await database.query(
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION slow()"
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")
        async with anyio.create_task_group() as group:
            group.start_soon(_send, send)
            await eventually(lambda: bool(database.backends("query ~ '^COMMIT' AND state = 'active'")), "no commit")
            group.cancel_scope.cancel()

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == []
    assert await database.names() == ["one"]


async def _send(send: Send) -> None:
    await send(START)


async def _send_message(send: Send, message: Message) -> None:
    await send(message)


@pytest.mark.parametrize("has_boundary", [False, True])
async def test_parts_that_other_tasks_send_wait_for_the_start(
    db: DBConnect, database: Database, *, has_boundary: bool
) -> None:
    ping: Message = {"type": "http.response.body", "body": b"ping", "more_body": True}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_send_message(send, START))
            tasks.create_task(_send_message(send, ping))
        await insert(db, "two")
        await send(BODY)

    connection = await Connection("http").run(
        ASGIHTTPDBSessionMiddleware(ASGIStreamBoundary(app) if has_boundary else app)
    )
    assert connection.sent == [START, ping, BODY]
    assert await database.names() == ["one", "two"]


@pytest.mark.parametrize("has_boundary", [False, True])
async def test_a_callback_of_the_commit_may_send_something_that_comes_before_the_start(
    db: DBConnect, *, has_boundary: bool
) -> None:
    hint: Message = {"type": "http.response.early_hint", "links": [b"</style.css>"]}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")
        on_commit(db, lambda: send(hint))
        await send(START)
        await send(BODY)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(ASGIStreamBoundary(app) if has_boundary else app))
    assert connection.sent == [hint, START, BODY]


# --- websockets -------------------------------------------------------------------------------------------------------

ACCEPT: Message = {"type": "websocket.accept"}


def chatting(*steps: Message | Callable[[], Awaitable[object]]) -> ASGIApp:
    """Return a websocket application that sends messages and does work, in this order."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for step in steps:
            if callable(step):
                await step()
            else:
                await send(step)

    return app


@pytest.mark.parametrize(
    ("closing", "committed"),
    [
        ([], True),
        ([{"type": "websocket.close"}], True),
        ([{"type": "websocket.close", "code": 1000}], True),
        ([{"type": "websocket.close", "code": 1001}], True),
        ([{"type": "websocket.close", "code": 1008}], False),
        ([{"type": "websocket.close", "code": 1011}], False),
        ([{"type": "websocket.close", "code": 4000}], False),
    ],
)
async def test_a_websocket_is_one_unit_of_work_ended_by_its_close(
    db: DBConnect, database: Database, closing: list[Message], committed: bool
) -> None:
    app = chatting(ACCEPT, lambda: insert(db, "one"), *closing)
    connection = await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == [ACCEPT, *closing]
    assert await database.names() == (["one"] if committed else [])


async def test_work_before_a_websocket_is_accepted_is_committed_by_the_accept(
    db: DBConnect, database: Database
) -> None:
    seen: list[tuple[list[str], int]] = []

    async def look() -> None:
        seen.append((await database.names(), database.checked_out))

    async def fail() -> None:
        raise LookupError

    app = chatting(lambda: insert(db, "one"), ACCEPT, look, lambda: insert(db, "two"), fail)
    with pytest.raises(LookupError):
        await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(app))
    assert seen == [(["one"], 0)]
    assert await database.names() == ["one"]


async def test_a_websocket_whose_commit_fails_is_not_accepted(db: DBConnect, database: Database) -> None:
    connection = Connection("websocket")
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(chatting(lambda: insert_row_that_fails_at_commit(db), ACCEPT)))
    assert connection.sent == []
    assert database.checked_out == 0


async def test_messages_of_other_tasks_wait_until_a_websocket_is_accepted(db: DBConnect, database: Database) -> None:
    sent_by_callback: Message = {"type": "websocket.send", "text": "by a callback of the commit"}
    sent_by_task: Message = {"type": "websocket.send", "text": "by another task"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")
        # The commit waits for its callback, so the callback's message must not wait for the commit. A server refuses
        # such a message.
        on_commit(db, lambda: send(sent_by_callback))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_send_message(send, ACCEPT))
            tasks.create_task(_send_message(send, sent_by_task))

    connection = await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == [sent_by_callback, ACCEPT, sent_by_task]


async def test_a_websocket_that_raises_is_rolled_back(db: DBConnect, database: Database) -> None:
    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await Connection("websocket").run(
            ASGIHTTPDBSessionMiddleware(chatting(ACCEPT, lambda: insert(db, "one"), fail))
        )
    assert await database.names() == []


async def test_a_refused_websocket_is_rolled_back(db: DBConnect, database: Database) -> None:
    app = chatting(lambda: insert(db, "one"), {"type": "websocket.close"})
    await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == []


@pytest.mark.parametrize(("status", "committed"), [(200, True), (403, False)])
async def test_a_denial_response_counts_by_its_status(
    db: DBConnect, database: Database, status: int, committed: bool
) -> None:
    start = {"type": "websocket.http.response.start", "status": status, "headers": []}
    body = {"type": "websocket.http.response.body", "body": b""}
    app = chatting(lambda: insert(db, "one"), start, body)
    connection = await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == [start, body]
    assert await database.names() == (["one"] if committed else [])


async def test_a_websocket_whose_commit_fails_is_closed_as_an_error(db: DBConnect) -> None:
    app = chatting(ACCEPT, lambda: insert_row_that_fails_at_commit(db), {"type": "websocket.close", "code": 1000})
    connection = Connection("websocket")
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == [ACCEPT, {"type": "websocket.close", "code": 1011, "reason": ""}]


async def test_a_websockets_session_is_usable_after_its_close(db: DBConnect, database: Database) -> None:
    async def after() -> None:
        await (await db_session(db)).execute(text("INSERT INTO item VALUES ('after')"))

    app = chatting(ACCEPT, lambda: insert(db, "one"), {"type": "websocket.close"}, after)
    await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(app))
    assert await database.names() == ["after", "one"]


async def test_a_lifespan_does_not_join_the_unit_of_work_that_its_server_was_started_in(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert not is_context_initiated()
        with pytest.raises(ContextClosedError):
            await db_session(db)

    async def serve_inside() -> None:
        async with new_db_ctx():
            await Connection("lifespan").run(ASGIHTTPDBSessionMiddleware(app))
            assert is_context_initiated()

    await serve_inside()


@pytest.mark.parametrize("status", [200, 503])
async def test_a_task_may_open_a_session_while_the_response_waits_for_the_statement_of_another_one(
    db: DBConnect, database: Database, status: int
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with new_non_ctx_session(third) as blocking:
            await blocking.execute(text("LOCK TABLE parent"))
            session = await db_session(db)
            writing = asyncio.create_task(session.execute(text("INSERT INTO parent VALUES ('one')")))
            await eventually(lambda: bool(database.backends("wait_event_type = 'Lock'")), "no statement waits")
            starting = asyncio.ensure_future(send({**START, "status": status}))
            await asyncio.sleep(0)
            await db_session(other)
        await asyncio.gather(writing, starting)

    async def before_commit(session: object) -> None: ...

    connection = Connection()
    async with database.connect() as other, database.connect() as third:
        await connection.run(ASGIHTTPDBSessionMiddleware(app, before_commit))
    assert [message["status"] for message in connection.sent] == [status]
    assert await database.names("parent") == (["one"] if status == 200 else [])


@pytest.mark.parametrize("handler_writes", [False, True])
async def test_a_middleware_answers_by_an_error_in_the_place_of_a_handler_and_keeps_nothing_of_either(
    db: DBConnect, database: Database, handler_writes: bool
) -> None:
    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if handler_writes:
            await insert(db, "handler")
        begun.set()
        await asyncio.Event().wait()

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        handling = asyncio.create_task(ASGIStreamBoundary(handle)(scope, receive, send))
        await begun.wait()
        await insert(db, "middleware")
        await send({**START, "status": 504})
        await send(BODY)
        await end(handling)

    begun = asyncio.Event()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(middleware))
    assert connection.types == ["http.response.start", "http.response.body"]
    assert await database.names() == []


@pytest.mark.parametrize("change", ["new", "dirty", "deleted"])
async def test_a_middleware_commits_no_object_that_a_handler_that_goes_on_has_changed_and_not_flushed(
    db: DBConnect, database: Database, change: str
) -> None:
    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        session = await db_session(db)
        if change == "new":
            session.add(Item(name="new"))
        else:
            item = await session.get_one(Item, "old")
            if change == "dirty":
                item.name = "dirty"
            else:
                await session.delete(item)
        begun.set()
        await asyncio.Event().wait()

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        handling = asyncio.create_task(ASGIStreamBoundary(handle)(scope, receive, send))
        try:
            await begun.wait()
            await send(START)
        finally:
            await end(handling)

    await database.query("INSERT INTO item VALUES ('old')")
    begun = asyncio.Event()
    connection = Connection()
    with pytest.raises(AbandonedWorkError):
        await connection.run(ASGIHTTPDBSessionMiddleware(middleware))
    assert connection.sent == []
    assert await database.names() == ["old"]


@pytest.mark.parametrize("holds_back", [False, True])
async def test_a_body_beneath_a_boundary_that_only_reads_holds_no_connection_while_a_part_is_passed_on(
    db: DBConnect, database: Database, holds_back: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await (await db_session(db)).execute(text("SELECT 1"))
        await send({**BODY, "more_body": True})
        await send(BODY)

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            if message.get("more_body"):
                held.append(database.checked_out)
            passed.append(message)
            if not holds_back:
                await send(message)

        await ASGIStreamBoundary(app)(scope, receive, pass_on)
        if holds_back:
            for message in passed:
                await send(message)

    held: list[int] = []
    passed: list[Message] = []
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(middleware))
    assert connection.sent == passed
    assert held == [0]


async def test_two_starts_at_once_beneath_a_boundary_are_the_servers_to_refuse(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "one")
        await asyncio.gather(*(send({**START, "status": status}) for status in (200, 200)))
        await send(BODY)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(ASGIStreamBoundary(app)))
    assert connection.types == ["http.response.start", "http.response.start", "http.response.body"]
