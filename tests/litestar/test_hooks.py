"""All of Litestar's layers around a route handler are inside of the request's unit of work."""

from __future__ import annotations

from typing import Any

import pytest
from litestar import MediaType, Request, Response, get, head, post
from litestar.background_tasks import BackgroundTask
from litestar.config.app import AppConfig
from litestar.config.cors import CORSConfig
from litestar.exceptions import NotFoundException, PermissionDeniedException
from litestar.plugins import InitPlugin
from litestar.types import Message
from sqlalchemy.exc import IntegrityError
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.litestar_app import Ask, answering, litestar_app

from ctxdb_core import DBConnect, commit_policy, db_session
from ctxdb_core.adapters import is_context_initiated
from ctxdb_core.asgi import ASGIApp, Receive, Scope, Send
from ctxdb_litestar import CtxDBPlugin

# --- before the handler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refuses", "status", "names"), [(False, 200, ["guard", "handler"]), (True, 403, [])])
async def test_a_guard(
    db: DBConnect, database: Database, ask: Ask, refuses: bool, status: int, names: list[str]
) -> None:
    async def guard(connection: Any, handler: Any) -> None:
        await insert(db, "guard")
        if refuses:
            raise PermissionDeniedException

    @get("/", guards=[guard])
    async def write() -> str:
        await insert(db, "handler")
        return "done"

    assert (await (await ask(litestar_app(write, db=db))).get("/")).status_code == status
    assert await database.names() == names


@pytest.mark.parametrize(("status", "names"), [(202, ["hook"]), (409, [])])
async def test_a_before_request_hook_that_answers(
    db: DBConnect, database: Database, ask: Ask, status: int, names: list[str]
) -> None:
    async def answer(request: Request[Any, Any, Any]) -> Response[str]:
        await insert(db, "hook")
        return Response("hook", status_code=status)

    @get("/", before_request=answer)
    async def write() -> str:
        pytest.fail("the handler was called")

    assert (await (await ask(litestar_app(write, db=db))).get("/")).status_code == status
    assert await database.names() == names


@pytest.mark.parametrize(("status", "names"), [(202, ["middleware"]), (409, [])])
async def test_a_middleware_that_answers(
    db: DBConnect, database: Database, ask: Ask, status: int, names: list[str]
) -> None:
    def answer(app: ASGIApp) -> ASGIApp:
        async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
            await insert(db, "middleware")
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return middleware

    @get("/")
    async def write() -> str:
        pytest.fail("the handler was called")

    assert (await (await ask(litestar_app(write, db=db, middleware=[answer]))).get("/")).status_code == status
    assert await database.names() == names


# --- between the handler and the first byte ---------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "names"), [(202, ["handler", "hook"]), (409, [])])
async def test_an_after_request_hook_that_changes_the_status(
    db: DBConnect, database: Database, ask: Ask, status: int, names: list[str]
) -> None:
    async def change(response: Response[Any]) -> Response[Any]:
        await insert(db, "hook")
        return Response(response.content, status_code=status)

    @get("/", after_request=change)
    async def write() -> str:
        await insert(db, "handler")
        return "done"

    assert (await (await ask(litestar_app(write, db=db))).get("/")).status_code == status
    assert await database.names() == names


@pytest.mark.parametrize("hook", ["after_request", "before_send"])
async def test_a_hook_that_raises_rolls_back(db: DBConnect, database: Database, ask: Ask, hook: str) -> None:
    async def fail(*args: Any) -> Any:
        await insert(db, "hook")
        raise LookupError

    @get("/")
    async def write() -> str:
        await insert(db, "handler")
        return "done"

    options: dict[str, Any] = {"after_request": fail} if hook == "after_request" else {"before_send": [fail]}
    assert (await (await ask(litestar_app(write, db=db, **options))).get("/")).status_code == 500
    assert await database.names() == []


