"""Promise 1 in Litestar: who answers when the commit fails, and what is sent then."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from litestar import Controller, MediaType, Request, Response, Router, get
from litestar.background_tasks import BackgroundTask
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.exceptions import HTTPException, LitestarException
from litestar.response import ServerSentEvent, Stream
from litestar.types import Message
from sqlalchemy.exc import DBAPIError, IntegrityError
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.litestar_app import Ask, answering, litestar_app

from ctxdb_core import DBConnect, commit_db_session, commit_policy
from ctxdb_core.asgi import ASGIApp, Receive, Scope, Send
from ctxdb_litestar import CtxDBPlugin

# --- which handler answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [IntegrityError, DBAPIError, Exception, 500])
async def test_the_applications_handler_by_class_or_by_500(
    db: DBConnect, database: Database, ask: Ask, key: Any
) -> None:
    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, exception_handlers={key: answering(409)}))
    response = await client.get("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert await database.names("child", "parent") == []


@pytest.mark.parametrize("layer", ["handler", "controller", "router"])
async def test_the_handler_of_the_layer_that_is_nearest(db: DBConnect, ask: Ask, layer: str) -> None:
    def handlers(of: str) -> dict[Any, Any]:
        return {IntegrityError: answering(409, of)} if of == layer else {}

    class Items(Controller):
        path = "/items"
        exception_handlers = handlers("controller")

        @get("/", exception_handlers=handlers("handler"))
        async def write(self) -> str:
            await insert_row_that_fails_at_commit(db)
            return "success"

    router = Router("/router", route_handlers=[Items], exception_handlers=handlers("router"))
    client = await ask(litestar_app(router, db=db, exception_handlers={IntegrityError: answering(418, "application")}))
    response = await client.get("/router/items")
    assert (response.status_code, response.text) == (409, f"{layer} IntegrityError")


async def test_litestars_own_answer_looks_like_that_to_any_other_error(db: DBConnect, ask: Ask) -> None:
    @get("/commit", media_type=MediaType.TEXT)
    async def commit() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    @get("/raise", media_type=MediaType.TEXT)
    async def fail() -> str:
        raise LookupError

    client = await ask(litestar_app(commit, fail, db=db))
    failed_commit, any_other = await client.get("/commit"), await client.get("/raise")
    assert failed_commit.status_code == 500
    assert failed_commit.text == any_other.text
    assert failed_commit.headers["content-type"] == any_other.headers["content-type"]


async def test_an_http_exception_of_before_commit_is_answered_by_its_status(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    async def before_commit(session: object) -> None:
        raise HTTPException("not like this", status_code=412, headers={"x-reason": "policy"})

    @get("/")
    async def write() -> str:
        await insert(db, "one")
        return "success"

    client = await ask(litestar_app(write, plugins=[CtxDBPlugin(db, before_commit=before_commit)]))
    response = await client.get("/")
    assert (response.status_code, response.headers["x-reason"]) == (412, "policy")
    assert "not like this" in response.text
    assert await database.names() == []


async def test_in_debug_mode_the_error_is_shown(db: DBConnect, ask: Ask) -> None:
    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, debug=True))
    response = await client.get("/")
    assert response.status_code == 500
    assert "IntegrityError" in response.text


async def test_the_handler_sees_the_request_of_the_route(db: DBConnect, ask: Ask) -> None:
    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[Any]:
        content = [request.url.path, request.path_params["name"], request.state.noted, request.route_handler.name]
        return Response(content, status_code=409)

    @get("/items/{name:str}", name="items")
    async def write(request: Request[Any, Any, Any]) -> str:
        request.state.noted = "by the handler"
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, exception_handlers={IntegrityError: handle}))
    response = await client.get("/items/one")
    assert response.json() == ["/items/one", "one", "by the handler", "items"]


async def test_after_exception_hooks_are_told_once(db: DBConnect, ask: Ask) -> None:
    seen: list[type[Exception]] = []

    async def note(exc: Exception, scope: Any) -> None:
        seen.append(type(exc))

    @get("/", after_request=lambda response: response)
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, after_exception=[note]))
    assert (await client.get("/")).status_code == 500
    assert seen == [IntegrityError]


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "stream", "events"])
async def test_no_part_of_a_success_is_sent_after_a_failed_commit(db: DBConnect, ask: Ask, kind: str) -> None:
    begun: list[str] = []

    async def chunks() -> AsyncGenerator[str, None]:
        begun.append("body")
        yield "success"

    @get("/")
    async def write() -> Response[Any]:
        await insert_row_that_fails_at_commit(db)
        headers = {"x-success": "yes"}
        if kind == "stream":
            return Stream(chunks(), headers=headers)
        if kind == "events":
            return ServerSentEvent(chunks(), headers=headers)
        return Response("success", headers=headers)

    client = await ask(litestar_app(write, db=db, exception_handlers={IntegrityError: answering(409)}))
    response = await client.get("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert "x-success" not in response.headers
    assert begun == []


async def test_a_refused_response_is_followed_by_no_hook_and_no_background_task(db: DBConnect, ask: Ask) -> None:
    happened: list[str] = []

    async def after_response(request: Request[Any, Any, Any]) -> None:
        happened.append("after_response")

    async def background() -> None:
        happened.append("background")

    @get("/", after_response=after_response, background=BackgroundTask(background))
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db))
    assert (await client.get("/")).status_code == 500
    assert happened == []


async def test_the_error_response_has_its_cors_headers(db: DBConnect, ask: Ask) -> None:
    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    app = litestar_app(
        write,
        db=db,
        cors_config=CORSConfig(allow_origins=["http://front.end"]),
        exception_handlers={IntegrityError: answering(409)},
    )
    response = await (await ask(app)).get("/", headers={"origin": "http://front.end"})
    assert response.status_code == 409
    assert response.headers["access-control-allow-origin"] == "http://front.end"


async def test_before_send_hooks_see_the_error_response(db: DBConnect, ask: Ask) -> None:
    async def tag(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-tag", b"yes")]

    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    app = litestar_app(write, db=db, before_send=[tag], exception_handlers={IntegrityError: answering(409)})
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.headers.get_list("x-tag")) == (409, ["yes"])


@pytest.mark.parametrize("minimum_size", [1, 10_000])
async def test_behind_a_compression_the_error_is_answered_plainly(db: DBConnect, ask: Ask, minimum_size: int) -> None:
    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success" * 100

    app = litestar_app(
        write,
        db=db,
        compression_config=CompressionConfig("gzip", minimum_size=minimum_size),
        exception_handlers={IntegrityError: answering(409)},
    )
    response = await (await ask(app)).get("/", headers={"accept-encoding": "gzip"})
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert "content-encoding" not in response.headers


async def test_a_success_that_was_not_sent_is_not_cached(db: DBConnect, database: Database, ask: Ask) -> None:
    fails = True

    @get("/", cache=True)
    async def write() -> str:
        await insert(db, "one")
        if fails:
            await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, exception_handlers={IntegrityError: answering(409)}))
    assert (await client.get("/")).status_code == 409
    fails = False
    # The second one comes from the cache.
    for _ in range(2):
        response = await client.get("/")
        assert (response.status_code, response.text) == (200, "success")
    assert await database.names() == ["one"]


async def test_a_middleware_that_answers_the_error_itself_is_not_heard(db: DBConnect, ask: Ask) -> None:
    def pretend(app: ASGIApp) -> ASGIApp:
        async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            except LitestarException:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"pretended success"})

        return middleware

    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    app = litestar_app(write, db=db, middleware=[pretend], exception_handlers={IntegrityError: answering(409)})
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")


async def test_a_middleware_that_fails_on_top_of_it_does_not_hide_the_error(db: DBConnect, ask: Ask) -> None:
    seen: list[Exception] = []

    def fail(app: ASGIApp) -> ASGIApp:
        async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
            failed = False
            try:
                await app(scope, receive, send)
            except LitestarException:
                failed = True
            if failed:
                raise LookupError("while cleaning up")

        return middleware

    async def note(exc: Exception, scope: Any) -> None:
        seen.append(exc)

    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, middleware=[fail], after_exception=[note]))
    assert (await client.get("/")).status_code == 500
    [error] = seen
    assert isinstance(error, IntegrityError)
    assert any("while cleaning up" in note for note in error.__notes__)


# --- what the answer does in the database -----------------------------------------------------------------------------


async def test_status_of_the_error_response_decides_on_writes_of_the_exception_handler(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    async def note(exc: Exception, scope: Any) -> None:
        await insert(db, "committed by itself")
        await commit_db_session(db)
        await insert(db, "of the response")

    @get("/{status:int}")
    async def write() -> str:
        await insert(db, "undone")
        await insert_row_that_fails_at_commit(db)
        return "success"

    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[Any]:
        return Response("", status_code=request.path_params["status"])

    app = litestar_app(write, db=db, after_exception=[note], exception_handlers={IntegrityError: handle})
    client = await ask(app)
    assert (await client.get("/409")).status_code == 409
    assert await database.names() == ["committed by itself"]
    await database.query("TRUNCATE item")
    assert (await client.get("/202")).status_code == 202
    assert await database.names() == ["committed by itself", "of the response"]


async def test_the_answer_can_leave_work_behind(db: DBConnect, database: Database, ask: Ask) -> None:
    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[Any]:
        return Response("", status_code=409, background=BackgroundTask(insert, db, "background"))

    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, exception_handlers={IntegrityError: handle}))
    assert (await client.get("/")).status_code == 409
    await eventually(lambda: database.checkouts == 2 and not database.checked_out, "no background work")
    assert await database.names() == ["background"]


async def test_an_answer_whose_own_commit_fails_is_not_sent_either(db: DBConnect, database: Database, ask: Ask) -> None:
    calls: list[Exception] = []

    async def note(exc: Exception, scope: Any) -> None:
        calls.append(exc)
        await insert_row_that_fails_at_commit(db)

    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    app = litestar_app(write, db=db, after_exception=[note], exception_handlers={IntegrityError: answering(200)})
    response = await (await ask(app)).get("/")
    assert response.status_code == 500
    assert "handled" not in response.text
    assert len(calls) == 1
    assert database.checked_out == 0


async def test_a_handler_that_fails_itself_ends_in_a_500(db: DBConnect, database: Database, ask: Ask) -> None:
    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[Any]:
        raise LookupError

    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    client = await ask(litestar_app(write, db=db, exception_handlers={IntegrityError: handle}))
    assert (await client.get("/")).status_code == 500
    assert database.checked_out == 0


@pytest.mark.parametrize("options", [{}, {"compression_config": CompressionConfig("gzip", minimum_size=10**6)}])
async def test_an_error_whose_own_answer_cannot_be_committed_is_answered_for_that(
    db: DBConnect, database: Database, ask: Ask, options: dict[str, Any]
) -> None:
    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        raise LookupError

    handlers: dict[Any, Any] = {LookupError: answering(200), IntegrityError: answering(409)}
    client = await ask(litestar_app(write, db=db, exception_handlers=handlers, **options))
    response = await client.get("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert await database.names("child", "parent") == []


async def test_an_unknown_path_whose_commit_fails_is_answered_by_the_handlers(db: DBConnect, ask: Ask) -> None:
    async def audit(exc: Exception, scope: Any) -> None:
        if isinstance(exc, HTTPException):
            await insert_row_that_fails_at_commit(db)

    plugin = CtxDBPlugin(db, commit_policy=commit_policy(commit={404}))
    app = litestar_app(plugins=[plugin], after_exception=[audit], exception_handlers={IntegrityError: answering(409)})
    assert (await (await ask(app)).get("/nowhere")).status_code == 409


async def test_an_unknown_path_whose_commit_fails_ends_in_a_500(db: DBConnect, ask: Ask) -> None:
    async def audit(exc: Exception, scope: Any) -> None:
        await insert_row_that_fails_at_commit(db)

    plugin = CtxDBPlugin(db, commit_policy=commit_policy(commit={404}))
    client = await ask(litestar_app(plugins=[plugin], after_exception=[audit]))
    assert (await client.get("/nowhere")).status_code == 500


async def test_a_scope_that_is_used_again_is_another_request(db: DBConnect) -> None:
    @get("/")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    app: Any = litestar_app(write, db=db)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "root_path": ""}
    statuses: list[int] = []
    for _ in range(2):
        scope.pop("state", None)
        await app(scope, receive, send)
    assert statuses == [500, 500]
