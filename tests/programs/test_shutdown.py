"""Servers that shut down while a request waits for the database: its query is stopped before the process ends."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from tests.support.database import Database, eventually

from ctxdb_core.testing.postgres._ports import find_free_port

PROGRAM = """
import os

from ctxdb_core import DBConnect, db_session
from ctxdb_starlette import DBSessionMiddleware
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

db = DBConnect.from_url(os.environ["PROGRAM_URL"])


async def handler(request):
    await (await db_session(db)).execute(text("SELECT pg_sleep(300)"))
    return PlainTextResponse("never")


async def in_a_task_group(request, call_next):
    return await call_next(request)


app = Starlette(routes=[Route("/", handler)])
app.add_middleware(BaseHTTPMiddleware, dispatch=in_a_task_group)
app.add_middleware(DBSessionMiddleware)
"""

# Gunicorn's worker waits for its requests until gunicorn kills it, unless it is told to cancel them before.
WORKER = """
from uvicorn_worker import UvicornWorker


class Worker(UvicornWorker):
    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, "timeout_graceful_shutdown": 1}
"""


def _uvicorn(port: int) -> list[str]:
    return ["uvicorn", "program:app", f"--port={port}", "--timeout-graceful-shutdown=1"]


def _gunicorn(port: int) -> list[str]:
    pytest.importorskip("uvicorn_worker")
    return ["gunicorn", "program:app", "--worker-class=worker.Worker", f"--bind=127.0.0.1:{port}"]


def _daphne(port: int) -> list[str]:
    pytest.importorskip("daphne")
    return ["daphne", f"--port={port}", "program:app"]


@pytest.mark.parametrize(
    ("command", "database_kind"),
    [(_uvicorn, "asyncpg"), (_uvicorn, "psycopg"), (_gunicorn, "asyncpg"), (_daphne, "psycopg")],
    indirect=["database_kind"],
)
async def test_the_query_of_a_request_that_the_server_cancels_is_stopped(
    command: object, tmp_path: Path, database: Database
) -> None:
    assert callable(command)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "worker.py").write_text(WORKER)
    port = find_free_port(["127.0.0.1"])
    module, *arguments = command(port)
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        cwd=tmp_path,
        env={**os.environ, "PROGRAM_URL": database.url},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(30):
            while True:
                assert server.returncode is None, "the server has ended"
                try:
                    _, client = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    break
        client.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
        server.terminate()
        async with asyncio.timeout(20):
            await server.wait()
        await eventually(lambda: not database.backends("state = 'active'"), "the query runs on")
        client.close()
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