@pytest.mark.parametrize(("status", "names"), [(202, ["handler", "hook"]), (409, [])])
async def test_a_before_send_hook_that_changes_the_status(
    db: DBConnect, database: Database, ask: Ask, status: int, names: list[str]
) -> None:
    async def change(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.start":
            await insert(db, "hook")
            message["status"] = status

    @get("/")
    async def write() -> str:
        await insert(db, "handler")
        return "done"

    assert (await (await ask(litestar_app(write, db=db, before_send=[change]))).get("/")).status_code == status
    assert await database.names() == names


async def test_writes_of_a_before_send_hook_are_committed_before_the_first_byte(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    sent: list[tuple[str, list[str], int]] = []

    async def audit(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.start":
            await insert(db, "hook")

    @get("/")
    async def write() -> str:
        await insert(db, "handler")
        return "done"

    app: Any = litestar_app(write, db=db, before_send=[audit])

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def watch(message: Message) -> None:
            if message["type"].startswith("http."):
                sent.append((message["type"], await database.names(), database.checked_out))
            await send(message)

        await app(scope, receive, watch)

    client = await ask(watched)  # type: ignore[arg-type]  # any application will do
    assert (await client.get("/")).status_code == 200
    both = ["handler", "hook"]
    assert sent == [("http.response.start", both, 0), ("http.response.body", both, 0)]


async def test_a_before_send_hook_whose_write_is_refused_at_the_commit(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    async def audit(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            await insert_row_that_fails_at_commit(db)

    @get("/")
    async def write() -> str:
        await insert(db, "handler")
        return "success"

    app = litestar_app(write, db=db, before_send=[audit], exception_handlers={IntegrityError: answering(409)})
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert await database.names() == []


async def test_a_hook_of_a_plugin_that_comes_later_is_inside_as_well(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    class Audit(InitPlugin):
        def on_app_init(self, app_config: AppConfig) -> AppConfig:
            app_config.before_send.append(audit)
            return app_config

    async def audit(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.start":
            await insert_row_that_fails_at_commit(db)

    @get("/")
    async def write() -> str:
        return "success"

    assert (await (await ask(litestar_app(write, plugins=[CtxDBPlugin(db), Audit()]))).get("/")).status_code == 500
    assert await database.names("child", "parent") == []


# --- after the first byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
async def test_an_after_response_hook_has_transactions_of_its_own(
    db: DBConnect, database: Database, ask: Ask, fails: bool
) -> None:
    async def hook(request: Request[Any, Any, Any]) -> None:
        assert await db_session(db) is sessions[0]
        await insert(db, "hook")
        if fails:
            raise LookupError

    sessions: list[object] = []

    @get("/", after_response=hook)
    async def write() -> str:
        sessions.append(await insert(db, "handler"))
        return "done"

    assert (await (await ask(litestar_app(write, db=db))).get("/")).status_code == 200
    await eventually(lambda: database.checkouts == 2 and not database.checked_out, "the hook is not over")
    assert await database.names() == (["handler"] if fails else ["handler", "hook"])


async def test_a_before_send_hook_for_the_body_has_transactions_of_its_own(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    async def audit(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.body":
            await insert(db, "hook")

    @get("/")
    async def write() -> Response[str]:
        return Response("", status_code=409)

    assert (await (await ask(litestar_app(write, db=db, before_send=[audit]))).get("/")).status_code == 409
    await eventually(lambda: database.checkouts == 1 and not database.checked_out, "the hook is not over")
    assert await database.names() == ["hook"]


# --- requests that reach no handler -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/", 405)])
@pytest.mark.parametrize("committed", [True, False])
async def test_an_unknown_path_or_method_has_a_unit_of_work(
    db: DBConnect, database: Database, ask: Ask, method: str, path: str, status: int, committed: bool
) -> None:
    async def note(exc: Exception, scope: Any) -> None:
        await insert(db, "after_exception")

    async def audit(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.start":
            await insert(db, "before_send")

    @get("/")
    async def read() -> str:
        return "done"

    plugin = CtxDBPlugin(db, commit_policy=commit_policy(commit={status} if committed else ()))
    app = litestar_app(read, plugins=[plugin], after_exception=[note], before_send=[audit])
    assert (await (await ask(app)).request(method, path)).status_code == status
    assert await database.names() == (["after_exception", "before_send"] if committed else [])


async def test_an_exception_handler_for_unknown_paths_can_leave_work_behind(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[str]:
        assert is_context_initiated()
        return Response("", status_code=404, background=BackgroundTask(insert, db, request.url.path))

    app = litestar_app(db=db, exception_handlers={NotFoundException: handle})
    assert (await (await ask(app)).get("/nowhere")).status_code == 404
    await eventually(lambda: database.checkouts == 1 and not database.checked_out, "no background work")
    assert await database.names() == ["/nowhere"]


async def test_a_preflight_request_has_a_unit_of_work(db: DBConnect, database: Database, ask: Ask) -> None:
    async def audit(message: Message, scope: Any) -> None:
        if message["type"] == "http.response.start":
            await insert(db, scope["method"])

    @post("/")
    async def write() -> None: ...

    app = litestar_app(write, db=db, before_send=[audit], cors_config=CORSConfig(allow_origins=["http://front.end"]))
    headers = {"origin": "http://front.end", "access-control-request-method": "POST"}
    assert (await (await ask(app)).options("/", headers=headers)).status_code == 204
    assert await database.names() == ["OPTIONS"]


async def test_head_and_options_are_answered_as_ever(db: DBConnect, database: Database, ask: Ask) -> None:
    @head("/")
    async def write() -> None:
        await insert(db, "head")

    client = await ask(litestar_app(write, db=db))
    assert (await client.head("/")).status_code == 200
    response = await client.options("/")
    assert (response.status_code, response.headers["allow"]) == (204, "HEAD, OPTIONS")
    assert await database.names() == ["head"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["handler", "middleware"])
@pytest.mark.parametrize(("status", "names"), [(202, ["one"]), (418, [])])
async def test_a_handled_exception_counts_by_its_response(
    db: DBConnect, database: Database, ask: Ask, where: str, status: int, names: list[str]
) -> None:
    def middleware(app: ASGIApp) -> ASGIApp:
        async def fail(scope: Scope, receive: Receive, send: Send) -> None:
            if where == "middleware":
                await insert(db, "one")
                raise LookupError
            await app(scope, receive, send)

        return fail

    @get("/", media_type=MediaType.TEXT)
    async def write() -> str:
        await insert(db, "one")
        raise LookupError

    app = litestar_app(write, db=db, middleware=[middleware], exception_handlers={LookupError: answering(status)})
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.text) == (status, "handled LookupError")
    assert await database.names() == names
