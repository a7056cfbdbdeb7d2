"""Applications that are mounted in a Litestar application: Litestar's own, and any other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from litestar import Litestar, Request, Response, asgi, get
from litestar.config.compression import CompressionConfig
from litestar.middleware import ASGIMiddleware
from sqlalchemy.exc import IntegrityError
from tests.support.database import Database, insert, insert_row_that_fails_at_commit
from tests.support.foreign import EndlessApplication, InASGI, InASGI3, WSGIApplication, asgi2, wsgi
from tests.support.litestar_app import Ask, answering, litestar_app

from ctxdb_core import DBConnect
from ctxdb_core.asgi import Receive, Scope, Send
from ctxdb_litestar import CtxDBPlugin

both_copy_scopes = pytest.mark.parametrize("copy_scope", [True, False])
"""A mounted application gets a copy of the scope, or writes into that of the application around it."""


class PassOn(ASGIMiddleware):
    async def handle(self, scope: Any, receive: Any, send: Any, next_app: Any) -> None:
        await next_app(scope, receive, send)


def mounting(inner: Any, *, copy_scope: bool, **options: Any) -> Litestar:
    return litestar_app(asgi("/inner", is_mount=True, copy_scope=copy_scope)(inner), **options)


@pytest.mark.parametrize(
    "options", [{}, {"middleware": [PassOn()]}, {"compression_config": CompressionConfig("gzip", minimum_size=1)}]
)
async def test_a_mounted_asgi_application_is_inside(
    db: DBConnect, database: Database, ask: Ask, options: dict[str, Any]
) -> None:
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        status = int(scope["query_string"])
        await insert(db, str(status))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    client = await ask(mounting(mounted, copy_scope=True, db=db, **options))
    assert (await client.get("/inner/anything?409")).status_code == 409
    assert (await client.get("/inner/anything?202")).status_code == 202
    assert await database.names() == ["202"]


async def test_a_failing_commit_of_an_asgi_application_is_answered_by_the_one_around_it(
    db: DBConnect, ask: Ask
) -> None:
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"success"})

    app = mounting(mounted, copy_scope=True, db=db, exception_handlers={IntegrityError: answering(409)})
    response = await (await ask(app)).get("/inner/anything")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")


@pytest.mark.parametrize(
    "foreign",
    [
        lambda: InASGI(wsgi),
        lambda: InASGI(WSGIApplication()),
        lambda: InASGI3(asgi2),
        EndlessApplication,
    ],
    ids=["wsgi", "wsgi object", "asgi 2", "endless"],
)
@pytest.mark.parametrize(
    "options", [{}, {"middleware": [PassOn()]}, {"compression_config": CompressionConfig("gzip", minimum_size=10**6)}]
)
async def test_an_application_of_another_kind_is_left_alone(
    db: DBConnect, ask: Ask, foreign: Callable[[], Any], options: dict[str, Any]
) -> None:
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await served(scope, receive, send)

    served = foreign()
    # Litestar takes functions; an object is mounted by what it is called with.
    mounted.app = served  # type: ignore[attr-defined]  # as an object would have it
    response = await (await ask(mounting(mounted, copy_scope=True, db=db, **options))).get("/inner/anything")
    assert (response.status_code, response.text) == (200, "foreign")


@both_copy_scopes
@pytest.mark.parametrize(
    ("inner_status", "outer_status", "expected"),
    [(418, 409, 418), (418, None, 418), (None, 409, 409), (None, None, 500)],
)
@pytest.mark.parametrize("inner_has_plugin", [True, False])
async def test_the_handlers_of_the_mounted_application_come_first(
    db: DBConnect,
    ask: Ask,
    inner_status: int | None,
    outer_status: int | None,
    expected: int,
    inner_has_plugin: bool,
    copy_scope: bool,
) -> None:
    def handlers(status: int | None) -> dict[Any, Any]:
        return {} if status is None else {IntegrityError: answering(status)}

    @get("/write")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    plugins = [CtxDBPlugin()] if inner_has_plugin else []
    inner = litestar_app(write, plugins=plugins, exception_handlers=handlers(inner_status))
    client = await ask(mounting(inner, copy_scope=copy_scope, db=db, exception_handlers=handlers(outer_status)))
    assert (await client.get("/inner/write")).status_code == expected


@both_copy_scopes
async def test_a_handler_of_the_mounted_application_knows_its_own_application(
    db: DBConnect, ask: Ask, copy_scope: bool
) -> None:
    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[Any]:
        return Response([request.app is inner, request.scope["path"]], status_code=409)

    @get("/write")
    async def write() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    inner = litestar_app(write, plugins=[CtxDBPlugin()], exception_handlers={IntegrityError: handle})
    response = await (await ask(mounting(inner, copy_scope=copy_scope, db=db))).get("/inner/write")
    assert (response.status_code, response.json()) == (409, [True, "/write"])


async def test_a_mounted_starlette_application_with_its_middleware_can_stream_behind_a_queue(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    pytest.importorskip("ctxdb_starlette")
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from tests.support.stacks import DoNothing, application

    from ctxdb_starlette import DBSessionMiddleware

    async def chunks() -> AsyncGenerator[str, None]:
        seen.append(await database.names())
        await insert(db, "body")
        yield "body"

    async def stream(request: Any) -> Any:
        await insert(db, "response")
        return StreamingResponse(chunks())

    seen: list[list[str]] = []
    inner = application(Starlette, {"/stream/": stream}, DoNothing, DBSessionMiddleware)
    response = await (await ask(mounting(inner, copy_scope=True, db=db))).get("/inner/stream")
    assert (response.status_code, response.text) == (200, "body")
    assert seen == [["response"]]
    assert await database.names() == ["body", "response"]
