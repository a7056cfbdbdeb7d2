"""The limits that `setup` puts on the statements of a request."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, insert
from tests.support.wire import ask

from ctxdb_aiohttp import setup
from ctxdb_core import ArgumentTypeError, ArgumentValueError, DBConnect, DeadlineExceededError, db_session


def in_seconds(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_each_statement_of_a_request_may_take_so_long(db: DBConnect, database: Database, serve: Serve) -> None:
    errors: list[DBAPIError] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        session = await insert(db, "one")
        try:
            await session.execute(text("SELECT pg_sleep(60)"))
        except DBAPIError as exc:
            errors.append(exc)
            raise web.HTTPServiceUnavailable from exc
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    setup(app, db, statement_timeout=0.2)
    assert (await ask(await serve(app))).status == 503
    assert "statement timeout" in str(errors[0])
    assert await database.names() == []


async def test_a_request_has_the_deadline_that_it_says(db: DBConnect, database: Database, serve: Serve) -> None:
    def deadline(request: web.Request) -> float | None:
        return in_seconds(-1) if request.path == "/late" else None

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            await insert(db, request.path)
        except DeadlineExceededError:
            return web.Response(status=504)
        return web.Response()

    app = web.Application()
    app.router.add_get("/{path}", handler)
    setup(app, db, deadline=deadline)
    base_url = await serve(app)
    assert (await ask(base_url, "/late")).status == 504
    assert (await ask(base_url, "/soon")).status == 200
    assert await database.names() == ["/soon"]


async def test_a_timeout_and_a_deadline_hold_together(db: DBConnect, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text=str(await (await db_session(db)).scalar(text("SHOW statement_timeout"))))

    app = web.Application()
    app.router.add_get("/{seconds}", handler)
    setup(app, db, statement_timeout=30, deadline=lambda request: in_seconds(int(request.match_info["seconds"])))
    base_url = await serve(app)
    assert (await ask(base_url, "/60")).text == "30s"
    assert (await ask(base_url, "/20")).text == "19s"


@pytest.mark.parametrize("seconds", [0, -1, float("inf")])
def test_a_nonsensical_limit_is_refused_at_once(seconds: float) -> None:
    with pytest.raises(ArgumentValueError, match="statement_timeout"):
        setup(web.Application(), statement_timeout=seconds)


def test_a_limit_that_is_no_number_is_refused_at_once() -> None:
    with pytest.raises(ArgumentTypeError, match="a str is given as `statement_timeout`"):
        setup(web.Application(), statement_timeout="5")  # type: ignore[arg-type]  # the mistake
