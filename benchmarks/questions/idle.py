"""What does the middleware add to a request that uses no database?"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from benchmarks.asgi import PATH, Caller
from benchmarks.contenders import Route
from benchmarks.database import pool_of
from benchmarks.measure import Block, Figure, differences, take_turns
from benchmarks.questions._question import Question, load_all
from benchmarks.report import Aim, Row, Table

_BARE = "no middleware"
_REQUESTS = 100
_AIM = Aim(0.8)


class Idle(Question):
    """A bare Starlette request, without a middleware and with each one."""

    name: ClassVar[str] = "idle"

    async def answer(self) -> list[Table]:
        """Measure, and return the table."""
        contenders, missing = load_all(
            (
                "floor",
                "ctxdb",
                "hand-written middleware",
                "context-async-sqlalchemy",
                "context-async-sqlalchemy (http)",
                "fastapi-async-sqlalchemy",
                "advanced-alchemy",
            )
        )
        options = pool_of(1)
        opened = [contender(self.settings.url, options) for contender in contenders.values()]
        routes = [Route(PATH, partial(Response, b"ok"))]
        bare = Starlette(routes=[StarletteRoute(PATH, _answer)])
        apps = {_BARE: bare} | {contender.name: contender.app(routes) for contender in opened}
        blocks: dict[str, Block] = {name: partial(Caller(app).sequence, _REQUESTS) for name, app in apps.items()}
        try:
            samples = await take_turns(blocks, self.settings.rounds_of(300, 80), "a request without database use")
        finally:
            for contender in opened:
                await contender.close()
        microseconds = {name: Figure.of(values).scaled(1e6) for name, values in samples.items()}
        rows = [Row(_BARE, microseconds[_BARE].median)]
        rows += [
            Row(
                contender.name,
                microseconds[contender.name].median,
                differences(samples, contender.name, _BARE).scaled(1e6),
                _AIM if contender.name == "ctxdb" else None,
                "a context variable and a look at each message, nothing else" if contender.name == "floor" else "",
            )
            for contender in opened
        ]
        return [
            Table(
                "A Starlette request that uses no database: microseconds of CPU that the middleware adds",
                "µs of CPU",
                "added",
                rows,
                absolute_digits=2,
                figure_digits=2,
                notes=missing,
            )
        ]


async def _answer(request: object) -> Response:
    return Response(b"ok")
