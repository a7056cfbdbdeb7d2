"""Cancellation at every step of a unit of work, once and level-triggered: nothing leaks, nothing is half done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import event, text
from tests.support.database import Database, eventually, insert
from tests.support.interruption import (
    CANCELLERS,
    assert_halves_belong_together,
    assert_units_are_whole_or_absent,
    at_each_step,
    insert_halves,
)

from ctxdb_core import (
    DBConnect,
    TransactionContext,
    atomic_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_atomic_session,
)


def after_turns(turns: int) -> Callable[[Callable[[], object]], None]:
    """Cancel after so many turns of the event loop."""

    def cancel_when(cancel: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(after_turns(turns - 1), cancel)
        else:
            cancel()

    return cancel_when


@CANCELLERS
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_cancelled_at_any_step_a_unit_of_work_is_whole_or_absent(
    database: Database, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]], connected: bool
) -> None:
    await assert_units_are_whole_or_absent(database, db, run_cancelled, connected=connected)


@CANCELLERS
@pytest.mark.parametrize("outer", ["session", "transaction"])
@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_cancelled_at_any_step_a_block_is_whole_or_absent(
    database: Database, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]], outer: str
) -> None:
    context = TransactionContext(db)

    async def work(step: int) -> None:
        async with getattr(context, outer)():
            # In a session, this statement has begun the transaction.
            await context.execute(text("SELECT 1"))
            async with context.transaction():
                await insert_halves(context.execute, step)

    step = 0
    async for step in at_each_step(run_cancelled, work):  # noqa: B007 - used behind the loop
        assert database.checked_out == 0
        assert context.get_session(strict=False) is None
    await assert_halves_belong_together(database, step)


@CANCELLERS
async def test_cancelled_at_any_step_a_session_outside_of_the_context_is_closed(
    database: Database, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]]
) -> None:
    async def work(step: int) -> None:
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": f"{step:03}"})

    step = 0
    async for step in at_each_step(run_cancelled, work):  # noqa: B007 - used behind the loop
        assert database.checked_out == 0
    assert (await database.names())[-1] == f"{step:03}"


@CANCELLERS
@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_the_query_of_a_cancelled_task_stops_on_the_server(
    database: Database, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]]
) -> None:
    async def work() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT pg_sleep(300)"))

    watchers: list[asyncio.Task[None]] = []

    def when_it_runs(cancel: Callable[[], object]) -> None:
        async def watch() -> None:
            await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
            cancel()

        watchers.append(asyncio.create_task(watch()))

    await run_cancelled(work, when_it_runs)
    await asyncio.gather(*watchers)
    await eventually(lambda: not database.backends("query ~ 'pg_sleep' AND state = 'active'"), "the query runs on")


@CANCELLERS
async def test_a_commit_that_has_begun_is_seen_through(
    database: Database, db: DBConnect, run_cancelled: Callable[..., Awaitable[None]]
) -> None:
    await database.query(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$"
    )
    await database.query(
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    watchers: list[asyncio.Task[None]] = []

    async def work() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("INSERT INTO item VALUES ('one')"))

    def when_it_commits(cancel: Callable[[], object]) -> None:
        async def watch() -> None:
            await eventually(lambda: bool(database.backends("query ~ '^COMMIT' AND state = 'active'")), "no commit")
            cancel()

        watchers.append(asyncio.create_task(watch()))

    await run_cancelled(work, when_it_commits)
    await asyncio.gather(*watchers)
    assert await database.names() == ["one"]


async def test_the_pool_serves_everyone_after_many_cancelled_requests(database: Database, db: DBConnect) -> None:
    async def work() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT pg_sleep(0.001)"))

    for turns in range(60):
        tasks = [asyncio.create_task(work()) for _ in range(8)]
        for task in tasks[::2]:
            after_turns(turns)(task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [result for result in results[1::2] if result is not None] == []
    assert database.checked_out == 0


@pytest.mark.parametrize("turns", range(8))
async def test_a_task_that_is_cancelled_when_its_turn_at_the_pool_comes_does_not_go_on(
    database: Database, turns: int
) -> None:
    async def work() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))
            await asyncio.Event().wait()

    async with database.connect(pool_size=1) as db:
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("SELECT 1"))
            waiting = asyncio.create_task(work())
            await asyncio.sleep(0)
            pool = (await db.engine()).sync_engine.pool
            event.listen(pool, "checkin", lambda *_: after_turns(turns)(waiting.cancel), once=True)
        done, _ = await asyncio.wait([waiting], timeout=10)
        waiting.cancel()
        assert done, "the cancellation was lost"


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_block_whose_commit_is_cancelled_while_it_waits_for_a_statement_is_rolled_back(
    db: DBConnect, database: Database
) -> None:
    async def write() -> None:
        async with atomic_db_session(db) as session:
            await insert(db, "undone")
            statements.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(0.5)"))))
            await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
            waits.set()

    statements: list[asyncio.Task[object]] = []
    waits = asyncio.Event()
    async with new_db_ctx():
        writing = asyncio.create_task(write())
        await waits.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await asyncio.gather(*statements)
    assert await database.names() == []
