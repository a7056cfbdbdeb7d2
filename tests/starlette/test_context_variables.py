"""Context variables of an endpoint, beneath a middleware that calls the application in a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from tests.support.database import Database, Item, insert
from tests.support.stacks import Ask, DoNothing, application

from ctxdb_core import DBConnect, db_session, on_begin, on_commit, on_rollback
from ctxdb_starlette import DBSessionMiddleware

current_user: ContextVar[str] = ContextVar("current_user", default="nobody")
current_role: ContextVar[str] = ContextVar("current_role", default="none")
current_tenant: ContextVar[str] = ContextVar("current_tenant", default="none")


async def stamp(session: AsyncSession) -> None:
    """A `before_commit` that writes who has made the change."""
    for item in session.new:
        assert isinstance(item, Item)
        item.name = f"{item.name} by {current_user.get()}"


def stamping(app: Starlette) -> DBSessionMiddleware:
    return DBSessionMiddleware(app, before_commit=stamp)


INNERMOST = [stamping, DoNothing]
OUTERMOST = [DoNothing, stamping]


@pytest.fixture(params=[INNERMOST, OUTERMOST], ids=["innermost", "outermost"])
def middlewares(request: pytest.FixtureRequest) -> list[object]:
    places: list[object] = request.param
    return places


async def add(db: DBConnect, name: str) -> None:
    (await db_session(db)).add(Item(name=name))


async def test_hooks_of_a_commit_see_what_the_endpoint_has_set(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, middlewares: list[object]
) -> None:
    seen: list[str] = []

    async def note_beginning(session: AsyncSession) -> None:
        seen.append(f"begin as {current_user.get()}")

    async def write(request: Request) -> Response:
        current_user.set("ada")
        status = int(request.query_params["status"])
        on_begin(db, note_beginning)
        on_commit(db, lambda: seen.append(f"committed as {current_user.get()}"))
        on_rollback(db, lambda: seen.append(f"rolled back as {current_user.get()}"))
        await add(db, "order")
        return PlainTextResponse("", status)

    client = await ask(application(framework, {"/": write}, *middlewares))
    assert (await client.post("/?status=200")).status_code == 200
    assert seen == ["begin as ada", "committed as ada"]
    assert await database.names() == ["order by ada"]
    seen.clear()
    assert (await client.post("/?status=404")).status_code == 404
    assert seen[-1] == "rolled back as ada"


async def test_commits_behind_the_start_see_what_the_endpoint_has_set(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask, middlewares: list[object]
) -> None:
    is_body_committed, done = asyncio.Event(), asyncio.Event()

    async def work_in_background() -> None:
        # Beneath the middleware, it begins while the commit of the body may be under way.
        await is_body_committed.wait()
        await add(db, "background")
        on_commit(db, done.set)

    async def write(request: Request) -> Response:
        current_user.set("ada")

        async def body() -> AsyncIterator[str]:
            yield "part"
            await add(db, "body")
            on_commit(db, is_body_committed.set)

        return StreamingResponse(body(), background=BackgroundTask(work_in_background))

    client = await ask(application(framework, {"/": write}, *middlewares))
    assert (await client.post("/")).text == "part"
    await done.wait()
    assert await database.names() == ["background by ada", "body by ada"]


async def test_a_handler_of_a_failed_commit_sees_what_the_endpoint_has_set(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    async def handle(request: Request, exc: Exception) -> Response:
        return PlainTextResponse(current_user.get(), 409)

    async def write(request: Request) -> Response:
        current_user.set("ada")
        await insert(db, "order by ada")
        await add(db, "order")
        return PlainTextResponse("success")

    handlers = {IntegrityError: handle}
    client = await ask(application(framework, {"/": write}, *OUTERMOST, exception_handlers=handlers))
    response = await client.post("/")
    assert (response.status_code, response.text) == (409, "ada")
    assert await database.names() == []


async def test_a_middleware_and_the_next_request_do_not_see_what_an_endpoint_has_set(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    seen: list[str] = []

    class Outer(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            response = await call_next(request)
            seen.append(current_user.get())
            return response

    async def write(request: Request) -> Response:
        seen.append(current_user.get())
        current_user.set("ada")
        await add(db, f"order {len(seen)}")
        return PlainTextResponse()

    client = await ask(application(framework, {"/": write}, DoNothing, stamping, Outer))
    for _ in range(2):
        assert (await client.post("/")).status_code == 200
    assert seen == ["nobody"] * 4
    assert await database.names() == ["order 1 by ada", "order 3 by ada"]


async def test_what_a_middleware_sets_behind_the_endpoint_is_not_replaced_by_what_the_endpoint_had(
    db: DBConnect, database: Database, framework: type[Starlette], ask: Ask
) -> None:
    class Outer(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            current_tenant.set("unknown")
            response = await call_next(request)
            current_user.set("eve")
            current_tenant.set("north")
            return response

    class Inner(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            current_role.set("clerk")
            return await call_next(request)

    async def stamp_with_all(session: AsyncSession) -> None:
        for item in session.new:
            assert isinstance(item, Item)
            item.name = f"{item.name} by {current_user.get()}, {current_role.get()} of {current_tenant.get()}"

    async def write(request: Request) -> Response:
        current_user.set("ada")
        await add(db, "order")
        return PlainTextResponse()

    def stamping_with_all(app: Starlette) -> DBSessionMiddleware:
        return DBSessionMiddleware(app, before_commit=stamp_with_all)

    client = await ask(application(framework, {"/": write}, Inner, Outer, stamping_with_all))
    assert (await client.post("/")).status_code == 200
    assert await database.names() == ["order by eve, clerk of north"]
