"""Promises 4, 5 and 8: requests do not meet each other, and leave nothing behind."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Reply
from tests.support.database import eventually, insert
from tests.support.world import World

from ctxdb_core import (
    ContextClosedError,
    atomic_db_session,
    close_db_session,
    db_session,
    gather_in_new_ctx,
    new_db_ctx,
    run_in_new_ctx,
)
from ctxdb_core.adapters import is_context_initiated


async def test_the_code_and_the_tasks_of_a_request_share_a_session(world: World) -> None:
    sessions: list[AsyncSession] = []

    async def note() -> None:
        sessions.append(await db_session(world.db))

    async def handler() -> Reply:
        await note()
        await asyncio.gather(note(), note())
        await insert(world.db, "one")
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert len(sessions) == 3
    assert all(session is sessions[0] for session in sessions)


async def test_requests_have_sessions_of_their_own(world: World) -> None:
    sessions: list[AsyncSession] = []

    async def handler() -> Reply:
        sessions.append(await db_session(world.db))
        return Reply()

    client = await world.start(("/", handler))
    await asyncio.gather(*(client.get("/") for _ in range(5)))
    assert len({id(session) for session in sessions}) == 5


async def test_a_server_started_inside_a_unit_of_work_does_not_join_it(world: World) -> None:
    async def handler() -> Reply:
        assert await db_session(world.db) is not outer
        await insert(world.db, "request")
        return Reply()

    async with new_db_ctx():
        outer = await db_session(world.db)
        response = await world.get(handler)
        assert response.status_code == 200
        assert await world.names() == ["request"]
        assert await db_session(world.db) is outer


@pytest.mark.postgresql
async def test_a_request_made_inside_a_request_has_a_unit_of_work_of_its_own(world: World) -> None:
    async def outer() -> Reply:
        await insert(world.db, "outer")
        inner_response = await client.post("/inner")
        return Reply(inner_response.text, status=400)

    async def inner() -> Reply:
        await insert(world.db, "inner")
        return Reply("done")

    client = await world.start(("/outer", outer), ("/inner", inner))
    response = await client.post("/outer")
    assert (response.status_code, response.text) == (400, "done")
    assert await world.names() == ["inner"]


async def test_a_task_that_outlives_its_request_gets_an_error_that_says_so(world: World) -> None:
    tasks: list[asyncio.Task[AsyncSession]] = []
    release = asyncio.Event()

    async def late() -> AsyncSession:
        await release.wait()
        return await db_session(world.db)

    async def handler() -> Reply:
        await insert(world.db, "one")
        tasks.append(asyncio.create_task(late()))
        return Reply()

    assert (await world.get(handler)).status_code == 200
    await eventually(lambda: not world.database.checked_out, "the request is not over")
    release.set()
    with pytest.raises(ContextClosedError, match="run_in_new_ctx"):
        await tasks[0]


async def test_a_task_with_a_context_of_its_own_outlives_its_request(world: World) -> None:
    tasks: list[asyncio.Task[AsyncSession]] = []
    release = asyncio.Event()

    async def late() -> AsyncSession:
        await release.wait()
        return await insert(world.db, "late")

    async def handler() -> Reply:
        tasks.append(asyncio.create_task(run_in_new_ctx(late)))
        return Reply()

    assert (await world.get(handler)).status_code == 200
    release.set()
    await tasks[0]
    assert await world.names() == ["late"]


async def test_a_session_kept_beyond_its_request_refuses_to_write(world: World) -> None:
    kept: list[AsyncSession] = []

    async def handler() -> Reply:
        kept.append(await insert(world.db, "one"))
        return Reply()

    assert (await world.get(handler)).status_code == 200
    await eventually(lambda: not is_usable(kept[0]), "the request is not over")
    with pytest.raises(ContextClosedError):
        await kept[0].execute(text("INSERT INTO item VALUES ('late')"))
    assert await world.names() == ["one"]


def is_usable(session: AsyncSession) -> bool:
    try:
        session.get_bind()
    except ContextClosedError:
        return False
    return True


async def test_there_is_no_context_outside_of_requests(world: World) -> None:
    seen: list[bool] = []

    async def handler() -> Reply:
        seen.append(is_context_initiated())
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert seen == [True]
    assert not is_context_initiated()


@pytest.mark.postgresql
async def test_two_databases_are_committed_together_or_not_at_all(world: World) -> None:
    status = 200

    async with world.database.connect() as second:

        async def handler() -> Reply:
            await insert(world.db, f"first {status}")
            await insert(second, f"second {status}")
            return Reply(status=status)

        client = await world.start(("/", handler))
        assert (await client.post("/")).status_code == 200
        status = 400
        assert (await client.post("/")).status_code == 400
    assert await world.names() == ["first 200", "second 200"]


async def test_a_request_can_have_several_sessions_at_once(world: World) -> None:
    async def read() -> AsyncSession:
        session = await db_session(world.db)
        await session.execute(text("SELECT 1"))
        return session

    async def handler() -> Reply:
        sessions = await gather_in_new_ctx(*[read] * 8, max_concurrent=4)
        return Reply(str(len({id(session) for session in sessions})))

    assert (await world.get(handler)).text == "8"


async def test_an_atomic_block_stands_in_a_request_that_fails(world: World) -> None:
    async def handler() -> Reply:
        async with atomic_db_session(world.db):
            await insert(world.db, "own")
        await insert(world.db, "of the request")
        raise LookupError

    assert (await world.get(handler)).status_code == 500
    assert await world.names() == ["own"]


async def test_an_early_close_frees_the_connection_for_long_work(world: World) -> None:
    held: list[int] = []

    async def handler() -> Reply:
        await (await db_session(world.db)).execute(text("SELECT 1"))
        held.append(world.database.checked_out)
        await close_db_session(world.db)
        held.append(world.database.checked_out)
        await insert(world.db, "after the work")
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert held == [1, 0]
    assert await world.names() == ["after the work"]


@pytest.mark.sockets
@pytest.mark.postgresql
async def test_shutting_down_closes_every_connection(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert world.database.backends("true") != []
    await world.stop()
    await eventually(lambda: not world.database.backends("true"), "connections outlived the application")
