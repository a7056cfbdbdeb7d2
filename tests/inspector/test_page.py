"""The page, in a browser."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from tests.support.browser import PICTURES, Tab
from tests.support.database import Database
from tests.support.inspected import Desk, serve_app, starlette_app
from tests.support.server import http_client

import ctxdb_inspector._pages
from ctxdb_core import DBConnect, commit_db_session, db_session
from ctxdb_core.adapters import begin, finalize

ROOT = Path(__file__).parents[2]
MOST_BYTES = 150_000
TEXTS = "h1, h2, p, th, td, td *, li, li span, a, button, label, code"


@asynccontextmanager
async def some_traffic(tab: Tab, desk: Desk) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    """Serve the application after a request of each kind, while one is holding a connection."""
    async with serve_app(starlette_app(desk, None)) as url, http_client(url) as client:
        for path in ("read", "refuse", "fail_at_commit", "leak"):
            await client.get(f"/{path}")
        held = asyncio.create_task(client.get("/hold"))
        try:
            await desk.arrived.wait()
            yield url, client
        finally:
            desk.go_on.set()
            await held
            # A server waits for the stream of updates, which lasts for as long as the page is open.
            await tab.call("Page.navigate", url="about:blank")


HIDE_MACHINE = r"""
(() => {
  document.querySelector("#pause").click();
  document.querySelector("#pause").replaceChildren("Pause");
  document.querySelector("#worker").textContent = "worker web-1, process 7";
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    texts.currentNode.data = texts.currentNode.data
      .replace(/\S*\/tests\/support\/inspected/g, "shop/desk").replace(/127\.0\.0\.1:\d+/g, "shop.example");
  }
})()
"""
"""Stops the page's updates, and replaces the names and addresses of this machine in it."""


async def picture(tab: Tab, name: str, *size: int) -> None:
    if PICTURES:
        await tab.run(HIDE_MACHINE)
        (Path(PICTURES) / f"inspector-{name}.png").write_bytes(await tab.screenshot(*size))


async def open_page(tab: Tab, url: str, query: str = "") -> None:
    await tab.open(f"{url}/_ctxdb/{query}")
    await tab.until("document.querySelectorAll('.unit').length >= 5")


NAMES = "[...document.querySelectorAll('.unit .name')].map(each => each.innerText)"


async def test_the_page_shows_who_holds_what_and_what_went_wrong(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, _):
        await open_page(tab, url)
        held = await tab.run("[...document.querySelectorAll('#held tbody tr')].map(row => row.innerText)")
        assert len(held) == 2
        assert any("leak" in row and "Desk.leak" in row and "SELECT 2" in row for row in held)
        assert any("GET /hold" in row and "inspected.py:" in row and "idle" in row for row in held)
        trouble = await tab.run("document.querySelector('#trouble').innerText")
        assert "GET /fail_at_commit" in trouble
        assert "IntegrityError" in trouble
        assert "leak:" in trouble
        assert "2 in use" in await tab.run("document.querySelector('#pools').innerText")
        assert await tab.run("document.querySelectorAll('#pools .bar').length") > 0
        assert sorted(await tab.run(NAMES)) == [
            "GET /fail_at_commit", "GET /hold", "GET /leak", "GET /read", "GET /refuse",
        ]  # fmt: skip
        # Each lane is really drawn, and a failed commit is told from a roll-back and a commit.
        drawn = "[...document.querySelectorAll('.unit[data-unit] .lane .%s')].filter(e => e.getBBox().width > 0).length"
        assert await tab.run(drawn % "hold") >= 5
        assert [await tab.run(drawn % kind) for kind in ("fail", "undo", "run")] == [1, 1, 2]
        assert tab.complaints() == []
        assert all(each.startswith((url, "data:")) for each in tab.requests())


async def test_a_click_on_a_request_shows_it_and_makes_a_permalink(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, client):
        unit = (await client.get("/read")).headers["x-ctxdb-unit"]
        await open_page(tab, url)
        await tab.until(f"document.querySelector('[data-unit=\"{unit}\"]') !== null")
        await tab.run(f"document.querySelector('[data-unit=\"{unit}\"]').click()")
        detail = await tab.run("document.querySelector('#detail').innerText")
        assert unit in detail
        assert "SELECT name FROM item" in detail
        assert "Desk.read()" in detail
        assert await tab.run("location.search") == f"?unit={unit}"
        # Whoever is given the address sees the same.
        await open_page(tab, url, f"?unit={unit}")
        await tab.until(f"document.querySelector('#detail').innerText.includes('{unit}')")


