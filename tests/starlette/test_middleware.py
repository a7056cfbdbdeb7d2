"""`DBSessionMiddleware` in the stacks that Starlette and FastAPI applications are made of."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.server import RawClient, serve
from tests.support.stacks import Ask, DoNothing, application, on_integrity_error

from ctxdb_core import ArgumentTypeError, DBConnect, commit_db_session, db_session
from ctxdb_core.adapters import is_context_initiated
from ctxdb_core.asgi import ASGIApp, Receive, Scope, Send
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown, provide_session

# --- below and above other middlewares --------------------------------------------------------------------------------

STACKS = pytest.mark.parametrize(
    "stack",
    [
        [DBSessionMiddleware],
        [DBSessionMiddleware, DBSessionMiddleware],
        [DBSessionMiddleware, DoNothing],
        [DoNothing, DBSessionMiddleware],
        [DoNothing, DBSessionMiddleware, DoNothing],
        [DBSessionMiddleware, DoNothing, DBSessionMiddleware],
        [GZipMiddleware, DBSessionMiddleware],
        [DBSessionMiddleware, GZipMiddleware],
    ],
    ids=lambda stack: "-".join(each.__name__ for each in reversed(stack)),
)


@STACKS
async def test_requests_are_committed_in_every_stack(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, stack: list[Any]
) -> None:
    async def write(request: Request) -> Response:
        await insert(db, "one")
        return PlainTextResponse("done", int(request.query_params["status"]))

    client = await ask(application(framework, {"/": write}, *stack))
    assert (await client.post("/?status=409")).status_code == 409
    assert await database.names() == []
    assert (await client.post("/?status=201")).status_code == 201
    assert await database.names() == ["one"]


@STACKS
async def test_a_failing_commit_reaches_its_handler_in_every_stack(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, stack: list[Any]
) -> None:
    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    async def stream(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)

        async def chunks() -> AsyncGenerator[str, None]:
            yield "success"

        return StreamingResponse(chunks())

    app = application(framework, {"/": write, "/stream": stream}, *stack, exception_handlers=on_integrity_error(409))
    client = await ask(app)
    for path in ("/", "/stream"):
        response = await client.post(path)
        assert (response.status_code, response.text) == (409, "handled IntegrityError")


@STACKS
async def test_background_tasks_work_in_every_stack(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, stack: list[Any]
) -> None:
    async def background() -> None:
        await insert(db, "background")

    async def write(request: Request) -> Response:
        await insert(db, "response")
        return PlainTextResponse("done", background=BackgroundTask(background))

    client = await ask(application(framework, {"/": write}, *stack))
    assert (await client.post("/")).status_code == 200
    await eventually(lambda: database.checkouts == 2 and not database.checked_out, "no background work")
    assert await database.names() == ["background", "response"]


@STACKS
async def test_a_client_that_leaves_leaks_nothing_in_any_stack(
    db: DBConnect, database: Database, framework: type[Starlette], stack: list[Any]
) -> None:
    ended = anyio.Event()

    async def stream(request: Request) -> Response:
        await insert(db, "response")

        async def chunks() -> AsyncGenerator[str, None]:
            await insert(db, "stream")
            while True:
                await anyio.sleep(0)
                yield "x" * 65536

        return StreamingResponse(chunks())

    app = application(framework, {"/": stream}, *stack)

    async def noticing(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        if scope["type"] == "http":
            ended.set()

    async with serve(noticing) as base_url:
        async with RawClient.connect(base_url) as client:
            await client.send("/")
            assert await client.read_head() == 200
            await client.reader.readexactly(1)
            client.abort()
        await eventually(ended.is_set, "the request goes on")
        assert database.checked_out == 0
    assert "response" in await database.names()


async def test_a_base_middleware_that_gives_up_on_a_request_rolls_it_back(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    """The request's task is cancelled, level-triggered, while a query runs."""

    class GiveUp(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            async def give_up() -> None:
                await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
                raise TimeoutError

            async with anyio.create_task_group() as group:
                group.start_soon(give_up)
                return await call_next(request)
            raise AssertionError

    async def write(request: Request) -> Response:
        session = await insert(db, "one")
        await session.execute(text("SELECT pg_sleep(300)"))
        return PlainTextResponse("success")

    client = await ask(application(framework, {"/": write}, DBSessionMiddleware, GiveUp))
    assert (await client.post("/")).status_code == 500
    await eventually(lambda: not database.backends("state <> 'idle'"), "the query runs on")
    assert database.checked_out == 0
    assert await database.names() == []


# --- exception handlers -----------------------------------------------------------------------------------------------


async def test_before_commit_can_refuse_with_an_http_exception(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    async def before_commit(session: object) -> None:
        raise HTTPException(412, "not like this")

    async def write(request: Request) -> Response:
        await insert(db, "one")
        return PlainTextResponse("success")

    app = application(framework, {"/": write})
    app.add_middleware(DBSessionMiddleware, before_commit=before_commit)
    response = await (await ask(app)).post("/")
    assert response.status_code == 412
    assert "not like this" in response.text
    assert await database.names() == []


@pytest.mark.parametrize("key", [500, Exception])
async def test_the_server_error_handler_answers_errors_that_no_other_handler_does(
    db: DBConnect, framework: type[Starlette], ask: Ask, key: Any
) -> None:
    async def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse(f"handled {type(exc).__name__}", 555)

    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(framework, {"/": write}, DBSessionMiddleware, exception_handlers={key: handle})
    response = await (await ask(app)).post("/")
    assert (response.status_code, response.text) == (555, "handled IntegrityError")


@pytest.mark.parametrize("streams", [False, True])
async def test_a_success_whose_headers_cannot_be_sent_is_a_500_that_commits_nothing(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, streams: bool
) -> None:
    async def write(request: Request) -> Response:
        await insert(db, "undone")
        headers = {"x-name": "a\r\nb"}
        return (
            StreamingResponse(iter(["success"]), headers=headers) if streams else Response("success", headers=headers)
        )

    app = application(framework, {"/": write}, DoNothing, DBSessionMiddleware)
    assert (await (await ask(app)).post("/")).status_code == 500
    assert await database.names() == []


async def test_sync_exception_handlers_answer_too(db: DBConnect, framework: type[Starlette], ask: Ask) -> None:
    def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse(request.url.path, 409)

    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(framework, {"/path": write}, DBSessionMiddleware, exception_handlers={IntegrityError: handle})
    response = await (await ask(app)).post("/path")
    assert (response.status_code, response.text) == (409, "/path")


async def test_a_handler_can_use_the_database(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    async def handle(request: Request, exc: Exception) -> Response:
        await insert(db, "noted")
        await commit_db_session(db)
        await insert(db, "rolled back with the 409")
        return PlainTextResponse("handled", 409)

    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(framework, {"/": write}, DBSessionMiddleware, exception_handlers={IntegrityError: handle})
    assert (await (await ask(app)).post("/")).status_code == 409
    assert await database.names() == ["noted"]


async def test_a_handler_whose_own_commit_fails_ends_in_a_500(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    calls = 0

    async def handle(request: Request, exc: Exception) -> Response:
        nonlocal calls
        calls += 1
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("handled", 200)

    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(framework, {"/": write}, DBSessionMiddleware, exception_handlers={IntegrityError: handle})
    assert (await (await ask(app)).post("/")).status_code == 500
    assert calls == 1
    assert database.checked_out == 0


# --- mounted applications ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["outer", "inner", "both"])
async def test_a_mounted_application_shares_the_unit_of_work(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, where: str
) -> None:
    async def write(request: Request) -> Response:
        await insert(db, "one")
        return PlainTextResponse("done", int(request.query_params["status"]))

    inner = application(framework, {"/": write}, *([DBSessionMiddleware] if where != "outer" else []))
    outer = application(framework, {}, *([DBSessionMiddleware] if where != "inner" else []))
    outer.router.routes.append(Mount("/sub", app=inner))
    client = await ask(outer)
    assert (await client.post("/sub/?status=409")).status_code == 409
    assert await database.names() == []
    assert (await client.post("/sub/?status=201")).status_code == 201
    assert await database.names() == ["one"]


@pytest.mark.parametrize(
    ("outer_status", "inner_status", "expected"),
    [(409, None, 409), (None, 418, 418), (409, 418, 418), (None, None, 500)],
)
async def test_the_nearest_applications_handler_answers_first(
    db: DBConnect,
    framework: type[Starlette],
    ask: Ask,
    outer_status: int | None,
    inner_status: int | None,
    expected: int,
) -> None:
    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    def options(status: int | None) -> dict[str, Any]:
        return {} if status is None else {"exception_handlers": on_integrity_error(status)}

    inner = application(framework, {"/": write}, **options(inner_status))
    outer = application(framework, {}, DBSessionMiddleware, **options(outer_status))
    outer.router.routes.append(Mount("/sub", app=inner))
    assert (await (await ask(outer)).post("/sub/")).status_code == expected


async def test_a_middleware_around_a_whole_application_finds_its_handlers(
    db: DBConnect, framework: type[Starlette], ask: Ask
) -> None:
    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(framework, {"/": write}, exception_handlers=on_integrity_error(409))
    response = await (await ask(DBSessionMiddleware(app))).post("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")


async def test_a_middleware_around_a_whole_application_finds_its_server_error_handler(
    db: DBConnect, framework: type[Starlette], ask: Ask
) -> None:
    async def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse("handled", 555)

    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(framework, {"/": write}, exception_handlers={Exception: handle})
    assert (await (await ask(DBSessionMiddleware(app))).post("/")).status_code == 555


# --- the responses of Starlette ---------------------------------------------------------------------------------------


async def test_every_kind_of_response_is_committed_first(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, tmp_path: Any
) -> None:
    file = tmp_path / "file.txt"
    file.write_text("content")
    kinds: dict[str, Callable[[], Response]] = {
        "file": lambda: FileResponse(file),
        "redirect": lambda: RedirectResponse("/elsewhere", 303),
        "empty": lambda: Response(status_code=204),
        "plain": lambda: PlainTextResponse("text"),
    }

    async def write(request: Request) -> Response:
        kind = request.query_params["kind"]
        await insert(db, kind)
        return kinds[kind]()

    client = await ask(application(framework, {"/": write}, DBSessionMiddleware))
    for kind in kinds:
        assert (await client.post(f"/?kind={kind}")).status_code < 400
        assert kind in await database.names()


async def test_middleware_given_to_the_constructor_works_as_well(db: DBConnect, database: Database, ask: Ask) -> None:
    async def write(request: Request) -> Response:
        await insert(db, "one")
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", write)], middleware=[Middleware(DBSessionMiddleware)])
    assert (await (await ask(app)).get("/")).status_code == 200
    assert await database.names() == ["one"]


async def test_unknown_paths_and_methods_get_starlettes_own_answers(framework: type[Starlette], ask: Ask) -> None:
    async def read(request: Request) -> Response:
        assert is_context_initiated()
        return PlainTextResponse("done")

    client = await ask(application(framework, {"/": read}, DBSessionMiddleware))
    assert (await client.get("/nowhere")).status_code == 404
    assert (await client.delete("/")).status_code == 405


async def test_a_pure_asgi_middleware_that_retries_cannot_send_twice(db: DBConnect, ask: Ask) -> None:
    class Retry:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self.app(scope, receive, send)
            except IntegrityError:
                await PlainTextResponse("pretended success")(scope, receive, send)

    async def write(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(Starlette, {"/": write}, Retry, DBSessionMiddleware)
    assert (await (await ask(app)).post("/")).status_code == 500


async def test_the_session_of_a_request_is_usable_in_dispatch(db: DBConnect, database: Database, ask: Ask) -> None:
    class Audit(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            session = await insert(db, "audit")
            response = await call_next(request)
            assert await db_session(db) is session
            return response

    async def write(request: Request) -> Response:
        await insert(db, "one")
        return PlainTextResponse("done", int(request.query_params["status"]))

    client = await ask(application(Starlette, {"/": write}, Audit, DBSessionMiddleware))
    assert (await client.post("/?status=400")).status_code == 400
    assert await database.names() == []
    assert (await client.post("/?status=200")).status_code == 200
    assert await database.names() == ["audit", "one"]


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_a_handler_can_read_the_request_again(
    db: DBConnect, framework: type[Starlette], ask: Ask, size: int
) -> None:
    """What is too large to be kept is empty for it, and not waited for."""

    async def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse(str(len(await request.body())), 409)

    async def write(request: Request) -> Response:
        assert len(await request.body()) == size
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("success")

    app = application(framework, {"/": write}, DBSessionMiddleware, exception_handlers={IntegrityError: handle})
    response = await (await ask(app)).post("/", content=b"x" * size)
    assert (response.status_code, response.text) == (409, str(size if size < 1_000_000 else 0))


@pytest.mark.parametrize("wire", [close_on_shutdown, provide_session])
def test_value_that_is_no_database_is_refused_at_once(wire: Callable[[Any], object]) -> None:
    with pytest.raises(ArgumentTypeError, match="`DBConnect`"):
        wire("postgresql+asyncpg://localhost")
