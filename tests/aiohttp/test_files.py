"""A `FileResponse` learns its status while it is prepared: that one decides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from sqlalchemy.exc import IntegrityError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, insert, insert_row_that_fails_at_commit
from tests.support.wire import Wire, ask

from ctxdb_aiohttp import setup
from ctxdb_core import DBConnect

statuses = pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/file", {}, 200),
        ("/file", {"Range": "bytes=2-4"}, 206),
        ("/file", {"If-None-Match": "*"}, 304),
        ("/folder", {}, 403),
        ("/missing", {}, 404),
        ("/file", {"If-Match": '"another"'}, 412),
        ("/file", {"Range": "bytes=100-"}, 416),
    ],
)
prepared = pytest.mark.parametrize("prepared", [False, True], ids=["returned", "prepared"])


def application(directory: Path, work: Callable[[], Awaitable[object]], prepared: bool = False) -> web.Application:
    (directory / "file").write_text("content")
    (directory / "folder").mkdir()

    async def handler(request: web.Request) -> web.StreamResponse:
        await work()
        response = web.FileResponse(directory / request.match_info["name"])
        if prepared:
            await response.prepare(request)
        return response

    app = web.Application()
    app.router.add_get("/{name}", handler)
    return app


@statuses
@prepared
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_status_of_the_prepared_file_response_decides(
    db: DBConnect,
    database: Database,
    serve: Serve,
    tmp_path: Path,
    path: str,
    headers: Mapping[str, str],
    status: int,
    prepared: bool,
    method: str,
) -> None:
    app = application(tmp_path, lambda: insert(db, "one"), prepared)
    setup(app)
    async with Wire.connect(await serve(app)) as wire:
        await wire.send(path, method, headers)
        assert (await wire.read_head())[0] == status
        await wire.read_to_end()
    assert await database.names() == (["one"] if status < 400 else [])


@statuses
@prepared
async def test_a_commit_that_fails_is_answered_by_the_error_middleware(
    db: DBConnect, serve: Serve, tmp_path: Path, path: str, headers: Mapping[str, str], status: int, prepared: bool
) -> None:
    @web.middleware
    async def answer_409(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except IntegrityError:
            return web.Response(status=409, text="handled")

    app = application(tmp_path, lambda: insert_row_that_fails_at_commit(db), prepared)
    app.middlewares.append(answer_409)
    setup(app)
    async with Wire.connect(await serve(app)) as wire:
        await wire.send(path, headers=headers)
        assert (await wire.read_head())[0] == (409 if status < 400 else status)
        await wire.read_to_end()


@pytest.mark.parametrize(("headers", "body"), [({}, "content"), ({"Range": "bytes=2-4"}, "nte")])
async def test_the_body_of_a_file_response_arrives_whole(
    db: DBConnect, serve: Serve, tmp_path: Path, headers: Mapping[str, str], body: str
) -> None:
    app = application(tmp_path, lambda: insert(db, "one"))
    setup(app)
    assert (await ask(await serve(app), "/file", headers=headers)).text == body


async def test_a_middleware_can_change_a_file_response_before_aiohttp_prepares_it(
    db: DBConnect, serve: Serve, tmp_path: Path
) -> None:
    @web.middleware
    async def set_cookie(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        assert not response.prepared
        assert set(response.headers) == set()
        response.set_cookie("name", "value")
        return response

    app = application(tmp_path, lambda: insert(db, "one"))
    app.middlewares.append(set_cookie)
    setup(app)
    answer = await ask(await serve(app), "/file")
    assert answer.text == "content"
    assert answer.headers["set-cookie"].startswith("name=value")


@pytest.mark.parametrize(("path", "status"), [("/static/file", 200), ("/static/missing", 404)])
async def test_static_files_touch_no_database(
    database: Database, serve: Serve, tmp_path: Path, path: str, status: int
) -> None:
    (tmp_path / "file").write_text("content")
    app = web.Application()
    app.router.add_static("/static", tmp_path)
    setup(app, database.connect())
    assert (await ask(await serve(app), path)).status == status
    assert database.engines == []