async def test_filters_leave_what_matches(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, _):
        await open_page(tab, url)
        fill = """
        (() => {{ const field = document.querySelector("{0}"); field.value = "{1}";
          field.dispatchEvent(new Event("input", {{ bubbles: true }})); }})()
        """
        await tab.run(fill.format("#text", "fail_at"))
        assert await tab.run(NAMES) == ["GET /fail_at_commit"]
        await tab.run(fill.format("#text", ""))
        await tab.run(fill.format("#outcome", "rolled back"))
        assert await tab.run(NAMES) == ["GET /refuse"]
        await tab.run(fill.format("#outcome", ""))
        await tab.run(fill.format("#least", "3600000"))
        assert await tab.run(NAMES) == []
        assert (await tab.run("document.querySelector('#count').innerText")).startswith("0 of ")


async def test_the_page_begins_with_what_is_wrong_and_who_holds_a_connection_longest(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, client):
        await open_page(tab, url)
        verdict = "document.querySelector('#verdict').innerText"
        assert (await tab.run(verdict)).startswith("1 leak. Held longest: GET /leak, for ")
        await client.get("/leak_alone")
        waiting = asyncio.create_task(client.get("/read"))
        await tab.until(f"{verdict}.startsWith('1 waiting for 127.0.0.1, all 3 connections in use. 2 leaks.')")
        assert await tab.run("document.querySelector('#pools').innerText.includes('1 waiting')")
        await desk.stays.pop().close()
        await waiting
        await tab.until(f"!{verdict}.includes('waiting')")
        # What the answer names is a click away.
        await tab.run("document.querySelector('#verdict a').click()")
        assert "GET /leak" in await tab.run("document.querySelector('#detail').innerText")


async def test_pools_are_bars_of_what_is_in_use_idle_and_waited_for_beneath_their_limit(tab: Tab, desk: Desk) -> None:
    pool = """{name: "db", in_use: 2, idle: 1, waiting: 0, limit: 4,
      samples: [[now - 120, 2, 1, 0], [now - 60, 4, 0, 4], [now - 301, 1, 0, 0]]}"""
    async with some_traffic(tab, desk) as (url, _):
        await open_page(tab, url)
        await tab.run(f"(() => {{ source.close(); pools.clear(); pools.set('db', {pool}); showPools(); }})()")
        heights = "[...document.querySelectorAll('#pools .%s')].map(each => Math.round(each.getAttribute('height')))"
        # Eight of the picture's 62 units of height are one connection.
        assert await tab.run(heights % "bar") == [16, 31, 8]
        assert await tab.run(heights % "idle") == [8]
        assert await tab.run(heights % "wait") == [31]
        assert await tab.run("document.querySelector('#pools .limit').getAttribute('y1')") == "33"
        assert "2 in use, 1 idle, 0 waiting, limit 4" in await tab.run("document.querySelector('#pools').innerText")


async def test_lanes_are_to_scale_and_tell_the_streamed_part_and_sessions_beside_one_another_apart(
    tab: Tab, desk: Desk
) -> None:
    hold = """{pool: "db", where: "a.py:1", function: "f", statements: 1, statement: "SELECT 1", running_since: null,
      error: null,"""
    unit = f"""{{id: "x-1", request: "GET /made-up", started: 100, ended: 110, responded: 104, status: 200, error: null,
      outcome: "committed", forgotten: 0, forgotten_for: 0, holds: [
        {hold} taken: 101, returned: 104, commit_at: 103, outcome: "committed", leaked: false, streamed: false}},
        {hold} taken: 102, returned: 104, commit_at: null, outcome: null, leaked: false, streamed: false}},
        {hold} taken: 106, returned: 108, commit_at: 107, outcome: "rolled back", leaked: false, streamed: true}}]}}"""
    async with some_traffic(tab, desk) as (url, _):
        await open_page(tab, url)
        drawn = await tab.run(
            f"[...lane({unit}, null).children].map(each => [each.getAttribute('class'), +each.getAttribute('x'),"
            " +each.getAttribute('width'), +each.getAttribute('y')])"
        )
        assert drawn == [
            ["span", 0, 1000, 2],
            ["hold", 100, 300, 4], ["run", 300, 100, 4],
            ["hold", 200, 200, 9],
            ["body", 600, 200, 4], ["undo", 700, 100, 4],
        ]  # fmt: skip
        # To one scale, a unit that is half as long as the longest has half of the width.
        half = await tab.run(f"+lane({unit}, 20).children[0].getAttribute('width')")
        assert half == 500


