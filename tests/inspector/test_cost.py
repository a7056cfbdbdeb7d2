"""What the inspector costs a request, and that it costs nothing where it is not mounted."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from math import inf
from types import FrameType
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tests.support.database import Database

from ctxdb_core import DBConnect, db_session
from ctxdb_core._units.ids import unit_id_givers
from ctxdb_core.adapters import listeners_of, running_unit
from ctxdb_inspector import inspector
from ctxdb_starlette import DBSessionMiddleware

REQUESTS = 10

MOST = 0.06
"""The largest share of bytecode instructions that the inspector may add.

A request with one SELECT executes 11 000 of them. Those of the inspector are a little cheaper than the mean: 5.8 % more
of them are about 5 % more instructions of the processor.
"""


def application(db: DBConnect) -> Starlette:
    async def read(request: Request) -> PlainTextResponse:
        await (await db_session(db)).execute(text("SELECT 1"))
        return PlainTextResponse("read")

    app = Starlette(routes=[Route("/", read)])
    app.add_middleware(DBSessionMiddleware)
    return app


async def ask(app: Any) -> None:
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "GET",
        "path": "/", "raw_path": b"/", "root_path": "", "query_string": b"", "headers": [(b"host", b"localhost")],
        "server": ("localhost", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        pass

    await app(scope, receive, send)


async def instructions_of(app: Any) -> int:
    """Return how many instructions of bytecode some requests execute."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    async def requests() -> None:
        for _ in range(REQUESTS):
            await ask(app)

    await requests()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        # The frames of a new task are traced from their beginning.
        await asyncio.create_task(requests())
    finally:
        sys.settrace(before)
    return count


@pytest.fixture
def no_given_ids() -> Iterator[None]:
    """Provide a process in which nobody gives ids to units of work: those of `UnitHeader` cost a little more."""
    givers = unit_id_givers.copy()
    unit_id_givers.clear()
    yield
    unit_id_givers.extend(givers)


@pytest.mark.usefixtures("no_given_ids")
async def test_the_inspector_adds_little_to_a_request(database: Database) -> None:
    async with DBConnect.from_url(database.url) as plain, DBConnect.from_url(database.url) as inspected:
        app = inspector(inspected)
        await ask(application(inspected))
        for pool in app._recorder._pools.values():
            # Samples are taken once a second: on a slow machine, a few requests would pay for several of them.
            pool.next_sample = inf
        without = await instructions_of(application(plain))
        added = await instructions_of(application(inspected)) - without
    assert added < MOST * without


async def test_without_an_inspector_nothing_follows_a_request(database: Database) -> None:
    watchers: list[Any] = []

    async def look(request: Request) -> PlainTextResponse:
        await (await db_session(db)).execute(text("SELECT 1"))
        unit = running_unit()
        assert unit is not None
        watchers.append(dict(unit.watchers))
        return PlainTextResponse("looked")

    def is_the_inspectors(call: Any) -> bool:
        return getattr(call, "__module__", "").startswith("ctxdb_inspector")

    async with DBConnect.from_url(database.url) as db:
        app = Starlette(routes=[Route("/", look)])
        app.add_middleware(DBSessionMiddleware)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.get("/")
        assert "x-ctxdb-unit" not in response.headers
        assert watchers == [{}]
        engine = (await db.engine()).sync_engine
        listening = [each for name in ("checkout", "invalidate", "detach") for each in listeners_of(engine.pool, name)]
        assert not any(map(is_the_inspectors, (*listening, *vars(engine.dialect).values())))


@pytest.mark.parametrize("count", [1, 2])
async def test_several_inspectors_of_one_database_each_tell_everything(database: Database, count: int) -> None:
    async with DBConnect.from_url(database.url) as db:
        inspectors = [inspector(db) for _ in range(count)]
        await ask(application(db))
        for each in inspectors:
            transport = httpx.ASGITransport(each)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                (unit,) = (await client.get("/units.json")).json()["units"]
            assert [hold["statement"] for hold in unit["holds"]] == ["SELECT 1"]
