"""The limits that `CtxDBPlugin` puts on the statements of a request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from litestar import Request, get
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from tests.support.database import Database, insert
from tests.support.litestar_app import Ask, answering, litestar_app

from ctxdb_core import CtxDBError, DBConnect, DeadlineExceededError, db_session
from ctxdb_core.asgi import Scope
from ctxdb_litestar import CtxDBPlugin


def in_seconds(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_each_statement_of_a_request_may_take_so_long(db: DBConnect, database: Database, ask: Ask) -> None:
    @get("/")
    async def write() -> None:
        session = await insert(db, "one")
        await session.execute(text("SELECT pg_sleep(60)"))

    plugin = CtxDBPlugin(db, statement_timeout=0.2)
    app = litestar_app(write, plugins=[plugin], exception_handlers={DBAPIError: answering(503)})
    assert (await (await ask(app)).get("/")).status_code == 503
    assert await database.names() == []


async def test_a_request_has_the_deadline_that_its_scope_says(db: DBConnect, database: Database, ask: Ask) -> None:
    def deadline(scope: Scope) -> float | None:
        return in_seconds(-1) if scope["path"] == "/late" else None

    @get("/{name:str}")
    async def write(request: Request[Any, Any, Any]) -> None:
        await insert(db, request.path_params["name"])

    plugin = CtxDBPlugin(db, deadline=deadline)
    client = await ask(
        litestar_app(write, plugins=[plugin], exception_handlers={DeadlineExceededError: answering(504)})
    )
    assert (await client.get("/late")).status_code == 504
    assert (await client.get("/soon")).status_code == 200
    assert await database.names() == ["soon"]


async def test_a_timeout_and_a_deadline_hold_together(db: DBConnect, ask: Ask) -> None:
    @get("/{seconds:int}", media_type="text/plain")
    async def show() -> str:
        return str(await (await db_session(db)).scalar(text("SHOW statement_timeout")))

    def deadline(scope: Scope) -> float:
        return in_seconds(int(scope["path"].strip("/")))

    client = await ask(litestar_app(show, plugins=[CtxDBPlugin(db, statement_timeout=30, deadline=deadline)]))
    assert (await client.get("/60")).text == "30s"
    assert (await client.get("/20")).text == "19s"


@pytest.mark.parametrize("options", [{"statement_timeout": 0}, {"statement_timeout": "5"}, {"deadline": 5.0}])
def test_a_nonsensical_limit_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(CtxDBError, match=next(iter(options))):
        CtxDBPlugin(**options)