async def test_what_a_streamed_body_does_is_drawn_in_a_colour_of_its_own(tab: Tab, desk: Desk) -> None:
    async def stream(request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"begun"
            await (await db_session(desk.db)).execute(text("SELECT 5"))
            yield b"done"

        await desk.read()
        return StreamingResponse(body())

    app = starlette_app(desk, None)
    app.routes.insert(0, Route("/stream", stream))
    async with serve_app(app) as url, http_client(url) as client:
        assert (await client.get("/stream")).text == "begundone"
        await tab.open(f"{url}/_ctxdb/")
        await tab.until("document.querySelectorAll('.unit').length === 1")
        kinds = "[...document.querySelectorAll('.unit .lane rect')].map(each => each.getAttribute('class'))"
        assert [kind for kind in await tab.run(kinds) if kind in ("hold", "body")] == ["hold", "body"]
        fills = "['hold', 'body'].map(kind => getComputedStyle(document.querySelector(`.unit .${kind}`)).fill)"
        assert len(set(await tab.run(fills))) == 2
        await tab.call("Page.navigate", url="about:blank")


async def test_the_data_can_be_downloaded(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, _):
        await open_page(tab, url)
        assert await tab.run("document.querySelector('#download').download") == "units.json"
        found = await tab.run("fetch(document.querySelector('#download').href).then(answer => answer.json())")
        assert {unit["request"] for unit in found["units"]} >= {"GET /hold", "GET /read"}
        await tab.run("document.querySelector('.unit').click()")
        assert await tab.run("document.querySelector('#detail a[download]').download.endsWith('.json')")


async def test_the_units_of_another_worker_replace_those_of_the_one_before(tab: Tab, desk: Desk) -> None:
    other = """{worker: {host: "web-2", pid: 9}, now, sequence: 1, pools: [], at_work: 0, units: [], others: [],
      warnings: []}"""
    async with some_traffic(tab, desk) as (url, _):
        await open_page(tab, url)
        await tab.run(f"(() => {{ source.close(); take({other}); }})()")
        assert await tab.run("document.querySelector('#worker').innerText") == "worker web-2, process 9"
        assert await tab.run("document.querySelectorAll('.unit').length") == 0


HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


async def test_nothing_that_an_application_does_becomes_markup(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, _):
        scope = {"type": "http", "method": "GET", "path": f"/{HOSTILE}"}
        with pytest.raises(LookupError):
            unit = begin(request=scope)
            assert unit is not None
            await (await db_session(desk.db)).execute(text(f"SELECT 1 -- {HOSTILE}"))
            error = LookupError(HOSTILE)
            await finalize(unit, commit=False, error=error)
            raise error
        logging.getLogger("ctxdb").warning("%s", HOSTILE)
        await open_page(tab, url)
        await tab.until(f"{NAMES}.some(name => name.includes('onerror'))")
        await tab.run("[...document.querySelectorAll('.unit')].find(e => e.innerText.includes('onerror')).click()")
        await tab.until("document.querySelector('#detail').innerText.includes('SELECT 1 -- </script>')")
        assert "onerror" in await tab.run("document.querySelector('#trouble').innerText")
        assert await tab.run("window.broken === undefined && document.querySelectorAll('img').length === 0")
        assert await tab.run("document.querySelectorAll('script').length") == 1
        assert tab.complaints() == []


async def test_a_page_whose_updates_are_refused_says_so_and_tries_again(
    tab: Tab, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctxdb_inspector._pages, "MOST_READERS", 0)
    async with serve_app(starlette_app(desk, None)) as url:
        await tab.open(f"{url}/_ctxdb/")
        await tab.until("document.querySelector('#state').innerText.startsWith('The updates are refused')")
        monkeypatch.undo()
        await tab.until("document.querySelector('#state').innerText === 'live'")
        await tab.call("Page.navigate", url="about:blank")


async def test_very_many_units_and_very_long_names_fit_a_phone(tab: Tab, desk: Desk) -> None:
    async def hold(number: int) -> None:
        scope = {"type": "http", "method": "GET", "path": f"/{'a-long-name' * 20}/{number}"}
        unit = begin(request=scope)
        assert unit is not None
        await (await db_session(desk.db)).execute(text(f"SELECT {number}, '{'very-long' * 100}'"))
        await commit_db_session(desk.db)
        await go_on.wait()
        await finalize(unit, commit=True)

    go_on = asyncio.Event()
    async with some_traffic(tab, desk) as (url, _):
        tasks = [asyncio.create_task(hold(number)) for number in range(200)]
        await tab.call("Emulation.setDeviceMetricsOverride", width=375, height=700, deviceScaleFactor=1, mobile=True)
        await tab.open(f"{url}/_ctxdb/")
        await tab.until("document.querySelectorAll('.unit').length >= 200")
        assert await tab.run("document.documentElement.scrollWidth") <= 375
        # What is held is beside what holds it, and nothing is cut off.
        widths = "[...document.querySelectorAll('#held td')].map(each => each.getBoundingClientRect().right)"
        assert max(await tab.run(widths)) <= 375
        go_on.set()
        await asyncio.gather(*tasks)


async def test_without_any_unit_the_page_says_so(tab: Tab, database: Database) -> None:
    async with DBConnect.from_url(database.url) as db, serve_app(starlette_app(Desk(db), None)) as url:
        await tab.open(f"{url}/_ctxdb/")
        await tab.until("document.querySelector('#state').innerText === 'live'")
        assert "No database has been used yet." in await tab.run("document.querySelector('#pools').innerText")
        assert await tab.run("document.querySelector('#held-none').checkVisibility()")
        assert await tab.run("document.querySelector('#count').innerText") == "0 of 0"
        await tab.call("Page.navigate", url="about:blank")


async def test_the_page_follows_the_application(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, client):
        await open_page(tab, url)
        desk.go_on.set()
        await client.get("/read")
        await tab.until(f"{NAMES}.filter(name => name === 'GET /read').length === 2")
        await tab.until("document.querySelectorAll('#held tbody tr').length === 1")
        assert await tab.run("document.querySelector('#state').innerText") == "live"


async def test_the_page_is_readable_in_light_and_in_dark(tab: Tab, desk: Desk) -> None:
    grounds = []
    async with some_traffic(tab, desk) as (url, _):
        for scheme in ("light", "dark"):
            await tab.prefer_colors(scheme)
            await open_page(tab, url)
            grounds.append(await tab.run("getComputedStyle(document.body).backgroundColor"))
            # What WCAG asks of text, level AA.
            assert await tab.least_contrast(TEXTS) >= 4.5, scheme
            await picture(tab, scheme)
    assert grounds[0] != grounds[1]


async def test_the_page_fits_a_phone(tab: Tab, desk: Desk) -> None:
    async with some_traffic(tab, desk) as (url, _):
        await tab.call("Emulation.setDeviceMetricsOverride", width=375, height=700, deviceScaleFactor=1, mobile=True)
        await open_page(tab, url)
        await tab.run("document.querySelector('.unit').click()")
        assert await tab.run("document.documentElement.scrollWidth") <= 375
        await picture(tab, "phone", 375, 1100)


async def test_the_keyboard_alone_opens_a_request_and_comes_back(tab: Tab, desk: Desk) -> None:
    async def press(key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        await tab.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        await tab.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    async with some_traffic(tab, desk) as (url, _):
        await open_page(tab, url)
        for _ in range(60):
            await press("Tab", 9)
            if await tab.run("document.activeElement.classList.contains('unit')"):
                break
        unit = await tab.run("document.activeElement.dataset.unit")
        assert unit, "the first request was not reached"
        assert await tab.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
        await press("Enter", 13)
        assert await tab.run("document.activeElement.id") == "detail"
        assert await tab.run("document.querySelector('#detail').checkVisibility()")
        await press("Escape", 27)
        assert not await tab.run("document.querySelector('#detail').checkVisibility()")
        assert await tab.run("document.activeElement.dataset.unit") == unit


def test_the_documentation_shows_pictures_that_are_there_and_small() -> None:
    page = (ROOT / "docs" / "inspector.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"assets/inspector-(\w+)\.png", page))
    assert shown == {"light", "dark", "phone"}
    for name in shown:
        content = (ROOT / "docs" / "assets" / f"inspector-{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < MOST_BYTES
