"""What the inspector keeps and serves under a flood, and what it never shows."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from tests.support.database import Database
from tests.support.inspected import Desk, starlette_app
from tests.support.server import http_client, serve

import ctxdb_inspector._asgi
from ctxdb_core import DBConnect, db_session, new_db_ctx, new_non_ctx_session, run_in_new_ctx
from ctxdb_core.adapters import begin, finalize
from ctxdb_inspector import inspector
from ctxdb_inspector._pages import MOST_READERS

MANY = 700


async def shown(app: Any) -> dict[str, Any]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        found: dict[str, Any] = (await client.get("/units.json")).json()
    return found


async def select_one(db: DBConnect) -> None:
    await (await db_session(db)).execute(text("SELECT 1"))


@pytest.fixture
def db(desk: Desk) -> DBConnect:
    return desk.db


async def test_the_last_500_units_are_kept(db: DBConnect) -> None:
    app = inspector(db)
    for _ in range(MANY):
        await run_in_new_ctx(select_one, db)
    assert len((await shown(app))["units"]) == 500


async def test_a_leak_that_garbage_collection_finds_while_a_page_is_put_together_is_shown(db: DBConnect) -> None:
    app: Any = inspector(db)
    with app._recorder._lock:
        logging.getLogger("ctxdb").warning("a leak")
    assert [warning["text"] for warning in (await shown(app))["warnings"]] == ["a leak"]


async def test_of_a_unit_with_very_many_connections_the_last_ones_and_the_sum_of_the_others_are_kept(
    db: DBConnect,
) -> None:
    app = inspector(db)
    async with new_db_ctx():
        session = await db_session(db)
        for _ in range(100):
            await session.execute(text("SELECT 1"))
            await session.commit()
        (unit,) = (await shown(app))["units"]
        assert 20 <= len(unit["holds"]) <= 40
        assert unit["forgotten"] + len(unit["holds"]) == 100
        assert unit["forgotten_for"] > 0


async def test_a_forgotten_roll_back_still_decides_the_outcome_of_its_unit(db: DBConnect) -> None:
    app = inspector(db)
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        await session.rollback()
        for _ in range(60):
            await session.execute(text("SELECT 1"))
            await session.commit()
    (unit,) = (await shown(app))["units"]
    assert {hold["outcome"] for hold in unit["holds"]} == {"committed"}
    assert unit["outcome"] == "rolled back"


async def test_long_statements_and_paths_are_cut(desk: Desk) -> None:
    app = inspector(desk.db)
    scope = {"type": "http", "method": "GET", "path": "/" + "x" * 100_000}
    unit = begin(request=scope)
    assert unit is not None
    await (await db_session(desk.db)).execute(text(f"SELECT 1 -- {'y' * 100_000}"))
    await finalize(unit, commit=True)
    (unit_shown,) = (await shown(app))["units"]
    assert len(unit_shown["request"]) == 300
    assert len(unit_shown["holds"][0]["statement"]) == 2000


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::sqlalchemy.exc.SAWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_unit_that_is_thrown_away_is_shown_as_never_ended_and_is_not_at_work(db: DBConnect) -> None:
    app = inspector(db)

    async def throw_away() -> None:
        begin()
        await select_one(db)

    # The task's context goes with the task.
    await asyncio.create_task(throw_away())
    outcomes: list[str] = []
    while "never ended" not in outcomes:
        # The event loop still has callbacks with the context of the task.
        await asyncio.sleep(0)
        gc.collect()
        found = await shown(app)
        outcomes = [unit["outcome"] for unit in found["units"]]
    assert found["at_work"] == 0


async def test_most_units_at_work_are_not_shown_if_they_are_very_many_and_hold_nothing(db: DBConnect) -> None:
    app = inspector(db)
    go_on = asyncio.Event()

    async def use_and_wait() -> None:
        await select_one(db)
        await (await db_session(db)).commit()
        await go_on.wait()

    async def hold() -> None:
        await select_one(db)
        await go_on.wait()

    tasks = [asyncio.create_task(run_in_new_ctx(hold))]
    tasks += [asyncio.create_task(run_in_new_ctx(use_and_wait)) for _ in range(400)]
    while (found := await shown(app))["at_work"] < 401 or found["pools"][0]["in_use"] > 1:
        # One that could not have a connection in time has ended, and the others would be waited for in vain.
        assert not any(task.done() for task in tasks)
        # Showing them takes as long as many of them take to get there.
        await asyncio.sleep(0.1)
    assert len(found["units"]) == 300
    assert [hold for unit in found["units"] for hold in unit["holds"] if hold["returned"] is None]
    go_on.set()
    await asyncio.gather(*tasks)
    assert (await shown(app))["at_work"] == 0


async def test_a_detached_connection_is_not_held(db: DBConnect) -> None:
    app = inspector(db)
    async with new_non_ctx_session(db) as session:
        connection = await session.connection()
        raw = await connection.get_raw_connection()
        raw.detach()
        assert (await shown(app))["pools"][0]["in_use"] == 0


async def test_a_connection_that_is_invalidated_is_not_held(db: DBConnect) -> None:
    app = inspector(db)
    async with new_non_ctx_session(db) as session:
        await session.execute(text("SELECT 1"))
        await session.invalidate()
    assert (await shown(app))["pools"][0]["in_use"] == 0
    assert (await shown(app))["others"] == []


async def test_units_that_share_the_connection_of_a_database_in_memory_are_all_shown() -> None:
    async with DBConnect.from_url("sqlite+aiosqlite://") as db:
        app = inspector(db)
        async with new_db_ctx():
            await select_one(db)
            await run_in_new_ctx(select_one, db)
        found = await shown(app)
    assert len(found["units"]) == 2
    assert found["pools"][0]["in_use"] == 0


async def test_an_error_shows_no_value_of_a_statement(db: DBConnect) -> None:
    app = inspector(db)
    for statement, parameters in (
        ("SELECT CAST(:value AS integer)", {"value": "a secret"}),
        ("SELECT CAST(CAST(:value AS text) AS integer)", {"value": "a secret"}),
        ("INSERT INTO item (name) VALUES (:value), (:value)", {"value": "a secret"}),
    ):
        with pytest.raises(DBAPIError):
            async with new_db_ctx():
                await (await db_session(db)).execute(text(statement), parameters)
    found = await shown(app)
    assert len([unit for unit in found["units"] if unit["error"]]) == 3
    assert "secret" not in json.dumps(found)
    assert "violates unique constraint" in json.dumps(found)


async def test_the_values_in_the_details_of_a_violated_constraint_are_not_shown(database: Database) -> None:
    async with DBConnect.from_url(database.url.replace("asyncpg", "psycopg")) as db:
        app = inspector(db)
        with pytest.raises(IntegrityError, match="a secret"):
            async with new_db_ctx():
                session = await db_session(db)
                await session.execute(text("INSERT INTO child (parent) VALUES (:value)"), {"value": "a secret"})
        found = await shown(app)
    assert found["units"][0]["outcome"] == "commit failed"
    assert "violates foreign key constraint" in found["units"][0]["error"]
    assert "secret" not in json.dumps(found)


async def open_stream(url: str) -> tuple[int, asyncio.StreamWriter]:
    """Ask for the updates on a connection of its own; return the status, and what closes it."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    writer.write(b"GET /_ctxdb/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return int((await reader.readuntil(b"\r\n")).split()[1]), writer


