"""The limits that the ASGI middleware puts on the statements of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from tests.support.database import Database, insert

from ctxdb_core import DBConnect, DeadlineExceededError, db_session
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware, Message, Receive, Scope, Send


async def ask(work: Callable[[], Awaitable[object]], path: str = "/", **options: Any) -> list[str]:
    """Send one request to a middleware with `options`; return what kinds of messages it answers by."""
    sent: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message["type"])

    await ASGIHTTPDBSessionMiddleware(app, **options)({"type": "http", "path": path}, receive, send)
    return sent


async def test_a_statement_of_a_request_that_takes_longer_than_the_timeout_is_rolled_back(
    db: DBConnect, database: Database
) -> None:
    async def work() -> None:
        session = await insert(db, "one")
        await session.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises(DBAPIError, match="statement timeout"):
        await ask(work, statement_timeout=0.2)
    assert await database.names() == []


async def test_a_request_has_the_deadline_that_its_scope_says(db: DBConnect, database: Database) -> None:
    def deadline(scope: Scope) -> float | None:
        return asyncio.get_running_loop().time() - 1 if scope["path"] == "/late" else None

    with pytest.raises(DeadlineExceededError):
        await ask(lambda: insert(db, "one"), "/late", deadline=deadline)
    assert database.checkouts == 0
    assert await ask(lambda: insert(db, "two"), deadline=deadline) == ["http.response.start", "http.response.body"]
    assert await database.names() == ["two"]


async def test_a_timeout_and_a_deadline_hold_together(db: DBConnect) -> None:
    limits: list[str] = []

    async def work() -> None:
        limits.append(str(await (await db_session(db)).scalar(text("SHOW statement_timeout"))))

    await ask(work, statement_timeout=2, deadline=lambda scope: asyncio.get_running_loop().time() + 60)
    await ask(work, statement_timeout=60, deadline=lambda scope: asyncio.get_running_loop().time() + 2)
    assert limits[0] == "2s"
    assert int(limits[1].removesuffix("ms")) < 2000


async def test_a_nonsensical_limit_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="statement_timeout"):
        await ask(asyncio.Event().wait, statement_timeout=0)
