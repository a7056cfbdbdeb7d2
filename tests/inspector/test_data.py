"""What `units.json` and the stream of updates tell, on each framework."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.routing import Mount
from tests.support.database import Database
from tests.support.inspected import Desk, starlette_app
from tests.support.server import http_client, serve

from ctxdb_core import DBConnect, db_session, new_db_ctx
from ctxdb_core.logs import log_units
from ctxdb_inspector import inspector


async def data(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.get("/_ctxdb/units.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def one_unit(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    (unit,) = [unit for unit in (await data(client))["units"] if unit["request"] == f"GET {path}"]
    found: dict[str, Any] = unit
    return found


async def test_a_request_is_shown_with_its_connection_and_the_line_that_took_it(client: httpx.AsyncClient) -> None:
    assert (await client.get("/read?token=hidden")).status_code == 200
    unit = await one_unit(client, "/read")
    assert unit["outcome"] == "committed"
    assert unit["status"] == 200
    assert unit["error"] is None
    assert unit["started"] <= unit["ended"]
    (hold,) = unit["holds"]
    assert "tests/support/inspected.py:" in hold["where"]
    assert hold["function"] == "Desk.read"
    assert hold["statement"].startswith("SELECT name FROM item")
    assert unit["started"] <= hold["taken"] <= hold["commit_at"] <= hold["returned"]
    assert not hold["leaked"]


async def test_neither_parameters_nor_queries_are_shown(client: httpx.AsyncClient) -> None:
    await client.get("/read?token=hidden")
    await client.get("/fail_at_commit")
    text = json.dumps(await data(client))
    assert "secret" not in text
    assert "hidden" not in text
    assert "nobody" not in text.replace("VALUES ('nobody')", "")


async def test_the_id_of_the_unit_is_in_the_response_and_leads_to_it(client: httpx.AsyncClient) -> None:
    unit_id = (await client.get("/read")).headers["x-ctxdb-unit"]
    unit = (await client.get("/_ctxdb/units.json", params={"unit": unit_id})).json()
    assert unit["id"] == unit_id
    assert unit["request"] == "GET /read"
    assert (await client.get("/_ctxdb/units.json?unit=unheard-of")).status_code == 404


async def test_the_id_in_the_response_is_that_of_the_log_records(
    client: httpx.AsyncClient, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    stop = log_units(desk.db)
    with caplog.at_level(logging.INFO, "ctxdb.units"):
        unit_id = (await client.get("/read")).headers["x-ctxdb-unit"]
    stop()
    (record,) = [each for each in caplog.records if each.name == "ctxdb.units"]
    assert vars(record)["ctxdb_unit"] == unit_id
    assert vars(record)["ctxdb_request"] == "GET /read"


async def test_a_request_that_uses_no_database_has_an_id_and_is_not_shown(client: httpx.AsyncClient) -> None:
    response = await client.get("/idle")
    assert response.headers["x-ctxdb-unit"]
    assert (await data(client))["units"] == []


async def test_the_answer_that_the_framework_itself_gives_to_an_error_has_the_id(client: httpx.AsyncClient) -> None:
    response = await client.get("/fail")
    assert response.status_code == 500
    unit = await one_unit(client, "/fail")
    assert (unit["id"], unit["outcome"]) == (response.headers["x-ctxdb-unit"], "rolled back")
    assert response.headers.get_list("x-ctxdb-unit") == [unit["id"]]
    idle = await client.get("/fail_idle")
    assert idle.status_code == 500
    assert idle.headers["x-ctxdb-unit"] not in ("", unit["id"])


async def test_without_anything_around_the_application_responses_of_units_with_a_connection_have_the_id(
    desk: Desk,
) -> None:
    async with serve(starlette_app(desk, None)) as url, http_client(url) as client:
        assert "x-ctxdb-unit" in (await client.get("/read")).headers
        for path in ("/idle", "/_ctxdb/"):
            assert "x-ctxdb-unit" not in (await client.get(path)).headers


async def test_a_block_of_overridden_is_followed(desk: Desk, database: Database) -> None:
    db = DBConnect.from_url("postgresql+asyncpg://nowhere.invalid/app")
    elsewhere = Desk(db)
    async with (
        serve(starlette_app(elsewhere, None)) as url,
        http_client(url) as client,
        db.overridden(database.url),
    ):
        assert (await client.get("/read")).status_code == 200
        assert (await one_unit(client, "/read"))["outcome"] == "committed"


async def test_a_refusal_is_shown_as_rolled_back(client: httpx.AsyncClient) -> None:
    assert (await client.get("/refuse")).status_code == 409
    unit = await one_unit(client, "/refuse")
    assert (unit["outcome"], unit["status"]) == ("rolled back", 409)


async def test_a_failing_commit_is_shown_with_its_request_and_error(client: httpx.AsyncClient) -> None:
    assert (await client.get("/fail_at_commit")).status_code == 500
    unit = await one_unit(client, "/fail_at_commit")
    assert unit["outcome"] == "commit failed"
    assert "IntegrityError" in unit["error"]
    assert "child" in unit["error"]


async def test_a_connection_is_shown_while_it_is_held(client: httpx.AsyncClient, desk: Desk) -> None:
    request = asyncio.create_task(client.get("/hold"))
    await desk.arrived.wait()
    unit = await one_unit(client, "/hold")
    assert unit["outcome"] == "at work"
    assert unit["ended"] is None
    assert unit["holds"][0]["returned"] is None
    assert unit["holds"][0]["running_since"] is None, "the statement has ended, the transaction has not"
    (pool,) = (await data(client))["pools"]
    assert (pool["in_use"], pool["limit"]) == (1, 3)
    desk.go_on.set()
    await request
    assert (await one_unit(client, "/hold"))["outcome"] == "committed"
    (pool,) = (await data(client))["pools"]
    assert pool["in_use"] == 0
    assert pool["samples"]


async def test_a_connection_that_outlives_its_request_is_shown_as_a_leak(client: httpx.AsyncClient, desk: Desk) -> None:
    await client.get("/leak")
    found = await data(client)
    (left,) = found["others"]
    assert left["leaked"]
    assert left["function"] == "Desk.leak"
    assert left["statement"] == "SELECT 2"


async def test_a_request_that_only_leaks_a_session_of_its_own_has_ended(client: httpx.AsyncClient) -> None:
    assert (await client.get("/leak_alone")).status_code == 200
    unit = await one_unit(client, "/leak_alone")
    assert unit["outcome"] == "ended"
    (hold,) = unit["holds"]
    assert hold["leaked"]
    assert hold["statement"] == "SELECT 3"


async def test_a_function_given_to_run_sync_is_the_code_that_took_the_connection(client: httpx.AsyncClient) -> None:
    await client.get("/run_sync")
    (hold,) = (await one_unit(client, "/run_sync"))["holds"]
    assert hold["function"].endswith("read_in_it")


async def test_tasks_that_wait_for_an_exhausted_pool_are_sampled_while_nobody_looks(
    client: httpx.AsyncClient, desk: Desk
) -> None:
    for _ in range(3):
        await client.get("/leak_alone")
    waiting = asyncio.create_task(client.get("/read"))
    while desk.db.status().pools[0].waiting == 0:
        await asyncio.sleep(0.001)
    pool: Any = None
    async with asyncio.timeout(20):
        while pool is None or not any(waiting for _, _, _, waiting in pool["samples"]):
            await asyncio.sleep(0.05)
            (pool,) = (await data(client))["pools"]
    assert (pool["in_use"], pool["waiting"], pool["limit"]) == (3, 1, 3)
    await desk.stays.pop().close()
    assert (await waiting).status_code == 200


async def test_a_warning_of_ctxdb_is_shown(client: httpx.AsyncClient) -> None:
    logging.getLogger("ctxdb").warning("something %s", "odd")
    (warning,) = (await data(client))["warnings"]
    assert (warning["level"], warning["text"]) == ("warning", "something odd")


async def test_the_worker_says_which_it_is(client: httpx.AsyncClient) -> None:
    assert (await data(client))["worker"]["pid"] == os.getpid()


async def events(response: httpx.Response) -> Any:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_the_stream_tells_everything_first_and_then_what_is_new(client: httpx.AsyncClient) -> None:
    await client.get("/read")
    async with client.stream("GET", "/_ctxdb/events") as response:
        assert response.headers["content-type"] == "text/event-stream"
        stream = events(response)
        first = await anext(stream)
        assert [unit["request"] for unit in first["units"]] == ["GET /read"]
        await client.get("/refuse")
        async for update in stream:
            if update["units"]:
                assert [unit["request"] for unit in update["units"]] == ["GET /refuse"]
                break
    headers = {"last-event-id": str(first["sequence"])}
    async with client.stream("GET", "/_ctxdb/events", headers=headers) as response:
        update = await anext(events(response))
        assert [unit["request"] for unit in update["units"]] == ["GET /refuse"]


async def test_the_page_has_a_strict_policy_and_names_no_other_address(client: httpx.AsyncClient) -> None:
    response = await client.get("/_ctxdb/")
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self';")
    assert "unsafe" not in policy
    assert "https://" not in response.text
    assert "http://" not in response.text.replace("http://www.w3.org/2000/svg", "")


async def test_other_paths_and_methods_are_refused(client: httpx.AsyncClient) -> None:
    assert (await client.get("/_ctxdb/nothing")).status_code == 404
    assert (await client.post("/_ctxdb/units.json")).status_code == 405


@pytest.mark.parametrize("path", ["", "units.json", "events"])
async def test_clients_behind_a_proxy_or_of_other_sites_are_refused(client: httpx.AsyncClient, path: str) -> None:
    for name, value in (
        ("forwarded", "for=192.0.2.1"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-host", "example.org"),
        ("x-real-ip", "192.0.2.1"),
        ("host", "rebound.example"),
        ("sec-fetch-site", "cross-site"),
    ):
        assert (await client.get(f"/_ctxdb/{path}", headers={name: value})).status_code == 403, name


async def test_the_connections_of_an_engine_for_several_event_loops_are_counted_once(database: Database) -> None:
    async def use() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))

    engine = create_async_engine(database.url)
    db = DBConnect.from_engine(engine)
    transport = httpx.ASGITransport(Starlette(routes=[Mount("/_ctxdb", inspector(db))]))
    await use()
    await asyncio.to_thread(asyncio.run, use())
    await use()
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        shown = await data(client)
    assert [pool["in_use"] for pool in shown["pools"]] == [0]
    assert [[hold["statements"] for hold in unit["holds"]] for unit in shown["units"]] == [[1], [1], [1]]
    await engine.dispose()
