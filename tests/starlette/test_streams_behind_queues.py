"""Streamed bodies behind a `BaseHTTPMiddleware`, which run ahead of the start of their own response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.server import RawClient, http_client, serve
from tests.support.stacks import Ask, DoNothing, Endpoint, application, on_integrity_error

from ctxdb_core import ContextClosedError, DBConnect, commit_db_session, db_session, rollback_db_session
from ctxdb_core.asgi import ASGIApp, Receive, Scope, Send
from ctxdb_starlette import DBSessionMiddleware

# More rows than a driver or SQLAlchemy fetches at once: asyncpg's cursors fetch 50 rows.
ROWS = text("SELECT * FROM generate_series(1, 300)")


def write_and_stream(db: DBConnect, body: Callable[[], AsyncGenerator[str, None]], status: int = 200) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        await insert(db, "response")
        return StreamingResponse(body(), status)

    return endpoint


AHEAD = pytest.mark.parametrize(
    "stack",
    [
        [DoNothing, DBSessionMiddleware],
        [DoNothing, DoNothing, DBSessionMiddleware],
        [DBSessionMiddleware, DoNothing, DBSessionMiddleware],
        [GZipMiddleware, DoNothing, GZipMiddleware, DBSessionMiddleware],
    ],
    ids=lambda stack: "-".join(each.__name__ for each in reversed(stack)),
)


@AHEAD
async def test_a_body_that_keeps_a_cursor_open_is_streamed(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, stack: list[Any]
) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        session = await db_session(db)
        async for number in await session.stream_scalars(ROWS):
            yield f"{number} "

    client = await ask(application(framework, {"/": write_and_stream(db, chunks)}, *stack))
    response = await client.get("/")
    assert (response.status_code, len(response.text.split())) == (200, 300)
    assert await database.names() == ["response"]


@AHEAD
async def test_a_commit_of_the_body_keeps_nothing_of_an_error(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, stack: list[Any]
) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        await insert(db, "stream")
        await commit_db_session(db)
        yield "body"

    client = await ask(application(framework, {"/": write_and_stream(db, chunks, 404)}, *stack))
    assert (await client.get("/")).status_code == 404
    assert await database.names() == ["stream"]


@AHEAD
async def test_a_failing_commit_stops_the_body_before_it_begins(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, stack: list[Any]
) -> None:
    begun = False

    async def chunks() -> AsyncGenerator[str, None]:
        nonlocal begun
        begun = True
        await insert(db, "stream")
        yield "body"

    async def stream(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return StreamingResponse(chunks())

    app = application(framework, {"/": stream}, *stack, exception_handlers=on_integrity_error(409))
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert not begun
    assert await database.names() == []


def around_a_route(framework: type[Starlette], endpoint: Endpoint) -> ASGIApp:
    app = framework(routes=[Route("/", endpoint, middleware=[Middleware(DoNothing)])])
    app.add_middleware(DBSessionMiddleware)
    return app


def around_a_mount(framework: type[Starlette], endpoint: Endpoint) -> ASGIApp:
    app = framework(routes=[Mount("/", routes=[Route("/", endpoint)], middleware=[Middleware(GZipMiddleware)])])
    app.add_middleware(DBSessionMiddleware)
    return app


def in_a_mounted_application(framework: type[Starlette], endpoint: Endpoint) -> ASGIApp:
    app = framework(routes=[Mount("/", application(framework, {"/": endpoint}, DoNothing))])
    app.add_middleware(DBSessionMiddleware)
    return app


def in_an_application_that_is_wrapped(framework: type[Starlette], endpoint: Endpoint) -> ASGIApp:
    app = application(framework, {"/": endpoint})
    wrapped = DBSessionMiddleware(app)
    app.add_middleware(DoNothing)
    return wrapped


@pytest.mark.parametrize(
    "build",
    [around_a_route, around_a_mount, in_a_mounted_application, in_an_application_that_is_wrapped],
    ids=lambda build: build.__name__,
)
async def test_a_body_is_streamed_wherever_the_middleware_is_that_holds_its_start_back(
    db: DBConnect,
    database: Database,
    framework: type[Starlette],
    ask: Ask,
    build: Callable[[type[Starlette], Endpoint], ASGIApp],
) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        session = await db_session(db)
        await insert(db, "stream")
        async for number in await session.stream_scalars(ROWS):
            yield f"{number} "

    response = await (await ask(build(framework, write_and_stream(db, chunks, 404)))).get("/")
    assert (response.status_code, len(response.text.split())) == (404, 300)
    assert await database.names() == ["stream"]


async def test_writes_of_a_base_middleware_behind_a_stream_are_committed_before_the_start(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    class Audit(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            response = await call_next(request)
            await insert(db, "audit")
            return response

    seen: list[list[str]] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        async def looking(message: Any) -> None:
            seen.append(await database.names())
            await send(message)

        await wrapped(scope, receive, looking)

    async def chunks() -> AsyncGenerator[str, None]:
        yield "body"

    app = application(framework, {"/": write_and_stream(db, chunks)}, Audit, DBSessionMiddleware)
    wrapped = app
    assert (await (await ask(look)).get("/")).text == "body"
    assert seen[-1] == ["audit", "response"]
    assert next(names for names in seen if names) == ["audit", "response"]


async def test_a_base_middleware_can_collect_a_body_that_uses_the_database(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    class Collect(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            response: Any = await call_next(request)
            body = b"".join([chunk async for chunk in response.body_iterator])
            return Response(body + b" collected", response.status_code)

    async def chunks() -> AsyncGenerator[str, None]:
        await insert(db, "stream")
        yield "body"

    app = application(framework, {"/": write_and_stream(db, chunks)}, Collect, DBSessionMiddleware)
    assert (await (await ask(app)).get("/")).text == "body collected"
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == ["response", "stream"]


@pytest.mark.parametrize("status", [504, 200])
@pytest.mark.parametrize("in_a_statement", [False, True])
async def test_a_handler_that_a_middleware_has_given_up_on_changes_nothing(
    db: DBConnect, database: Database, framework: type[Starlette], status: int, in_a_statement: bool
) -> None:
    """`BaseHTTPMiddleware` lets it run on: `asyncio.wait_for(call_next(request), ...)` cancels only the waiting."""
    entered, given_up = asyncio.Event(), asyncio.Event()
    errors: list[BaseException] = []

    class GiveUp(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            calling = asyncio.ensure_future(call_next(request))
            await entered.wait()
            if in_a_statement:
                await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
            calling.cancel()
            return PlainTextResponse("late", status)

    async def write(request: Request) -> Response:
        session = await insert(db, "first half")
        entered.set()
        try:
            if in_a_statement:
                await session.execute(text("SELECT pg_sleep(300)"))
            await given_up.wait()
            await insert(db, "second half")
        except Exception as exc:
            errors.append(exc)
            raise
        return PlainTextResponse("success")

    async with (
        serve(application(framework, {"/": write}, GiveUp, DBSessionMiddleware)) as base_url,
        http_client(base_url) as client,
    ):
        assert (await client.post("/")).status_code == status
        given_up.set()
        await eventually(lambda: bool(errors), "the handler goes on")
    if not in_a_statement:
        assert [type(error) for error in errors] == [ContextClosedError]
    assert await database.names() == []


@AHEAD
async def test_a_body_that_fails_is_rolled_back_although_its_end_is_sent(
    db: DBConnect, database: Database, framework: type[Starlette], stack: list[Any]
) -> None:
    """Starlette's `BaseHTTPMiddleware` ends the body before it raises its error."""
    read = asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        await insert(db, "body")
        yield "x" * 65536
        await read.wait()
        raise ValueError

    async with (
        serve(application(framework, {"/": write_and_stream(db, chunks)}, *stack)) as url,
        RawClient.connect(url) as client,
    ):
        await client.send("/")
        assert await client.read_head() == 200
        read.set()
        await client.reader.read()
    assert await database.names() == ["response"]


