"""Promise 1: a success that was not committed is never sent, and the application's handlers answer instead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Reply, Stream
from tests.support.database import Item, eventually, insert, insert_row_that_fails_at_commit
from tests.support.world import World

from ctxdb_core import TransactionAbortedError, commit_db_session, db_session, new_non_ctx_session, on_commit


async def _orphan_handler(world: World) -> Reply:
    await insert(world.db, "with the orphan")
    await insert_row_that_fails_at_commit(world.db)
    return Reply("success", headers={"x-success": "yes"})


async def test_a_refused_commit_is_an_error(world: World) -> None:
    response = await world.get(lambda: _orphan_handler(world))
    assert response.status_code == 500
    assert "success" not in response.text
    assert "x-success" not in response.headers
    assert await world.names() == []
    assert world.database.checked_out == 0


@pytest.mark.exception_handlers
async def test_the_applications_handler_answers_for_a_refused_commit(world: World) -> None:
    world.application.exception_statuses[IntegrityError] = 409
    response = await world.get(lambda: _orphan_handler(world))
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert "x-success" not in response.headers
    assert await world.names() == []


@pytest.mark.exception_handlers
async def test_a_handler_of_a_base_class_answers_too(world: World) -> None:
    world.application.exception_statuses[DBAPIError] = 503
    assert (await world.get(lambda: _orphan_handler(world))).status_code == 503


@pytest.mark.exception_handlers
async def test_a_handler_of_every_exception_answers_too(world: World) -> None:
    world.application.exception_statuses[Exception] = 555
    response = await world.get(lambda: _orphan_handler(world))
    assert (response.status_code, response.text) == (555, "handled IntegrityError")


@pytest.mark.background
async def test_background_tasks_and_callbacks_of_a_failed_commit_do_not_run(world: World) -> None:
    happened: list[str] = []

    async def background() -> None:
        happened.append("background")

    async def handler() -> Reply:
        await insert_row_that_fails_at_commit(world.db)
        on_commit(world.db, lambda: happened.append("on_commit"))
        return Reply(background=background)

    assert (await world.get(handler)).status_code == 500
    assert happened == []


@pytest.mark.background
async def test_a_stream_whose_commit_fails_is_not_begun(world: World) -> None:
    begun: list[str] = []

    async def chunks() -> AsyncGenerator[str, None]:
        begun.append("stream")
        yield "success"

    async def background() -> None:
        begun.append("background")

    async def handler() -> Stream:
        await insert_row_that_fails_at_commit(world.db)
        return Stream(chunks(), background=background)

    response = await world.get(handler)
    assert response.status_code == 500
    assert "success" not in response.text
    assert begun == []


@pytest.mark.exception_handlers
async def test_a_stream_that_is_not_begun_is_answered_by_the_handler(world: World) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        yield "success"

    async def handler() -> Stream:
        await insert_row_that_fails_at_commit(world.db)
        return Stream(chunks())

    world.application.exception_statuses[IntegrityError] = 409
    response = await world.get(handler)
    assert (response.status_code, response.text) == (409, "handled IntegrityError")


async def test_a_flush_that_fails_at_the_end_is_an_error(world: World) -> None:
    await world.database.query("INSERT INTO item VALUES ('there')")

    async def handler() -> Reply:
        (await db_session(world.db)).add(Item(name="there"))
        return Reply()

    assert (await world.get(handler)).status_code == 500


@pytest.mark.postgresql
async def test_a_connection_killed_before_the_commit_is_an_error(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        assert world.database.terminate_backends("state = 'idle in transaction'") == 1
        return Reply()

    async def after() -> Reply:
        await insert(world.db, "after")
        return Reply()

    client = await world.start(("/", handler), ("/after", after))
    assert (await client.post("/")).status_code == 500
    assert (await client.post("/after")).status_code == 200
    assert await world.names() == ["after"]


@pytest.mark.postgresql
async def test_a_connection_killed_in_the_middle_of_the_commit_is_an_error(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        return Reply()

    client = await world.start(("/", handler))
    with world.database.held_commits():
        request = asyncio.create_task(client.post("/"))
        await world.database.commit_is_held()
        assert world.database.terminate_backends("query ~ '^COMMIT'") == 1
        assert (await request).status_code == 500
    assert await world.names() == []


@pytest.mark.postgresql
async def test_a_connection_killed_before_a_roll_back_leaves_the_response_alone(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        assert world.database.terminate_backends("state = 'idle in transaction'") == 1
        return Reply(status=409)

    assert (await world.get(handler)).status_code == 409
    assert await world.names() == []


@pytest.mark.postgresql
async def test_a_serialization_failure_at_commit_is_an_error(world: World) -> None:
    """Two transactions read what the other writes: PostgreSQL refuses the transaction that commits last."""

    async def handler() -> Reply:
        session = await db_session(world.db)
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        count = await session.scalar(text("SELECT count(*) FROM item"))
        async with world.database.connect() as other:
            rival = await other.create_session()
            await rival.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            await rival.scalar(text("SELECT count(*) FROM item"))
            await rival.execute(text("INSERT INTO item VALUES ('rival')"))
            await session.execute(text("INSERT INTO item VALUES ('mine')"))
            await rival.commit()
            await rival.close()
        return Reply(str(count))

    assert (await world.get(handler)).status_code == 500
    assert await world.names() == ["rival"]


@pytest.mark.postgresql
async def test_a_deadlock_is_an_error(world: World) -> None:
    """Two transactions lock what the other one has: PostgreSQL ends the one that looks first."""

    async def lock(session: AsyncSession, number: int) -> None:
        await session.execute(text(f"SELECT pg_advisory_xact_lock({number})"))

    async def handler() -> Reply:
        session = await insert(world.db, "mine")
        await session.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
        await lock(session, 1)
        async with world.database.connect() as other, new_non_ctx_session(other) as rival:
            await lock(rival, 2)
            waiting = asyncio.create_task(lock(rival, 1))
            await eventually(lambda: bool(world.database.backends("wait_event = 'advisory'")), "no lock is waited for")
            try:
                await lock(session, 2)
            finally:
                await session.rollback()
                await waiting
        return Reply("success")

    assert (await world.get(handler)).status_code == 500
    assert await world.names() == []


@pytest.mark.postgresql
async def test_a_swallowed_error_does_not_end_in_a_success(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        with pytest.raises(IntegrityError):
            await insert(world.db, "one")
        return Reply("success")

    response = await world.get(handler)
    assert response.status_code == 500
    assert await world.names() == []


@pytest.mark.postgresql
@pytest.mark.exception_handlers
async def test_a_swallowed_error_reaches_its_handler(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        with pytest.raises(IntegrityError):
            await insert(world.db, "one")
        return Reply("success")

    world.application.exception_statuses[TransactionAbortedError] = 409
    assert (await world.get(handler)).status_code == 409


async def test_an_early_commit_stands_when_the_last_one_fails(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "early")
        await commit_db_session(world.db)
        await insert(world.db, "late")
        await insert_row_that_fails_at_commit(world.db)
        return Reply()

    assert (await world.get(handler)).status_code == 500
    assert await world.names() == ["early"]


@pytest.mark.postgresql
async def test_with_two_databases_the_error_names_what_was_committed(world: World) -> None:
    async with world.database.connect() as second:

        async def handler() -> Reply:
            await insert(world.db, "first")
            await insert(second, "second")
            await insert_row_that_fails_at_commit(second)
            return Reply()

        client = await world.start(("/", handler))
        assert (await client.post("/")).status_code == 500
    assert await world.names() == ["first"]
    [error] = world.application.errors
    assert isinstance(error, IntegrityError)
    assert repr(world.db) in str(error)
