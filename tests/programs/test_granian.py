"""Granian: a server whose tasks may be none of asyncio's."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from tests.support.database import Database, eventually

from ctxdb_core.testing.postgres._ports import find_free_port

pytest.importorskip("granian")

PROGRAM = """
import os

from ctxdb_core import DBConnect, db_session
from ctxdb_starlette import DBSessionMiddleware
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from starlette.routing import Route

db = DBConnect.from_url(os.environ["PROGRAM_URL"])


async def insert(name):
    await (await db_session(db)).execute(text("INSERT INTO item VALUES (:name)"), {"name": name})


async def handler(request):
    await insert("request")
    return PlainTextResponse("stored", background=BackgroundTask(insert, "background"))


async def wait(request):
    await (await db_session(db)).execute(text("SELECT pg_sleep(300)"))


app = Starlette(routes=[Route("/", handler), Route("/waits", wait)])
app.add_middleware(DBSessionMiddleware)
"""


@asynccontextmanager
async def granian(
    tmp_path: Path, database: Database, tasks: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The program, served by granian: its process and its address."""
    (tmp_path / "program.py").write_text(PROGRAM)
    port = find_free_port(["127.0.0.1"])
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "granian", "--interface", "asgi"),
        *("--task-impl", tasks, "--port", str(port), "program:app"),
        cwd=tmp_path,
        env={**os.environ, "PROGRAM_URL": database.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert server.stdout is not None
    try:
        async with asyncio.timeout(30):
            address = None
            while address is None:
                line = (await server.stdout.readline()).decode()
                assert line, "the server has ended"
                address = re.search(r"http://127\.0\.0\.1:\d+", line)
        yield server, address[0]
    finally:
        if server.returncode is None:
            server.terminate()
        await server.communicate()


@pytest.mark.parametrize("tasks", ["asyncio", "rust"])
async def test_background_work_is_committed(tasks: str, tmp_path: Path, database: Database) -> None:
    async with granian(tmp_path, database, tasks) as (_, address):
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=20)) as client:
            assert (await client.get(address)).text == "stored"
        async with asyncio.timeout(20):
            while await database.names() != ["background", "request"]:
                await asyncio.sleep(0.02)


async def test_the_query_of_a_request_whose_client_has_left_is_stopped_at_the_shutdown(
    tmp_path: Path, database: Database
) -> None:
    async with granian(tmp_path, database, "asyncio") as (server, address):
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=20)) as client:
            request = asyncio.create_task(client.get(f"{address}/waits", timeout=60))
            await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
            server.terminate()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        async with asyncio.timeout(20):
            await server.wait()
        await eventually(lambda: not database.backends("state = 'active'"), "the query runs on")
