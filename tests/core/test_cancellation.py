"""Cancellation at every step of a unit of work, once and level-triggered: nothing leaks, nothing is half done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial

import anyio
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only
from tests.support.blocks import savepoint, transaction
from tests.support.connection import BODY, START, Connection
from tests.support.database import Database, eventually, insert
from tests.support.interruption import (
    CANCELLERS,
    assert_halves_belong_together,
    assert_units_are_whole_or_absent,
    at_each_step,
    insert_halves,
)

from ctxdb_core import (
    ContextClosedError,
    DBConnect,
    StatementInterruptedError,
    TransactionAbortedError,
    TransactionContext,
    atomic_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    transactional,
)
from ctxdb_core._sqlalchemy import block_end
from ctxdb_core._sqlalchemy.cancelled_queries import _request_until_answered
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware, Receive, Scope, Send


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


async def read_before_commit(db: DBConnect, session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


async def commit_elsewhere_before_commit(db: DBConnect, session: AsyncSession) -> None:
    async with transactional(db, "requires_new") as other:
        await other.execute(text("SELECT 1"))


@CANCELLERS
@pytest.mark.parametrize("before_commit", [read_before_commit, commit_elsewhere_before_commit])
# Not on SQLite: before aiosqlite 0.22, nothing ends a connection whose roll-back was cancelled, and its lock stays.
@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_cancelled_at_any_step_a_request_tells_success_only_of_what_is_stored(
    database: Database,
    db: DBConnect,
    run_cancelled: Callable[..., Awaitable[None]],
    before_commit: Callable[[DBConnect, AsyncSession], Awaitable[None]],
) -> None:
    told: list[str] = []

    async def work(step: int) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await insert(db, f"{step:03}")
            await send(START)
            await send(BODY)

        request = Connection()
        try:
            await request.run(ASGIHTTPDBSessionMiddleware(app, before_commit=partial(before_commit, db)))
        finally:
            if request.sent:
                told.append(f"{step:03}")

    async for _ in at_each_step(run_cancelled, work):
        assert database.checked_out == 0
    assert set(told) <= set(await database.names())


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


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_unit_of_work_whose_commit_is_cancelled_while_it_waits_for_a_statement_stops_that(
    db: DBConnect, database: Database
) -> None:
    async def write() -> None:
        async with new_db_ctx():
            session = await insert(db, "undone")
            statements.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(600)"))))
            await eventually(lambda: bool(database.backends("query ~ 'pg_sleep' AND state = 'active'")), "no query")
            statements.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(600)"))))
            await asyncio.sleep(0)
            waits.set()

    statements: list[asyncio.Task[object]] = []
    waits = asyncio.Event()
    writing = asyncio.create_task(write())
    await waits.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    with pytest.raises(StatementInterruptedError, match="was cancelled"):
        await statements[0]
    with pytest.raises(ContextClosedError):
        await statements[1]
    assert await database.names() == []


async def cancel_beside_a_call(db: DBConnect, call: Callable[[asyncio.Event], Awaitable[None]]) -> asyncio.Task[None]:
    """Cancel a unit of work, by a cancel scope, while its end waits for a call; return the task of that call."""

    async def work_beside() -> None:
        session = await db_session(db)
        await session.run_sync(lambda sync_session: await_only(call(begins)))

    begins = asyncio.Event()
    with anyio.CancelScope() as scope:
        async with new_db_ctx():
            await insert(db, "undone")
            beside = asyncio.create_task(work_beside())
            await begins.wait()
            # The end of the unit waits for the call by then.
            asyncio.get_running_loop().call_soon(scope.cancel)
    return beside


async def test_a_call_that_holds_out_against_its_first_interruption_is_told_why_it_was_stopped(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hold_out(begins: asyncio.Event) -> None:
        begins.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    monkeypatch.setattr("ctxdb_core._units.session_end.INTERRUPTION_SECONDS", 0.1)
    beside = await cancel_beside_a_call(db, hold_out)
    with pytest.raises(ContextClosedError):
        await beside
    assert beside.cancelling() == 0
    assert await database.names() == []


async def test_the_connection_of_a_call_that_outlasts_the_cancellation_of_its_unit_is_given_back_after_it(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hold_out(begins: asyncio.Event) -> None:
        begins.set()
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await released.wait()

    # The same proportion as in earnest, as the end of the unit has no more time than that.
    monkeypatch.setattr("ctxdb_core._units.session_end.INTERRUPTION_SECONDS", 0.2)
    monkeypatch.setattr("ctxdb_core._shield.GRACE_SECONDS", 0.25)
    released = asyncio.Event()
    beside = await cancel_beside_a_call(db, hold_out)
    assert database.checked_out == 1
    released.set()
    await asyncio.wait([beside])
    await eventually(lambda: not database.checked_out, "the connection is held")
    assert await database.names() == []


async def wait_for_lock(db: DBConnect) -> None:
    await (await db_session(db)).execute(text("SELECT pg_advisory_xact_lock(2)"))


async def write_in_block_beside_a_call(
    block: AbstractAsyncContextManager[object], db: DBConnect, database: Database, error: Exception | None = None
) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
    """Return a task that is at the end of a block, and the one whose call of the session it waits for."""

    async def write() -> None:
        async with block:
            await insert(db, "block")
            beside.append(asyncio.create_task(wait_for_lock(db)))
            await eventually(lambda: bool(database.backends("wait_event = 'advisory'")), "no call")
            ends.set()
            if error is not None:
                raise error

    beside: list[asyncio.Task[None]] = []
    ends = asyncio.Event()
    await database.query("SELECT pg_advisory_lock(2)")
    writing = asyncio.create_task(write())
    await ends.wait()
    await asyncio.sleep(0)
    return writing, beside[0]


@pytest.mark.parametrize("error", [None, LookupError()], ids=["success", "error"])
@pytest.mark.parametrize(
    "block",
    [
        savepoint,
        transaction,
        lambda db: atomic_db_session(db, "savepoint"),
        lambda db: transactional(db, "nested"),
        lambda db: TransactionContext(db).transaction(),
    ],
    ids=["savepoint", "transaction", "atomic-savepoint", "nested", "context"],
)
async def test_a_block_that_is_cancelled_while_its_end_waits_for_a_call_leaves_nothing_in_the_transaction_around_it(
    db: DBConnect,
    database: Database,
    block: Callable[[DBConnect], AbstractAsyncContextManager[object]],
    error: Exception | None,
) -> None:
    rows = []
    async with new_db_ctx():
        if block is not transaction:
            await insert(db, "around")
            rows.append("around")
        writing, beside = await write_in_block_beside_a_call(block(db), db, database, error)
        writing.cancel()
        await asyncio.sleep(0)
        await database.query("SELECT pg_advisory_unlock_all()")
        with pytest.raises(asyncio.CancelledError):
            await writing
        await beside
        await insert(db, "behind")
    assert await database.names() == [*rows, "behind"]


async def test_a_block_whose_end_waits_for_a_call_is_committed_after_it(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "around")
        writing, beside = await write_in_block_beside_a_call(savepoint(db), db, database)
        await database.query("SELECT pg_advisory_unlock_all()")
        await asyncio.gather(writing, beside)
    assert await database.names() == ["around", "block"]


async def test_a_transaction_is_not_committed_with_a_block_that_could_not_be_undone_in_time(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_end, "UNDO_SECONDS", 0.01)
    with pytest.raises(TransactionAbortedError, match="CancelledError left a block of this transaction"):
        async with new_db_ctx():
            await insert(db, "around")
            writing, beside = await write_in_block_beside_a_call(savepoint(db), db, database)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            assert not beside.done()
            await database.query("SELECT pg_advisory_unlock_all()")
            await beside
    assert await database.names() == []


@pytest.mark.parametrize("steps", range(6))
async def test_a_cancel_scope_ends_its_code_when_the_pool_gives_that_a_connection_in_the_same_moment(
    database: Database, steps: int
) -> None:
    scope = anyio.CancelScope()
    async with database.connect(pool_size=1, max_overflow=0) as db:

        async def read() -> None:
            with scope:
                async with new_db_ctx():
                    await (await db_session(db)).execute(text("SELECT 1"))

        def cancel_soon(*args: object) -> None:
            after_turns(steps)(scope.cancel)

        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))
            reading = asyncio.create_task(read())
            await eventually(
                lambda: any(pool.waiting for pool in db.status().pools), "the task waits for no connection"
            )
            event.listen((await db.engine()).sync_engine, "checkin", cancel_soon, once=True)
        await reading
    assert database.checked_out == 0


async def test_two_tasks_on_one_connection_that_are_cancelled_at_once_wait_for_no_time_limit(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core._sqlalchemy.cancelled_queries.STOP_QUERY_TIMEOUT_SECONDS", 3600)
    async with asyncio.timeout(60), new_non_ctx_session(db) as session:
        connection = await session.connection()
        tasks = [
            asyncio.create_task(connection.execute(text("SELECT pg_sleep(3600)"))),
            # SQLAlchemy lets it wait for the first statement.
            asyncio.create_task(connection.execute(text("SELECT 1"))),
        ]
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep' AND state = 'active'")), "no statement")
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True)
        )
        await session.invalidate()


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_connection_that_is_closed_while_its_query_is_being_stopped_is_not_listened_to_any_more(
    db: DBConnect,
) -> None:
    async with new_non_ctx_session(db) as session:
        raw = await (await session.connection()).get_raw_connection()
        assert raw.driver_connection is not None
        connection = raw.driver_connection
        number = connection.fileno()
        connection.pgconn.send_query(b"SELECT pg_sleep(600)")
        stopping = asyncio.create_task(_request_until_answered(connection))
        for _ in range(3):
            # The answer is waited for by then.
            await asyncio.sleep(0)
        await connection.close()
        # The next connection may get the number now.
        assert not asyncio.get_running_loop().remove_reader(number)
        with suppress(ExceptionGroup):
            await stopping
        await session.invalidate()
