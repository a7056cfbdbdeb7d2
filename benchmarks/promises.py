"""How ctxdb and others answer: ``uv run --group competitors python -m benchmarks.promises``.

Each contender serves the same four requests, in process and on a PostgreSQL of this command's own. Another connection
looks at the database at the moment at which the first byte of the response leaves, and the pool is looked at when the
body does. Nothing is timed, so a loaded machine gives the same answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message

from benchmarks.contenders import Contender, MissingContenderError, Route, load
from benchmarks.contenders.hand_written import YieldDependency
from benchmarks.database import create_engine, pool_of
from ctxdb_pgstatus.testing import EmbeddedPostgres

DISTRIBUTIONS = (
    "sqlalchemy",
    "asyncpg",
    "starlette",
    "fastapi",
    "context-async-sqlalchemy",
    "fastapi-async-sqlalchemy",
    "advanced-alchemy",
    "sqlalchemy-tx-context",
)

CREATE = "CREATE TABLE promise (code INTEGER UNIQUE DEFERRABLE INITIALLY DEFERRED)"


QUESTIONS = (
    "a commit fails",
    "committed before the first byte",
    "a returned 400",
    "connection while a body streams",
)


class FunctionScope(YieldDependency):
    """The same dependency with ``scope="function"``."""

    name: ClassVar[str] = 'FastAPI yield dependency, scope="function"'
    depends_options: ClassVar[dict[str, Any]] = {"scope": "function"}


CONTENDERS: Sequence[str | type[Contender]] = (
    "ctxdb",
    "FastAPI yield dependency",
    FunctionScope,
    "hand-written",
    "context-async-sqlalchemy",
    "context-async-sqlalchemy (http)",
    "fastapi-async-sqlalchemy",
    "advanced-alchemy",
    "sqlalchemy-tx-context",
)


@dataclass
class Answer:
    """What a client was told, and how things stood meanwhile."""

    status: int | None = None
    committed_before: bool | None = None
    held_with_body: int = 0


def adds(code: int) -> Any:
    """Return work that adds a row: one that is there already fails at the COMMIT."""

    async def work(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO promise VALUES (:code)"), {"code": code})

    return work


def streamed() -> Response:
    """Return a response whose body is sent piece by piece."""

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    return StreamingResponse(body())


ROUTES = (
    Route("/success", lambda: PlainTextResponse("added", 201), adds(10)),
    Route("/failing", lambda: PlainTextResponse("added", 201), adds(1)),
    Route("/refused", lambda: PlainTextResponse("no", 400), adds(11)),
    Route("/stream", streamed, adds(12)),
)


async def conflict(request: Request, error: Exception) -> Response:
    """Answer an `IntegrityError`, as applications do."""
    return PlainTextResponse("there is one", 409)


class Observer:
    """Asks contenders, and looks at the database meanwhile.

    Args:
        engine: another one than theirs.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def has(self, code: int) -> bool:
        """Return whether a row is there for everybody."""
        async with self._engine.connect() as connection:
            found = await connection.scalar(text("SELECT 1 FROM promise WHERE code = :code"), {"code": code})
            return found is not None

    async def begin(self) -> None:
        """Make the table anew, with the row 1."""
        async with self._engine.begin() as connection:
            await connection.execute(text("DROP TABLE IF EXISTS promise"))
            await connection.execute(text(CREATE))
            await connection.execute(text("INSERT INTO promise VALUES (1)"))

    async def ask(self, app: ASGIApp, contender: Contender, path: str, code: int) -> Answer:
        """Send one request, and return its answer."""
        answer = Answer()
        requests = iter([True])

        async def receive() -> Message:
            if next(requests, False):
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError("never set")

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.committed_before = await self.has(code)
            elif message.get("body"):
                held = contender.engine.pool.checkedout()  # type: ignore[attr-defined] # a QueuePool
                answer.held_with_body = max(answer.held_with_body, held)

        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
        }
        scope |= {"headers": [], "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": None}
        scope |= {"asgi": {"version": "3.0"}, "root_path": "", "state": {}}
        # A server logs what the application raises; where no response has started, it answers 500.
        with suppress(Exception):
            await app(scope, receive, send)
        return answer

    async def row(self, contender: Contender) -> list[str]:
        """Return a contender's row of the table."""
        await self.begin()
        app: Any = contender.app(ROUTES)
        app.add_exception_handler(IntegrityError, conflict)
        success = await self.ask(app, contender, "/success", 10)
        failing = await self.ask(app, contender, "/failing", 1)
        await self.ask(app, contender, "/refused", 11)
        stream = await self.ask(app, contender, "/stream", 12)
        return [
            contender.name,
            str(failing.status or 500),
            "yes" if success.committed_before else "no",
            "rolled back" if not await self.has(11) else "committed",
            "in the pool" if stream.held_with_body == 0 else "held",
        ]


async def compare(url: str) -> None:
    """Print the table."""
    header = (
        "",
        "a commit fails",
        "committed before the first byte",
        "a returned 400",
        "connection while a body streams",
    )
    print("| " + " | ".join(header) + " |")
    print("| --- " * len(header) + "|")
    engine = create_engine(url, pool_of(2))
    for entry in CONTENDERS:
        try:
            contender = (load(entry) if isinstance(entry, str) else entry)(url, pool_of(5))
        except MissingContenderError as error:
            print(f"| {entry}: {error} |")
            continue
        try:
            print("| " + " | ".join(await Observer(engine).row(contender)) + " |", flush=True)
        finally:
            await contender.close()
    await engine.dispose()


def versions() -> str:
    """Return what was asked."""
    found = []
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def main() -> None:
    """Run the command."""
    with EmbeddedPostgres() as server:
        asyncio.run(compare(server.url()))
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