async def test_more_streams_than_a_few_are_refused(desk: Desk) -> None:
    async with serve(starlette_app(desk, None)) as url, http_client(url) as client:
        streams = [await open_stream(url) for _ in range(MOST_READERS)]
        assert {status for status, _ in streams} == {200}
        assert (await client.get("/_ctxdb/events")).status_code == 503
        assert (await client.get("/_ctxdb/")).status_code == 200
        # One that leaves makes room.
        streams.pop()[1].close()
        while (last := await open_stream(url))[0] == 503:
            last[1].close()
        assert last[0] == 200
        for _, writer in (*streams, last):
            writer.close()


async def test_a_server_ends_while_a_stream_of_updates_is_open(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is ten seconds otherwise.
    monkeypatch.setattr(ctxdb_inspector._asgi, "STREAM_SECONDS", 0.1)
    async with asyncio.timeout(20):
        async with serve(starlette_app(desk, None)) as url:
            status, writer = await open_stream(url)
            assert status == 200
        writer.close()


async def test_a_client_that_reads_slowly_makes_nothing_pile_up(db: DBConnect) -> None:
    app: Any = inspector(db)
    sent: list[Any] = []
    go_on = asyncio.Event()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await go_on.wait()

    scope = {
        "type": "http", "method": "GET", "path": "/events", "query_string": b"", "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"localhost")],
    }  # fmt: skip
    stream = asyncio.create_task(app(scope, receive, send))
    while len(sent) < 2:
        await asyncio.sleep(0)
    for _ in range(20):
        await run_in_new_ctx(select_one, db)
    assert len(sent) == 2
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream
    assert app._recorder.readers == 0