@AHEAD
@pytest.mark.parametrize("has_background", [False, True])
async def test_a_body_whose_client_has_left_is_rolled_back(
    db: DBConnect, database: Database, framework: type[Starlette], stack: list[Any], has_background: bool
) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        await insert(db, "body")
        while True:
            yield "x" * 65536
            await asyncio.sleep(0)

    async def stream(request: Request) -> Response:
        await insert(db, "response")
        background = BackgroundTask(insert, db, "background") if has_background else None
        return StreamingResponse(chunks(), background=background)

    async with serve(application(framework, {"/": stream}, *stack)) as url, RawClient.connect(url) as client:
        await client.send("/")
        assert await client.read_head() == 200
        client.abort()
    assert await database.names() == (["background", "response"] if has_background else ["response"])


async def test_a_body_is_rolled_back_in_whose_place_a_middleware_answers_an_error(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    begun = asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        await insert(db, "body")
        begun.set()
        while True:
            yield "body"

    class Refuse(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            await call_next(request)
            await begun.wait()
            return PlainTextResponse("refused", 503)

    client = await ask(application(framework, {"/": write_and_stream(db, chunks)}, Refuse, DBSessionMiddleware))
    response = await client.get("/")
    assert (response.status_code, response.text) == (503, "refused")
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == ["response"]


class PassOn:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@pytest.mark.parametrize("stack", [[DBSessionMiddleware], [PassOn, DBSessionMiddleware]])
async def test_the_background_task_of_a_stream_whose_client_has_left_before_its_start_is_committed(
    db: DBConnect, database: Database, framework: type[Starlette], stack: list[Any]
) -> None:
    begun, done = asyncio.Event(), asyncio.Event()

    async def chunks() -> AsyncGenerator[str, None]:
        yield "x"

    async def work() -> None:
        await insert(db, "background")
        done.set()

    async def stream(request: Request) -> Response:
        await (await db_session(db)).execute(text("SELECT 1"))
        begun.set()
        while not await request.is_disconnected():
            await asyncio.sleep(0.001)
        return StreamingResponse(chunks(), background=BackgroundTask(work))

    async with serve(application(framework, {"/": stream}, *stack)) as url:
        async with RawClient.connect(url) as client:
            await client.send("/")
            await begun.wait()
            client.abort()
        await done.wait()
    assert await database.names() == ["background"]


@pytest.mark.parametrize("end", [rollback_db_session, commit_db_session])
async def test_a_task_that_ends_the_transaction_of_a_body_whose_client_leaves_meanwhile_does_not_wait_for_ever(
    db: DBConnect, database: Database, end: Callable[[DBConnect], Awaitable[None]]
) -> None:
    ending: list[asyncio.Task[None]] = []

    async def sleep_in_the_database() -> None:
        await (await db_session(db)).execute(text("SELECT pg_sleep(60)"))

    async def chunks() -> AsyncGenerator[str, None]:
        yield "x"
        await insert(db, "body")
        # When this is cancelled, it does not wait for the end of the statement.
        await asyncio.gather(sleep_in_the_database(), asyncio.sleep(60))

    async def stream(request: Request) -> Response:
        await insert(db, "response")
        ending.append(asyncio.create_task(end_while_the_statement_runs()))
        return StreamingResponse(chunks())

    async def end_while_the_statement_runs() -> None:
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep' AND state = 'active'")), "no statement")
        asyncio.get_running_loop().call_soon(leave.set)
        await end(db)

    leave = asyncio.Event()
    async with serve(application(Starlette, {"/": stream}, DBSessionMiddleware)) as url:
        async with RawClient.connect(url) as client:
            await client.send("/")
            assert await client.read_head() == 200
            await leave.wait()
            client.abort()
        with suppress(ContextClosedError):
            await asyncio.wait_for(ending[0], 30)
        await database.assert_quiet()
    assert await database.names() == ["response"]
