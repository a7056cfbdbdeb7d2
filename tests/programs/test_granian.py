"""Granian: a server whose tasks may be none of asyncio's."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import httpx
import pytest
from tests.support.database import Database

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


app = Starlette(routes=[Route("/", handler)])
app.add_middleware(DBSessionMiddleware)
"""


@pytest.mark.parametrize("tasks", ["asyncio", "rust"])
async def test_background_work_is_committed(tasks: str, tmp_path: Path, database: Database) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    port = find_free_port(["127.0.0.1"])
    server = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "granian",
            "--interface",
            "asgi",
            "--task-impl",
            tasks,
            "--port",
            str(port),
            "program:app",
        ),
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
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=20)) as client:
            assert (await client.get(address[0])).text == "stored"
        async with asyncio.timeout(20):
            while await database.names() != ["background", "request"]:
                await asyncio.sleep(0.02)
    finally:
        server.terminate()
        await server.communicate()
