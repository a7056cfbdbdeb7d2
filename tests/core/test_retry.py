"""`retry_on_conflict`: units of work that are run again, and those that are not."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest
import tenacity
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from tests.support.database import Database, eventually, insert

from ctxdb_core import (
    CtxDBError,
    DBConnect,
    DeadlineExceededError,
    TransactionContext,
    atomic_db_session,
    commit_db_session,
    db_session,
    gather_in_new_ctx,
    is_conflict,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    retry_on_conflict,
    rollback_db_session,
    run_in_new_ctx,
    transactional,
)
from ctxdb_core.adapters import is_context_initiated

POSTGRESQL = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)

NO_WAIT = 0


async def conflict(db: DBConnect, code: str = "40001") -> None:
    """Have the server report a conflict."""
    session = await db_session(db)
    await session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'as asked for' USING ERRCODE = '{code}'; END $$"))


async def skew(db: DBConnect, database: Database, name: str) -> None:
    """Write such that the server finds the conflict when the transaction is committed, and at no earlier time."""
    session = await db_session(db)
    count = await session.scalar(text("SELECT count(*) FROM item"))
    await insert(db, name)
    if count == 0:
        await database.query(
            "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM item; INSERT INTO item VALUES ('theirs'); COMMIT"
        )


# --- conflicts --------------------------------------------------------------------------------------------------------


@POSTGRESQL
async def test_a_concurrent_update_leads_to_another_attempt(db: DBConnect, database: Database) -> None:
    await database.query("INSERT INTO item VALUES ('one')")
    attempts = 0

    @retry_on_conflict(wait=NO_WAIT)
    async def extend() -> str:
        nonlocal attempts
        attempts += 1
        async with transactional(db, isolation_level="REPEATABLE READ") as session:
            name: str = await session.scalar(text("SELECT name FROM item"))
            if attempts == 1:
                await database.query("UPDATE item SET name = 'theirs'")
            await session.execute(text("UPDATE item SET name = :name"), {"name": f"{name}, ours"})
            return name

    assert await extend() == "theirs"
    assert await database.names() == ["theirs, ours"]
    assert not is_context_initiated()


@POSTGRESQL
async def test_a_conflict_at_the_commit_leads_to_another_attempt(db: DBConnect, database: Database) -> None:
    reached_the_end = 0

    @retry_on_conflict(wait=NO_WAIT)
    async def add() -> None:
        nonlocal reached_the_end
        async with transactional(db, isolation_level="SERIALIZABLE"):
            await skew(db, database, "ours")
        reached_the_end += 1

    await add()
    assert reached_the_end == 2
    assert await database.names() == ["ours", "theirs"]


@POSTGRESQL
async def test_a_deadlock_leads_to_another_attempt(db: DBConnect, second_db: DBConnect, database: Database) -> None:
    await database.query("INSERT INTO item VALUES ('a'), ('b')")
    b_is_locked, a_is_locked = asyncio.Event(), asyncio.Event()
    lock = text("SELECT name FROM item WHERE name = :name FOR UPDATE")
    attempts = 0

    async def others() -> None:
        async with new_non_ctx_atomic_session(second_db) as session:
            # The victim is the transaction whose server process looks for a deadlock first.
            await session.execute(text("SET LOCAL deadlock_timeout = '10min'"))
            await session.execute(lock, {"name": "b"})
            b_is_locked.set()
            await a_is_locked.wait()
            await session.execute(lock, {"name": "a"})

    @retry_on_conflict(wait=NO_WAIT)
    async def ours() -> None:
        nonlocal attempts
        attempts += 1
        session = await db_session(db)
        await session.execute(text("SET LOCAL deadlock_timeout = '1ms'"))
        await session.execute(lock, {"name": "a"})
        a_is_locked.set()
        if attempts == 1:
            await eventually(
                lambda: bool(database.backends("wait_event_type = 'Lock'")), "no transaction waits for the row a"
            )
        await session.execute(lock, {"name": "b"})
        await insert(db, "c")

    task = asyncio.create_task(others())
    await b_is_locked.wait()
    await ours()
    await task
    # There may be more than two attempts: one may lock the row before the other transaction, which waits for the row.
    assert attempts > 1
    assert await database.names() == ["a", "b", "c"]


@SQLITE
async def test_a_locked_file_leads_to_another_attempt(database: Database) -> None:
    attempts = 0
    # SQLite fails at once where it would otherwise wait for the lock.
    db = DBConnect(lambda host: database.watch_new(connect_args={"timeout": 0}), host="a")
    with closing(sqlite3.connect(make_url(database.url).database or "", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        @retry_on_conflict(wait=NO_WAIT)
        async def add() -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 2:
                other.execute("COMMIT")
            await insert(db, "one")

        async with db:
            await add()
    assert attempts == 2
    assert await database.names() == ["one"]


@pytest.mark.parametrize("code", ["40001", "40P01", "23505"])
@POSTGRESQL
async def test_conflicts_are_told_from_other_errors(db: DBConnect, code: str) -> None:
    attempts = 0

    @retry_on_conflict(attempts=3, wait=NO_WAIT)
    async def fail() -> None:
        nonlocal attempts
        attempts += 1
        await conflict(db, code)

    with pytest.raises(DBAPIError) as caught:
        await fail()
    assert is_conflict(caught.value) == (code != "23505")
    assert attempts == (1 if code == "23505" else 3)


async def test_a_conflict_is_found_behind_the_errors_that_were_raised_from_it(db: DBConnect) -> None:
    with pytest.raises(LookupError) as translated:
        async with new_db_ctx():
            try:
                await conflict(db)
            except DBAPIError as exc:
                raise LookupError from exc
    with pytest.raises(LookupError) as cut_off:
        async with new_db_ctx():
            try:
                await conflict(db)
            except DBAPIError:
                raise LookupError from None
    with pytest.raises(ExceptionGroup) as group:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run_in_new_ctx(conflict, db))
    assert is_conflict(translated.value)
    assert is_conflict(group.value)
    assert not is_conflict(cut_off.value)


# --- attempts ---------------------------------------------------------------------------------------------------------


async def test_each_attempt_has_a_unit_of_work_of_its_own(db: DBConnect, database: Database) -> None:
    sessions = []
    seen: list[str] = []

    @retry_on_conflict(wait=NO_WAIT)
    async def add(name: str, *, suffix: str) -> str:
        sessions.append(await insert(db, name + suffix))
        on_commit(db, lambda: seen.append(name))
        if len(sessions) < 3:
            await conflict(db)
        return name

    async with new_db_ctx():
        outer = await insert(db, "outer")
        assert await add("one", suffix="!") == "one"
        assert await db_session(db) is outer
        assert await database.names() == ["one!"]
        await rollback_db_session(db)
    assert len({*map(id, sessions), id(outer)}) == 4
    assert seen == ["one"]
    assert await database.names() == ["one!"]


async def test_the_last_attempts_error_surfaces_and_says_that_it_was_the_last(db: DBConnect) -> None:
    @retry_on_conflict(attempts=2, wait=NO_WAIT)
    async def fail() -> None:
        await conflict(db)

    with pytest.raises(DBAPIError) as caught:
        await fail()
    assert any("attempt 2, and the last" in note for note in caught.value.__notes__)


async def test_tenacitys_own_types_decide_when_and_how_often(db: DBConnect) -> None:
    waited: list[int] = []

    def wait(state: tenacity.RetryCallState) -> float:
        waited.append(state.attempt_number)
        return 0

    attempts = 0

    @retry_on_conflict(attempts=tenacity.stop_after_attempt(4), wait=wait)
    async def fail() -> None:
        nonlocal attempts
        attempts += 1
        await conflict(db)

    with pytest.raises(DBAPIError):
        await fail()
    assert attempts == 4
    assert waited[:3] == [1, 2, 3]


async def test_a_further_attempt_is_logged(db: DBConnect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ctxdb")

    @retry_on_conflict(attempts=2, wait=NO_WAIT)
    async def fail() -> None:
        await conflict(db)

    with pytest.raises(DBAPIError):
        await fail()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "Attempt 1" in caplog.text


async def test_a_deadline_holds_for_all_attempts(db: DBConnect) -> None:
    attempts = 0

    @retry_on_conflict(attempts=1000, wait=NO_WAIT)
    async def fail() -> None:
        nonlocal attempts
        attempts += 1
        await conflict(db)

    await run_in_new_ctx(insert, db, "so that there is a connection")
    with pytest.raises(DeadlineExceededError):
        async with new_db_ctx(deadline=asyncio.get_running_loop().time() + 0.3):
            await fail()
    assert attempts > 1


async def test_a_method_is_run_again_and_keeps_its_signature(db: DBConnect) -> None:
    class Items:
        attempts = 0

        @retry_on_conflict(wait=NO_WAIT)
        async def add(self, name: str) -> int:
            """Add it."""
            self.attempts += 1
            if self.attempts == 1:
                await conflict(db)
            return self.attempts

    assert await Items().add("one") == 2
    assert list(inspect.signature(Items.add).parameters) == ["self", "name"]
    assert Items.add.__doc__ == "Add it."


# --- what is not run again --------------------------------------------------------------------------------------------


async def early_commit(db: DBConnect) -> None:
    await insert(db, "early")
    await commit_db_session(db)


async def early_commit_of_the_session(db: DBConnect) -> None:
    await (await insert(db, "early")).commit()


async def atomic_block(db: DBConnect) -> None:
    async with atomic_db_session(db):
        await insert(db, "early")


async def unit_of_its_own(db: DBConnect) -> None:
    await run_in_new_ctx(insert, db, "early")


async def concurrent_units(db: DBConnect) -> None:
    await gather_in_new_ctx(lambda: insert(db, "early"))


async def new_transaction(db: DBConnect) -> None:
    async with transactional(db, "requires_new"):
        await insert(db, "early")


async def no_transaction(db: DBConnect) -> None:
    async with transactional(db, "not_supported"):
        await insert(db, "early")


async def session_outside(db: DBConnect) -> None:
    async with new_non_ctx_atomic_session(db) as session:
        await session.execute(text("INSERT INTO item VALUES ('early')"))


async def session_of_the_databases_session_maker(db: DBConnect) -> None:
    async with (await db.session_maker()).begin() as session:
        await session.execute(text("INSERT INTO item VALUES ('early')"))


async def connection_of_the_engine(db: DBConnect) -> None:
    async with (await db.engine()).begin() as connection:
        await connection.execute(text("INSERT INTO item VALUES ('early')"))


async def connection_without_a_transaction(db: DBConnect) -> None:
    async with (await db.engine()).connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("INSERT INTO item VALUES ('early')"))


async def engine_of_its_own(db: DBConnect) -> None:
    engine = create_async_engine((await db.engine()).url)
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO item VALUES ('early')"))
    await engine.dispose()


async def attempt_inside(db: DBConnect) -> None:
    await retry_on_conflict()(insert)(db, "early")


@pytest.mark.parametrize(
    "commit",
    [
        early_commit,
        early_commit_of_the_session,
        atomic_block,
        unit_of_its_own,
        concurrent_units,
        new_transaction,
        no_transaction,
        session_outside,
        session_of_the_databases_session_maker,
        connection_of_the_engine,
        connection_without_a_transaction,
        engine_of_its_own,
        attempt_inside,
    ],
)
async def test_attempt_with_a_commit_is_not_run_again(
    db: DBConnect, database: Database, commit: Callable[[DBConnect], Awaitable[None]]
) -> None:
    @retry_on_conflict(wait=NO_WAIT)
    async def work() -> None:
        await commit(db)
        await conflict(db)

    # A second attempt would fail by a duplicate.
    with pytest.raises(DBAPIError, match="as asked for") as caught:
        await work()
    assert any("had committed something on " in note for note in caught.value.__notes__)
    assert await database.names() == ["early"]


async def context_of_an_engine(db: DBConnect) -> None:
    async with TransactionContext(await db.engine()).new_transaction() as session:
        await session.execute(text("INSERT INTO item VALUES ('early')"))


async def unit_with_a_session_of_an_engine(db: DBConnect) -> None:
    context = TransactionContext(await db.engine())
    async with new_db_ctx():
        await context.get_session().execute(text("INSERT INTO item VALUES ('early')"))


async def session_maker(db: DBConnect) -> None:
    context = TransactionContext(db, default_session_maker=async_sessionmaker())
    async with context.new_transaction() as session:
        await session.execute(text("INSERT INTO item VALUES ('early')"))


async def bound_session_maker(db: DBConnect) -> None:
    context = TransactionContext(db, default_session_maker=async_sessionmaker(await db.engine()))
    async with context.new_transaction() as session:
        await session.execute(text("INSERT INTO item VALUES ('early')"))


async def unit_with_a_session_of_a_session_maker(db: DBConnect) -> None:
    context = TransactionContext(db, default_session_maker=async_sessionmaker())
    async with new_db_ctx():
        await context.get_session().execute(text("INSERT INTO item VALUES ('early')"))


@pytest.mark.parametrize(
    "commit",
    [
        context_of_an_engine,
        unit_with_a_session_of_an_engine,
        session_maker,
        bound_session_maker,
        unit_with_a_session_of_a_session_maker,
    ],
)
async def test_attempt_with_a_commit_by_a_transaction_context_is_not_run_again(
    db: DBConnect, database: Database, commit: Callable[[DBConnect], Awaitable[None]]
) -> None:
    @retry_on_conflict(wait=NO_WAIT)
    async def work() -> None:
        await commit(db)
        await conflict(db)

    # A second attempt would fail by a duplicate.
    with pytest.raises(DBAPIError, match="as asked for") as caught:
        await work()
    assert any("had committed something on " in note for note in caught.value.__notes__)
    assert await database.names() == ["early"]


async def test_attempt_with_a_commit_on_another_database_is_not_run_again(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    @retry_on_conflict(wait=NO_WAIT)
    async def work() -> None:
        await (await db_session(db)).execute(text("INSERT INTO parent VALUES ('first')"))
        async with transactional(second_db, isolation_level="SERIALIZABLE"):
            await skew(second_db, database, "second")

    with pytest.raises(DBAPIError) as caught:
        await work()
    assert is_conflict(caught.value)
    assert any("not run again, as this attempt had committed" in note for note in caught.value.__notes__)
    assert await database.names("parent") == ["first"]


async def test_an_attempt_that_commits_a_session_which_was_passed_in_is_not_run_again(
    db: DBConnect, database: Database
) -> None:
    @retry_on_conflict(wait=NO_WAIT)
    async def work(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO item VALUES ('early')"))
        await session.commit()
        await conflict(db)

    async with new_non_ctx_session(db) as session:
        with pytest.raises(DBAPIError, match="as asked for"):
            await work(session)
    assert await database.names() == ["early"]


async def test_a_commit_that_is_refused_does_not_count_for_the_attempt_around_it(
    db: DBConnect, database: Database
) -> None:
    attempts = 0

    @retry_on_conflict(wait=NO_WAIT)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            with pytest.raises(IntegrityError):
                async with (await db.engine()).begin() as connection:
                    await connection.execute(text("INSERT INTO child VALUES ('nobody')"))
            await conflict(db)

    await work()
    assert attempts == 2
    assert await database.names("child", "parent") == []


async def test_rolled_back_or_read_only_transactions_allow_another_attempt(db: DBConnect, database: Database) -> None:
    attempts = 0
    async with DBConnect.from_url(database.url, read_only=True) as replica:

        @retry_on_conflict(wait=NO_WAIT)
        async def work() -> None:
            nonlocal attempts
            attempts += 1
            await (await db_session(replica)).execute(text("SELECT 1"))
            async with atomic_db_session(db, read_only=True) as session:
                await session.execute(text("SELECT 1"))
            await insert(db, "undone")
            await rollback_db_session(db)
            session = await insert(db, "one")
            async with session.begin_nested():
                await insert(db, "two")
            if attempts == 1:
                await conflict(db)

        await work()
    assert attempts == 2
    assert await database.names() == ["one", "two"]


async def test_a_cancelled_attempt_is_the_last(db: DBConnect) -> None:
    attempts = 0
    met = asyncio.Event()

    @retry_on_conflict(wait=NO_WAIT)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        try:
            await conflict(db)
        except DBAPIError:
            met.set()
            # A cancellation that is raised here has the conflict as its ``__context__``.
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await met.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert attempts == 1


async def test_a_conflict_at_a_commit_that_outlived_its_tasks_cancellation_is_the_last(
    db: DBConnect, database: Database
) -> None:
    attempts = 0

    @retry_on_conflict(wait=NO_WAIT)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        async with transactional(db, isolation_level="SERIALIZABLE"):
            await skew(db, database, "ours")
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)

    with pytest.raises(DBAPIError) as caught:
        await asyncio.create_task(work())
    assert attempts == 1
    assert any("cancelled" in note for note in caught.value.__notes__)
    assert await database.names() == ["theirs"]


async def test_a_task_that_is_cancelled_while_it_waits_makes_no_further_attempt(db: DBConnect) -> None:
    attempts = 0

    @retry_on_conflict(wait=tenacity.wait_fixed(60))
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        await conflict(db)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await work()
    assert attempts == 1


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_without_tenacity_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(ImportError, match=r"ctxdb-core\[retry\]") as caught:
        retry_on_conflict()
    assert isinstance(caught.value, CtxDBError)


async def test_a_retry_needs_no_parentheses(db: DBConnect, database: Database) -> None:
    @retry_on_conflict
    async def write(name: str) -> str:
        await insert(db, name)
        return name

    assert await write("a") == "a"
    assert await database.names() == ["a"]


def test_wrong_arguments_of_a_retry_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="attempts=0"):
        retry_on_conflict(attempts=0)
    with pytest.raises(ValueError, match="wait=-1"):
        retry_on_conflict(wait=-1)
    with pytest.raises(CtxDBError, match="`attempts`"):
        retry_on_conflict(attempts="3")  # type: ignore[call-overload]  # the mistake
    with pytest.raises(CtxDBError, match="`wait`"):
        retry_on_conflict(wait="1")  # type: ignore[call-overload]  # the mistake
    with pytest.raises(TypeError, match="no async function"):
        retry_on_conflict()(lambda: asyncio.sleep(0))
