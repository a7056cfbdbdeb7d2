"""What does the inspector add to a request with one statement, while nobody looks at it?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ClassVar

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from benchmarks.asgi import PATH, Caller
from benchmarks.client_connection import BODY, ClientConnection
from benchmarks.contenders import Route
from benchmarks.contenders.ctxdb import CtxDB
from benchmarks.database import pool_of, read, write
from benchmarks.measure import Block, Figure, ratios, take_turns
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table
from ctxdb_inspector import inspector

_REQUESTS = 40
_AIM = Aim(1.03)
_LONG = 24 * 60 * 60
"""The seconds that a connection may be idle: it waits while the other blocks have their turns."""


class Inspected(Question):
    """One SELECT and one INSERT, with and without the inspector; by a call of the application, and by uvicorn."""

    name: ClassVar[str] = "inspector"

    async def answer(self) -> list[Table]:
        """Measure, and return a table for each statement."""
        plain, inspected = (CtxDB(self.settings.url, pool_of(2)) for _ in range(2))
        inspector(inspected.db)
        tables = []
        try:
            for statement, work in (("SELECT", read), ("INSERT", write)):
                blocks: dict[str, Block] = {}
                for name, contender in (("ctxdb", plain), ("ctxdb, inspected", inspected)):
                    app = contender.app([Route(PATH, partial(Response, BODY), work)])
                    for server, requests in (("", _by_call(app)), (", uvicorn", _by_uvicorn(app))):
                        # The connection is open, and has the statement prepared; the inspector keeps as many requests
                        # as it ever does.
                        await requests(600)
                        blocks[name + server] = partial(requests, _REQUESTS)
                samples = await take_turns(blocks, self.settings.rounds_of(300, 80), f"{statement} with the inspector")
                rows = []
                for server in ("", ", uvicorn"):
                    without, beside = f"ctxdb{server}", f"ctxdb, inspected{server}"
                    rows.append(Row(without, Figure.of(samples[without]).median * 1e6))
                    share = ratios(samples, beside, without)
                    rows.append(Row(beside, Figure.of(samples[beside]).median * 1e6, share, _AIM))
                tables.append(
                    Table(
                        f"A Starlette request with one {statement}: CPU with the inspector as a share of that without",
                        "µs of CPU",
                        "share",
                        rows,
                    )
                )
        finally:
            await plain.close()
            await inspected.close()
        return tables


def _by_call(app: ASGIApp) -> Callable[[int], Awaitable[int]]:
    return Caller(app).sequence


def _by_uvicorn(app: ASGIApp) -> Callable[[int], Awaitable[int]]:
    """Return what has uvicorn read and write the requests too, as it does for every request that comes by a socket."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=_LONG)
    config.load()
    loop = asyncio.get_running_loop()
    # uvicorn documents no way of making one without a server.
    protocol_class: Any = config.http_protocol_class
    protocol = protocol_class(config=config, server_state=ServerState(), app_state={}, _loop=loop)
    connection = ClientConnection(protocol)

    async def requests(times: int) -> int:
        await connection.request(times)
        return times

    return requests
