"""Commit policies of the ASGI middleware that are given the request's scope as well."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from litestar import Litestar, post
from sqlalchemy import text
from tests.support.database import Database, insert

from ctxdb_core import DBConnect, commit_2xx, commit_policy, db_session
from ctxdb_core.asgi import ASGIApp, ASGIHTTPDBSessionMiddleware, Scope
from ctxdb_litestar import CtxDBPlugin
from ctxdb_starlette import DBSessionMiddleware

METHODS = ("GET", "PUT")


def commit_writes(status: int, scope: Scope) -> bool:
    return status < 400 and scope["method"] != "GET"


async def ask(app: ASGIApp, *paths: str) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path in paths:
            for method in METHODS:
                assert (await client.request(method, path)).is_success


def fastapi(db: DBConnect, **options: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, **options)

    @app.api_route("/{name}", methods=[*METHODS])
    async def write(name: str) -> None:
        await insert(db, name)
        await (await db_session(db)).execute(text("UPDATE item SET name = name || '!'"))

    return app


async def test_the_scope_of_the_request_decides(db: DBConnect, database: Database) -> None:
    await ask(fastapi(db, commit_policy=commit_writes), "/one")
    assert await database.names() == ["one!"]


async def test_statuses_can_be_named_beside_a_policy_of_the_scope(db: DBConnect, database: Database) -> None:
    await ask(fastapi(db, commit_policy=commit_policy(commit_writes, roll_back=[200])), "/one")
    assert await database.names() == []


async def test_a_policy_with_a_second_argument_of_its_own_gets_the_status_alone(
    db: DBConnect, database: Database
) -> None:
    def policy(status: int, most: int = 300) -> bool:
        return status < most

    app = fastapi(db, commit_policy=policy)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.put("/one")
    assert await database.names() == ["one!"]


async def test_a_policy_sees_the_scope_as_the_application_has_left_it(db: DBConnect) -> None:
    seen: list[Any] = []

    def policy(status: int, scope: Scope) -> bool:
        seen.append(scope["path_params"])
        return True

    app = fastapi(db, commit_policy=policy)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.put("/one")
    assert seen == [{"name": "one"}]


async def test_the_answer_to_a_policy_that_fails_commits_its_own_work_only(db: DBConnect, database: Database) -> None:
    def policy(status: int) -> bool:
        if status == 200:
            raise LookupError
        return True

    app = fastapi(db, commit_policy=policy)

    @app.exception_handler(LookupError)
    async def handle(request: Request, error: LookupError) -> PlainTextResponse:
        await insert(db, f"handler of {request.method}")
        return PlainTextResponse("accepted", 202)

    await ask(app, "/one")
    assert await database.names() == ["handler of GET", "handler of PUT"]


async def test_litestars_plugin_takes_a_policy_of_the_scope(db: DBConnect, database: Database) -> None:
    @post(["/drop", "/keep"])
    async def write() -> None:
        await insert(db, "one")

    plugin = CtxDBPlugin(commit_policy=lambda status, scope: "keep" in scope["path"])
    app: Any = Litestar([write], plugins=[plugin], logging_config=None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for name in ("drop", "keep"):
            assert (await client.post(f"/{name}")).status_code == 201
    assert await database.names() == ["one"]


async def _async_policy(status: int) -> bool:
    return True


@pytest.mark.parametrize("wrong", [lambda: True, lambda status, scope, more: True, 200, None, _async_policy])
def test_an_object_that_is_no_policy_is_refused_when_it_is_given(wrong: Any) -> None:
    for make in (
        lambda: ASGIHTTPDBSessionMiddleware(FastAPI(), commit_policy=wrong),
        lambda: DBSessionMiddleware(FastAPI(), commit_policy=wrong),
        lambda: CtxDBPlugin(commit_policy=wrong),
    ):
        with pytest.raises(TypeError, match="commit policy"):
            make()


def test_policies_of_the_status_go_on_working() -> None:
    assert ASGIHTTPDBSessionMiddleware(FastAPI(), commit_policy=commit_2xx).commits(204, {})
