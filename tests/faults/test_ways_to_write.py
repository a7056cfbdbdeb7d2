"""Each way to write, with a connection that is lost at each point of the protocol: what is told is what is stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

import httpx
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.support.database import Database, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point

from ctxdb_core import (
    CommitOutcomeUnknownError,
    DBConnect,
    TransactionContext,
    atomic_db_session,
    commit_db_session,
    db_session,
    joining_session,
    new_db_ctx,
    on_commit,
    on_rollback,
    retry_on_conflict,
    transactional,
)
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware

POINTS = (
    Point.BEGIN,
    Point.STATEMENT,
    Point.ANSWER,
    Point.SAVEPOINT,
    Point.RELEASE,
    Point.RELEASED,
    Point.ROLLBACK,
    Point.COMMIT,
    Point.COMMITTED,
)


async def _select(db: DBConnect) -> None:
    await (await db_session(db)).execute(text("SELECT 1"))


async def in_a_unit(db: DBConnect) -> None:
    async with new_db_ctx():
        await insert(db, "a")


async def in_a_savepoint(db: DBConnect) -> None:
    async with new_db_ctx(), (await db_session(db)).begin_nested():
        await insert(db, "a")


async def in_an_atomic_savepoint(db: DBConnect) -> None:
    async with new_db_ctx():
        await _select(db)
        async with atomic_db_session(db, "savepoint"):
            await insert(db, "a")


async def beside_a_savepoint_that_is_rolled_back(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await insert(db, "a")
        with suppress(Exception):
            async with session.begin_nested():
                await session.execute(text("SELECT 1"))
                raise ZeroDivisionError


async def after_a_swallowed_error(db: DBConnect) -> None:
    async with new_db_ctx():
        with suppress(Exception):
            await _select(db)
        await insert(db, "a")


async def in_a_transaction_context(db: DBConnect) -> None:
    async with TransactionContext(db).transaction() as session:
        await session.execute(text("INSERT INTO item VALUES ('a')"))


async def in_a_transaction_of_its_own(db: DBConnect) -> None:
    async with new_db_ctx():
        await _select(db)
        async with transactional(db, "requires_new"):
            await insert(db, "a")


async def in_an_attempt(db: DBConnect) -> None:
    attempts = 0

    @retry_on_conflict(wait=0)
    async def attempt() -> None:
        nonlocal attempts
        attempts += 1
        await insert(db, "a")

    try:
        await attempt()
    finally:
        # The loss of a connection is no conflict, and an unknown commit may be stored.
        assert attempts == 1


async def by_a_library_that_commits(db: DBConnect) -> None:
    async with new_db_ctx():
        await _select(db)
        async with joining_session(db) as session:
            await session.execute(text("INSERT INTO item VALUES ('a')"))
            await session.commit()


async def early(db: DBConnect) -> None:
    async with new_db_ctx():
        await insert(db, "a")
        await commit_db_session(db)


@pytest.mark.parametrize(
    "write",
    [
        in_a_unit,
        in_a_savepoint,
        in_an_atomic_savepoint,
        beside_a_savepoint_that_is_rolled_back,
        after_a_swallowed_error,
        in_a_transaction_context,
        in_a_transaction_of_its_own,
        in_an_attempt,
        by_a_library_that_commits,
        early,
    ],
)
async def test_what_is_told_is_what_is_stored(
    far: DBConnect, network: FaultyNetwork, database: Database, write: Callable[[DBConnect], Awaitable[None]]
) -> None:
    for point in POINTS:
        await database.query("DELETE FROM item")
        network.fail(point, Fault.DROP)
        told = "success"
        try:
            await write(far)
        except CommitOutcomeUnknownError:
            told = "unknown"
            assert point in (Point.COMMIT, Point.COMMITTED)
        except Exception:  # noqa: BLE001 - any of a driver's
            told = "failure"
            assert network.failed.is_set()
        network.heal()
        if told != "unknown":
            assert await database.names() == (["a"] if told == "success" else []), point
        await database.assert_quiet()


async def _serve(handler: Callable[[Request], Awaitable[Response]]) -> None:
    app = Starlette(routes=[Route("/", handler)])
    app.add_middleware(ASGIHTTPDBSessionMiddleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/")


@pytest.mark.parametrize("point", [Point.COMMIT, Point.COMMITTED])
async def test_the_lost_commit_of_a_streamed_body_is_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database, point: Point
) -> None:
    async def handler(request: Request) -> Response:
        await insert(far, "response")
        return StreamingResponse(chunks())

    async def chunks() -> AsyncGenerator[str, None]:
        yield "first"
        await insert(far, "body")
        network.fail(point, Fault.DROP)
        yield "last"

    with pytest.raises(CommitOutcomeUnknownError):
        await _serve(handler)
    assert await database.names() == (["response"] if point is Point.COMMIT else ["body", "response"])


async def test_the_lost_commit_of_a_background_task_is_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    async def handler(request: Request) -> Response:
        await insert(far, "response")
        return PlainTextResponse("done", background=BackgroundTask(work))

    async def work() -> None:
        await insert(far, "background")
        network.fail(Point.COMMIT, Fault.DROP)

    with pytest.raises(CommitOutcomeUnknownError):
        await _serve(handler)
    assert await database.names() == ["response"]


async def test_a_lost_commit_names_the_databases_that_were_committed_before_it(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    near = make_url(database.url).set(port=database.server.port if database.server else None)
    outcomes: list[str] = []

    async def write(db: DBConnect, name: str) -> None:
        await insert(db, name)
        on_commit(db, lambda: outcomes.append(f"{name} committed"))
        on_rollback(db, lambda: outcomes.append(f"{name} rolled back"))

    async with (
        DBConnect(lambda host: database.watch(create_async_engine(near)), host="first") as first,
        DBConnect(lambda host: database.watch(create_async_engine(near)), host="third") as third,
    ):
        with pytest.raises(CommitOutcomeUnknownError) as raised:
            async with new_db_ctx():
                await write(first, "first")
                await write(far, "second")
                await write(third, "third")
                network.fail(Point.COMMITTED, Fault.DROP)
        assert "the one on <DBConnect host='first'> had succeeded" in "".join(raised.value.__notes__)
    assert sorted(outcomes) == ["first committed", "third rolled back"]
    assert await database.names() == ["first", "second"]
