"""`TransactionContext`: blocks of sessions and transactions, alone, in a unit of work, and in several tasks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, assert_type

import pytest
from sqlalchemy import ForeignKey, insert, select, text, union_all, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, joinedload, mapped_column, relationship
from sqlalchemy.pool import AsyncAdaptedQueuePool
from tests.support.database import Database, Item, eventually, insert_row_that_fails_at_commit
from tests.support.database import insert as insert_item
from tests.support.late import after_its_unit

from ctxdb_core import (
    ContextClosedError,
    ContextNotInitiatedError,
    CtxDBError,
    DBConnect,
    DeadlineExceededError,
    NoSessionError,
    SessionAlreadyActiveError,
    TransactionAlreadyActiveError,
    TransactionContext,
    TransactionRequiredError,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    on_commit,
    retry_on_conflict,
    rollback_db_session,
    run_in_new_ctx,
    set_statement_timeout,
    transactional,
)
from ctxdb_core._units.lifecycle import begin
from ctxdb_core.adapters import is_context_initiated
from ctxdb_core.events import SessionClosed, SessionOpened, TransactionBegun, TransactionCommitted
from ctxdb_core.testing import set_test_context

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parent"
    name: Mapped[str] = mapped_column(primary_key=True)
    children: Mapped[list[Child]] = relationship(back_populates="parent_object")


class Child(Base):
    __tablename__ = "child"
    parent: Mapped[str] = mapped_column(ForeignKey(Parent.name), primary_key=True)
    parent_object: Mapped[Parent] = relationship(back_populates="children")


class OwnSession(AsyncSession):
    pass


@pytest.fixture
def context(db: DBConnect) -> TransactionContext:
    return TransactionContext(db)


@pytest.fixture
def auto(db: DBConnect) -> TransactionContext:
    return TransactionContext(db, auto_context_on_execute=True)


@pytest.fixture
async def engine(database: Database) -> AsyncIterator[AsyncEngine]:
    engine = database.watch_new()
    yield engine
    await database.assert_quiet()
    await engine.dispose()


def add(name: str) -> Any:
    return insert(Item).values(name=name)


# --- blocks of their own ----------------------------------------------------------------------------------------------


@KINDS
async def test_a_transaction_is_committed_at_its_end(context: TransactionContext, database: Database) -> None:
    async with context.transaction() as session:
        await context.execute(add("one"))
        assert context.get_session() is session
        assert await database.names() == []
    assert await database.names() == ["one"]


@KINDS
async def test_an_exception_rolls_a_transaction_back(context: TransactionContext, database: Database) -> None:
    with pytest.raises(LookupError):
        async with context.transaction():
            await context.execute(add("one"))
            raise LookupError
    assert await database.names() == []


async def test_a_transaction_has_begun_before_its_first_statement(
    context: TransactionContext, database: Database
) -> None:
    async with context.transaction() as session:
        assert session.in_transaction()
        assert not session.in_nested_transaction()
    async with context.session(), context.transaction() as session:
        assert session.in_transaction()
        with pytest.raises(TransactionAlreadyActiveError):
            async with context.transaction(allow_nested_transactions=False):
                pytest.fail("the block was entered")
    assert database.checkouts == 0
    async with new_db_ctx(), context.transaction() as session:
        assert session.in_nested_transaction()
        with pytest.raises(TransactionAlreadyActiveError):
            async with context.transaction(allow_nested_transactions=False):
                pytest.fail("the block was entered")


@KINDS
async def test_a_session_commits_nothing_by_itself(context: TransactionContext, database: Database) -> None:
    async with context.session() as session:
        assert not session.in_transaction()
        await context.execute(add("kept"))
        await session.commit()
        await context.execute(add("left"))
    assert await database.names() == ["kept"]


async def test_a_transaction_in_a_session_is_committed(context: TransactionContext, database: Database) -> None:
    async with context.session() as session:
        async with context.transaction() as same:
            assert same is session
            await context.execute(add("one"))
        assert await database.names() == ["one"]
        assert not session.in_transaction()


async def test_a_transaction_after_a_query_of_its_session_is_committed(
    context: TransactionContext, database: Database
) -> None:
    """The query has begun a transaction, which nobody but the block can commit."""
    async with context.session():
        await context.execute(select(Item))
        async with context.transaction():
            async with context.transaction():
                await context.execute(add("one"))
            assert await database.names() == []
        assert await database.names() == ["one"]


async def test_earlier_writes_of_a_session_survive_a_failing_transaction_in_it(
    context: TransactionContext, database: Database
) -> None:
    async with context.session() as session:
        await context.execute(add("before"))
        with pytest.raises(LookupError):
            async with context.transaction():
                await context.execute(add("undone"))
                raise LookupError
        await session.commit()
    assert await database.names() == ["before"]


async def test_a_transaction_begun_by_hand_is_committed_by_hand(
    context: TransactionContext, database: Database
) -> None:
    async with context.session() as session, session.begin():
        async with context.transaction():
            await context.execute(add("one"))
        assert await database.names() == []
    assert await database.names() == ["one"]


async def test_a_transaction_behind_a_savepoint_of_the_session_leaves_the_commit_to_the_code_that_set_the_savepoint(
    context: TransactionContext, database: Database
) -> None:
    async with context.session() as session:
        await context.execute(add("one"))
        async with session.begin_nested():
            async with context.transaction():
                await context.execute(add("two"))
            await context.execute(add("three"))
        assert await database.names() == []
        await session.commit()
    assert await database.names() == ["one", "three", "two"]


async def test_a_transaction_leaves_the_commit_to_the_atomic_block_around_it_also_before_its_first_statement(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    async with context.session():
        with pytest.raises(LookupError):
            async with atomic_db_session(db):
                async with context.transaction():
                    await context.execute(add("undone"))
                assert await database.names() == []
                raise LookupError
        async with atomic_db_session(db), context.transaction():
            await context.execute(add("one"))
    assert await database.names() == ["one"]


@KINDS
async def test_a_nested_transaction_is_undone_alone(context: TransactionContext, database: Database) -> None:
    async with context.transaction():
        await context.execute(add("outer"))
        with pytest.raises(LookupError):
            async with context.transaction() as session:
                assert session.in_nested_transaction()
                await context.execute(add("inner"))
                raise LookupError
        await context.execute(add("later"))
    assert await database.names() == ["later", "outer"]


async def test_a_new_transaction_stands_whatever_becomes_of_the_transaction_around_it(
    context: TransactionContext, database: Database
) -> None:
    with pytest.raises(LookupError):
        async with context.transaction() as outer:
            await context.execute(add("outer"))
            async with context.new_transaction() as inner:
                assert inner is not outer
                await context.execute(add("inner"))
                assert await db_session(context._db) is inner
            assert context.get_session() is outer
            raise LookupError
    assert await database.names() == ["inner"]


async def test_a_new_session_commits_nothing_by_itself(context: TransactionContext, database: Database) -> None:
    async with context.transaction() as outer:
        async with context.new_session() as inner:
            assert inner is not outer
            await context.execute(add("left"))
        await context.execute(add("outer"))
    assert await database.names() == ["outer"]


async def test_a_block_can_decorate_a_function(context: TransactionContext, database: Database) -> None:
    @context.transaction()
    async def work(name: str) -> None:
        await context.execute(add(name))

    await work("one")
    await work("two")
    assert await database.names() == ["one", "two"]


async def test_early_ends_inside_a_transaction_keep_the_rest_whole(
    context: TransactionContext, database: Database
) -> None:
    with pytest.raises(LookupError):
        async with context.transaction() as session:
            await context.execute(add("early"))
            await session.commit()
            await context.execute(add("late"))
            async with context.transaction():
                await context.execute(add("nested"))
            raise LookupError
    assert await database.names() == ["early"]


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_without_a_block_there_is_no_session(context: TransactionContext) -> None:
    with pytest.raises(NoSessionError, match=r"context\.transaction"):
        context.get_session()
    with pytest.raises(NoSessionError):
        await context.execute(select(Item))
    assert context.get_session(strict=False) is None


async def test_objects_stay_readable_after_the_block_that_read_them(
    context: TransactionContext, database: Database
) -> None:
    await database.query("INSERT INTO item VALUES ('one')")
    for block in (context.session(), context.new_session(), context.transaction(), context.new_transaction()):
        async with block:
            item = (await context.execute(select(Item))).scalar_one()
        assert item.name == "one"


async def test_after_a_block_there_is_no_session(context: TransactionContext) -> None:
    async with context.session():
        pass
    assert context.get_session(strict=False) is None
    with pytest.raises(NoSessionError):
        context.get_session()


@pytest.mark.parametrize("outer", ["session", "transaction", "new_session", "new_transaction"])
async def test_a_session_in_a_block_must_say_that_it_is_shared(context: TransactionContext, outer: str) -> None:
    async with getattr(context, outer)() as session:
        with pytest.raises(SessionAlreadyActiveError, match="new_session"):
            async with context.session():
                pytest.fail("the block was entered")
        with pytest.raises(SessionAlreadyActiveError):
            async with context.transaction(reuse_if_exists=False):
                pytest.fail("the block was entered")
        async with context.session(reuse_if_exists=True) as same:
            assert same is session
        assert context.get_session() is session


async def test_a_transaction_may_refuse_to_be_nested(context: TransactionContext, database: Database) -> None:
    async with context.transaction():
        await context.execute(add("one"))
        with pytest.raises(TransactionAlreadyActiveError, match="new_transaction"):
            async with context.transaction(allow_nested_transactions=False):
                pytest.fail("the block was entered")
    assert await database.names() == ["one"]


def test_something_else_than_an_engine_is_refused() -> None:
    with pytest.raises(TypeError, match="str is given"):
        TransactionContext("sqlite+aiosqlite://")  # type: ignore[call-overload]  # what is tested


def test_every_error_of_a_transaction_context_is_a_ctxdb_error() -> None:
    for error in (NoSessionError, SessionAlreadyActiveError, TransactionAlreadyActiveError):
        assert issubclass(error, CtxDBError)


async def test_a_session_that_was_kept_refuses_to_begin_anew(context: TransactionContext, database: Database) -> None:
    kept = []
    for block in (context.session(), context.transaction(), context.new_session()):
        async with block as session:
            await session.execute(select(Item))
        kept.append(session)
    for session in kept:
        with pytest.raises(ContextClosedError):
            await session.execute(add("late"))
    assert await database.names() == []


@KINDS
async def test_a_failing_commit_surfaces_and_leaves_nothing(context: TransactionContext, database: Database) -> None:
    with pytest.raises(IntegrityError):
        async with context.transaction() as session:
            await context.execute(add("one"))
            await session.execute(text("INSERT INTO child VALUES ('nobody')"))
    assert await database.names() == []
    assert context.get_session(strict=False) is None


async def test_a_cancelled_commit_is_seen_through(context: TransactionContext, database: Database) -> None:
    async def work() -> None:
        async with context.transaction():
            await context.execute(add("one"))

    with database.held_commits():
        task = asyncio.create_task(work())
        await database.commit_is_held()
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await database.names() == ["one"]


@KINDS
async def test_a_cancelled_statement_is_undone(context: TransactionContext, database: Database) -> None:
    written = asyncio.Event()

    async def work() -> None:
        async with context.transaction():
            await context.execute(add("one"))
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await database.names() == []


# --- in a unit of work ------------------------------------------------------------------------------------------------


async def test_a_unit_of_work_shares_its_session(context: TransactionContext, db: DBConnect) -> None:
    async with new_db_ctx():
        assert context.get_session() is await db_session(db)
        async with context.session() as session:
            assert session is await db_session(db)
        async with context.transaction() as session:
            assert session is await db_session(db)
        assert context.get_session(strict=False) is session


async def test_statements_outside_of_a_transaction_belong_to_the_unit(
    auto: TransactionContext, db: DBConnect, database: Database
) -> None:
    """So do statements that would get a session of their own outside of a unit of work."""
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await auto.execute(add("one"), force_transaction=True)
            async with auto.session():
                await auto.execute(add("two"))
            raise LookupError
    assert await database.names() == []


async def test_a_units_open_transaction_is_not_committed_early(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert_item(db, "unit")
        async with context.transaction():
            await context.execute(add("block"))
        assert await database.names() == []
        with pytest.raises(LookupError):
            async with context.transaction():
                await context.execute(add("undone"))
                raise LookupError
    assert await database.names() == ["block", "unit"]


def in_a_transactional_block(db: DBConnect) -> AbstractAsyncContextManager[object]:
    return transactional(db)


@asynccontextmanager
async def in_an_atomic_block(db: DBConnect) -> AsyncIterator[None]:
    async with new_db_ctx(), atomic_db_session(db):
        yield


def in_a_unit(db: DBConnect) -> AbstractAsyncContextManager[None]:
    return new_db_ctx()


@KINDS
@pytest.mark.parametrize("around", [in_a_unit, in_a_transactional_block, in_an_atomic_block])
async def test_a_unit_is_not_committed_by_a_block_in_it_that_comes_before_its_first_statement(
    context: TransactionContext,
    db: DBConnect,
    database: Database,
    around: Callable[[DBConnect], AbstractAsyncContextManager[object]],
) -> None:
    with pytest.raises(LookupError):
        async with around(db):
            async with context.transaction():
                await context.execute(add("block"))
            await insert_item(db, "unit")
            raise LookupError
    assert await database.names() == []
    async with around(db):
        async with context.transaction():
            await context.execute(add("block"))
        with pytest.raises(LookupError):
            async with context.transaction():
                await context.execute(add("undone"))
                raise LookupError
        if database.is_postgresql:
            assert await database.names() == []
    assert await database.names() == ["block"]


async def test_a_repeated_unit_is_not_committed_by_a_block_in_it(
    context: TransactionContext, database: Database
) -> None:
    attempts = 0

    @retry_on_conflict(wait=0)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        async with context.transaction():
            await context.execute(add("one"))
        if attempts == 1:
            await context.execute(text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))

    await work()
    assert attempts == 2
    assert await database.names() == ["one"]


async def test_a_transaction_inside_of_a_block_without_transactions_is_refused(
    context: TransactionContext, db: DBConnect
) -> None:
    async with transactional(db, "not_supported"):
        with pytest.raises(TransactionRequiredError):
            async with context.transaction():
                pytest.fail("the block was entered")
        async with context.new_transaction():
            await context.execute(add("one"))


async def test_a_new_transaction_in_a_unit_is_independent_of_it(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await insert_item(db, "unit")
            async with context.new_transaction():
                await insert_item(db, "own")
            raise LookupError
    assert await database.names() == ["own"]


@pytest.mark.parametrize("block", ["new_session", "new_transaction"])
async def test_a_units_deadline_holds_for_the_blocks_that_it_waits_for(context: TransactionContext, block: str) -> None:
    async with new_db_ctx(), context.session():
        await set_statement_timeout(deadline=asyncio.get_running_loop().time() - 1)
        async with getattr(context, block)():
            with pytest.raises(DeadlineExceededError):
                await context.execute(select(Item))


@pytest.mark.parametrize("target", ["database", "engine", "session maker"])
async def test_sessions_tell_of_their_transactions(db: DBConnect, target: str) -> None:
    heard: list[tuple[type, str]] = []
    maker = async_sessionmaker() if target == "session maker" else None
    context = TransactionContext(await db.engine() if target == "engine" else db, default_session_maker=maker)
    context._db.on_event(lambda event: heard.append((type(event), event.host)))
    async with context.transaction():
        await context.execute(add("one"))
    assert heard == [
        (kind, "127.0.0.1") for kind in (SessionOpened, TransactionBegun, TransactionCommitted, SessionClosed)
    ]


async def test_a_tests_unit_on_another_thread_is_an_error(context: TransactionContext, database: Database) -> None:
    """What is written past the unit of the test would stay when the test has ended."""

    async def work() -> None:
        with pytest.raises(ContextNotInitiatedError, match="shared_transaction"):
            context.get_session(strict=False)
        for block in (context.session(), context.transaction()):
            with pytest.raises(ContextNotInitiatedError, match="shared_transaction"):
                await block.__aenter__()
        with pytest.raises(ContextNotInitiatedError, match="shared_transaction"):
            begin({})

    async with set_test_context():
        await asyncio.to_thread(lambda: asyncio.run(work()))
    assert await database.names() == []


async def test_blocks_in_a_unit_must_say_that_they_are_nested(context: TransactionContext) -> None:
    async with new_db_ctx():
        async with context.session():
            with pytest.raises(SessionAlreadyActiveError):
                async with context.session():
                    pytest.fail("the block was entered")
        async with context.session():
            pass


async def test_a_block_in_an_atomic_block_of_a_unit_need_not_say_that_it_shares_the_session(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    async with new_db_ctx(), atomic_db_session(db) as session, context.session() as shared:
        assert shared is session
        await insert_item(db, "one")
    assert await database.names() == ["one"]


async def test_tasks_of_a_unit_share_its_session(context: TransactionContext, db: DBConnect) -> None:
    async def ask() -> AsyncSession:
        async with context.session() as session:
            return session

    async with new_db_ctx(), context.session() as session:
        assert await asyncio.gather(ask(), ask()) == [session] * 2  # type: ignore[comparison-overlap]  # a list


@pytest.mark.parametrize("block", ["session", "transaction"])
async def test_blocks_of_two_tasks_do_not_share_the_session_of_a_unit(
    context: TransactionContext, db: DBConnect, database: Database, block: str
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with getattr(context, block)():
            entered.set()
            await leave.wait()
            await insert_item(db, "first")

    async def second() -> None:
        await entered.wait()
        try:
            async with getattr(context, block)(reuse_if_exists=True):
                await insert_item(db, "second")
        finally:
            leave.set()

    async with new_db_ctx():
        results = await asyncio.gather(first(), second(), return_exceptions=True)
        assert [type(result) for result in results] == [type(None), SessionAlreadyActiveError]
        assert "Another task" in str(results[1])
        # The second task may have its block when that of the first has ended.
        await asyncio.create_task(second())
    assert await database.names() == ["first", "second"]


async def test_a_task_that_a_block_in_a_unit_waits_for_takes_part_in_it(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    async def part() -> None:
        async with context.transaction():
            await insert_item(db, "part")

    async with new_db_ctx():
        with pytest.raises(LookupError):
            async with context.transaction():
                await asyncio.create_task(part())
                raise LookupError
        async with context.transaction():
            await insert_item(db, "whole")
    assert await database.names() == ["whole"]


async def test_a_block_that_another_task_has_entered_for_the_unit_is_shared(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    stack = AsyncExitStack()
    async with new_db_ctx():
        # As a framework does with dependencies.
        await asyncio.create_task(_enter(stack, context))
        async with context.transaction():
            await insert_item(db, "one")
        await asyncio.create_task(stack.aclose())
    assert await database.names() == ["one"]


async def _enter(stack: AsyncExitStack, context: TransactionContext) -> None:
    await stack.enter_async_context(context.transaction())


@pytest.mark.parametrize("block", ["transaction", "new_transaction"])
async def test_a_transaction_that_finds_a_unit_which_has_ended_is_its_own(
    context: TransactionContext, db: DBConnect, database: Database, block: str
) -> None:
    async def late() -> None:
        with pytest.raises(LookupError):
            async with getattr(context, block)():
                await context.execute(add("undone"))
                raise LookupError
        async with getattr(context, block)() as session:
            assert await insert_item(db, "own") is session
            assert await database.names() == []
        # After the blocks, no unit of work is open again.
        with pytest.raises(ContextClosedError):
            await db_session(db)

    await after_its_unit(late)
    assert await database.names() == ["own"]


async def test_a_session_that_finds_a_unit_which_has_ended_is_its_own(
    context: TransactionContext, database: Database
) -> None:
    async def late() -> None:
        async with context.session() as session:
            await context.execute(add("own"))
            await session.commit()
            await context.execute(add("left"))

    await after_its_unit(late)
    assert await database.names() == ["own"]


async def test_a_statement_that_finds_a_unit_which_has_ended_gets_a_session_of_its_own_where_that_is_asked_for(
    context: TransactionContext, auto: TransactionContext, database: Database
) -> None:
    async def late() -> None:
        await auto.execute(add("own"))
        with pytest.raises(ContextClosedError, match="run_in_new_ctx"):
            await context.execute(select(Item))
        with pytest.raises(ContextClosedError):
            context.get_session()
        assert context.get_session(strict=False) is None

    await after_its_unit(late)
    assert await database.names() == ["own"]


@pytest.mark.parametrize("inner", ["transaction", "session"])
async def test_half_of_a_transaction_is_not_committed_when_its_unit_has_ended_in_the_middle(
    context: TransactionContext, database: Database, inner: str
) -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with context.transaction():
            await context.execute(add("first half"))
            entered.set()
            await ended.wait()
            async with getattr(context, inner)(reuse_if_exists=True):
                await context.execute(add("second half"))

    with pytest.raises(KeyError):
        async with new_db_ctx():
            task = asyncio.create_task(work())
            await entered.wait()
            raise KeyError
    ended.set()
    with pytest.raises(ContextClosedError):
        await task
    assert await database.names() == []


async def test_functions_that_ask_for_the_session_take_part_in_a_block(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    told: list[str] = []
    async with context.transaction() as session:
        assert is_context_initiated()
        assert await insert_item(db, "one") is session
        on_commit(db, lambda: told.append("committed"))
        async with atomic_db_session(db, current_transaction="savepoint"):
            await insert_item(db, "two")
        assert not told
    assert told == ["committed"]
    async with context.session():
        await insert_item(db, "three")
        await commit_db_session(db)
        await insert_item(db, "four")
        await rollback_db_session(db)
    assert await database.names() == ["one", "three", "two"]
    assert not is_context_initiated()


async def test_a_handler_that_must_be_awaited_comes_before_the_session(database: Database) -> None:
    async def look_up_the_host(db: DBConnect) -> None:
        await db.change_host("there")

    db = DBConnect(lambda host: database.watch_new(), host="here", before_create_session_handler=look_up_the_host)
    context = TransactionContext(db)
    async with db, new_db_ctx():
        with pytest.raises(NoSessionError, match="await"):
            context.get_session()
        assert context.get_session(strict=False) is None
        async with context.session() as session:
            assert context.get_session() is session
    assert db.host == "there"


# --- several databases ------------------------------------------------------------------------------------------------


async def test_contexts_of_two_databases_are_used_side_by_side(
    context: TransactionContext, second_db: DBConnect, database: Database
) -> None:
    second = TransactionContext(second_db)
    async with context.transaction(), second.transaction():
        await context.execute(add("one"))
        await second.execute(add("two"))
    assert await database.names() == ["one", "two"]
    with pytest.raises(LookupError):
        async with context.transaction():
            await context.execute(add("undone"))
            async with second.transaction():
                await second.execute(add("three"))
            raise LookupError
    assert await database.names() == ["one", "three", "two"]


async def test_new_transaction_on_one_database_leaves_sessions_on_other_databases_alone(
    context: TransactionContext, db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            outer = await insert_item(second_db, "unit")
            async with context.new_transaction():
                await context.execute(add("own"))
                assert await insert_item(second_db, "unit, too") is outer
            raise LookupError
    assert await database.names() == ["own"]


@pytest.mark.parametrize("block", ["session", "transaction"])
async def test_a_block_outside_of_a_unit_commits_what_is_written_elsewhere_in_it(
    context: TransactionContext, second_db: DBConnect, database: Database, block: str
) -> None:
    async with getattr(context, block)():
        await insert_item(second_db, "kept")
    with pytest.raises(LookupError):
        async with getattr(context, block)():
            await insert_item(second_db, "undone")
            raise LookupError
    assert await database.names() == ["kept"]


async def test_a_commit_that_fails_names_what_was_committed_in_the_block(
    context: TransactionContext, second_db: DBConnect, database: Database
) -> None:
    with pytest.raises(DBAPIError, match="had succeeded") as caught:
        async with context.transaction():
            await context.execute(add("one"))
            await insert_row_that_fails_at_commit(second_db)
    assert "127.0.0.1" in str(caught.value)
    assert await database.names() == ["one"]


# --- several tasks ----------------------------------------------------------------------------------------------------


async def test_a_task_started_in_a_block_has_no_share_in_its_session(
    context: TransactionContext, db: DBConnect
) -> None:
    async def child() -> None:
        assert context.get_session(strict=False) is None
        assert not is_context_initiated()
        with pytest.raises(NoSessionError, match="another task"):
            context.get_session()
        with pytest.raises(NoSessionError):
            await context.execute(select(Item))
        for ask in (db_session, commit_db_session, rollback_db_session):
            with pytest.raises(ContextNotInitiatedError, match="belongs to the task"):
                await ask(db)

    for block in (context.session(), context.transaction(), context.new_session(), context.new_transaction()):
        async with block as session:
            await asyncio.create_task(child())
            assert context.get_session() is session


async def test_a_task_started_in_a_block_opens_sessions_of_its_own(
    context: TransactionContext, auto: TransactionContext, database: Database
) -> None:
    async def child(name: str) -> AsyncSession:
        async with context.transaction() as session:
            await context.execute(add(name))
        await auto.execute(add(f"{name}, by itself"))
        return session

    with pytest.raises(LookupError):
        async with context.transaction() as parent:
            await context.execute(add("parent"))
            one, two = await asyncio.gather(child("one"), child("two"))
            assert len({parent, one, two}) == 3
            raise LookupError
    assert await database.names() == ["one", "one, by itself", "two", "two, by itself"]


async def test_tasks_with_blocks_of_their_own_do_not_meet(context: TransactionContext, database: Database) -> None:
    together = asyncio.Barrier(4)

    async def work(number: int) -> AsyncSession:
        async with context.transaction() as session:
            await context.execute(add(str(number)))
            await together.wait()
            if number % 2:
                raise LookupError
            assert context.get_session() is session
        return session

    results = await asyncio.gather(*map(work, range(4)), return_exceptions=True)
    assert [isinstance(result, AsyncSession) for result in results] == [True, False] * 2
    assert [type(result) for result in results[1::2]] == [LookupError] * 2
    assert await database.names() == ["0", "2"]


async def test_a_task_that_outlives_its_block_has_no_session_until_it_opens_one(context: TransactionContext) -> None:
    release = asyncio.Event()

    async def late() -> None:
        await release.wait()
        assert context.get_session(strict=False) is None
        with pytest.raises(ContextClosedError):
            context.get_session()
        with pytest.raises(ContextClosedError):
            await context.execute(select(Item))
        with pytest.raises(ContextClosedError):
            await db_session(context._db)
        async with context.session():
            await context.execute(select(Item))

    async with context.transaction():
        task = asyncio.create_task(late())
    release.set()
    await task


async def test_a_task_in_a_new_transaction_of_a_unit_does_not_get_the_units_session(
    context: TransactionContext, db: DBConnect, second_db: DBConnect
) -> None:
    async def child() -> None:
        with pytest.raises(NoSessionError):
            await context.execute(select(Item))
        # On the other database, the session is still that of the unit.
        async with atomic_db_session(second_db, current_transaction="append") as session:
            assert session is outer

    async with new_db_ctx():
        outer = await db_session(second_db)
        async with context.new_transaction():
            await asyncio.create_task(child())


async def test_a_thread_of_a_block_has_no_share_in_its_session(context: TransactionContext, database: Database) -> None:
    async def work() -> None:
        async with context.transaction():
            await context.execute(add("thread"))

    def thread() -> AsyncSession | None:
        asyncio.run(work())
        return context.get_session(strict=False)

    for outer in (context.session(), new_db_ctx()):
        async with outer:
            assert await asyncio.to_thread(thread) is None
        assert await database.names() == ["thread"]
        await database.query("DELETE FROM item")


async def test_units_of_work_inside_of_a_block_are_their_own(
    context: TransactionContext, db: DBConnect, database: Database
) -> None:
    async def work() -> None:
        assert context.get_session() is await insert_item(db, "inner")

    with pytest.raises(LookupError):
        async with context.transaction():
            await context.execute(add("outer"))
            await run_in_new_ctx(work)
            raise LookupError
    assert await database.names() == ["inner"]


async def test_a_block_may_be_entered_used_and_left_in_different_tasks(
    context: TransactionContext, database: Database
) -> None:
    """A test's fixture is entered in a task that ends before the test begins in another one."""
    shared = contextvars.copy_context()

    tasks = []

    async def in_task(coro: Coroutine[Any, Any, Any]) -> Any:
        # The tasks are kept, so that the block can see that its task has ended, and not only that it is gone.
        tasks.append(asyncio.get_running_loop().create_task(coro, context=shared))
        return await tasks[-1]

    async def fixture() -> AsyncGenerator[AsyncSession]:
        async with context.transaction() as session:
            yield session

    async def use(name: str, session: AsyncSession) -> None:
        async with context.transaction():
            await context.execute(add(name))
        assert context.get_session() is session

    generator = fixture()
    await in_task(use("one", await in_task(_next(generator))))
    await in_task(_next(generator))
    assert await database.names() == ["one"]

    generator = fixture()
    await in_task(use("two", await in_task(_next(generator))))
    # The generator is closed before its end, and in a context that does not have its block.
    await generator.aclose()
    assert await database.names() == ["one"]


async def _next(generator: AsyncGenerator[Any]) -> Any:
    return await anext(generator, None)


# --- engines and session makers ---------------------------------------------------------------------------------------


@KINDS
async def test_a_transaction_context_can_be_made_of_an_engine(engine: AsyncEngine, database: Database) -> None:
    context = TransactionContext(engine)
    async with context.transaction():
        await context.execute(add("one"))
        with pytest.raises(LookupError):
            async with context.transaction():
                await context.execute(add("two"))
                raise LookupError
    assert await database.names() == ["one"]


def test_an_engine_stays_its_owners(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'file.db'}", poolclass=AsyncAdaptedQueuePool)

    async def use() -> None:
        async with TransactionContext(engine).transaction() as session:
            await session.execute(text("SELECT 1"))

    with asyncio.Runner() as runner:
        runner.run(use())
        gc.collect()
        runner.run(runner.get_loop().shutdown_asyncgens())
        assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]  # a pool with a size
        runner.run(engine.dispose())


async def test_contexts_of_one_engine_share_its_session(engine: AsyncEngine, database: Database) -> None:
    one, two = TransactionContext(engine), TransactionContext(engine)
    async with one.transaction() as session:
        assert two.get_session() is session
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await one.execute(add("one"))
            assert two.get_session() is one.get_session()
            raise LookupError
    assert await database.names() == []


async def test_the_session_of_an_engine_is_committed_with_its_unit(engine: AsyncEngine, database: Database) -> None:
    context = TransactionContext(engine)
    async with new_db_ctx():
        await context.execute(add("one"))
        assert await database.names() == []
    assert await database.names() == ["one"]


async def test_an_engine_gets_the_guards(engine: AsyncEngine, database: Database) -> None:
    context = TransactionContext(engine)
    with pytest.raises(CtxDBError, match="was not propagated"):
        async with context.transaction():
            await context.execute(add("one"))
            with pytest.raises(DBAPIError):
                await context.execute(text("SELECT 1 / 0"))
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_cancelled_query_is_stopped_also_on_a_connection_that_the_engine_had_before(
    engine: AsyncEngine, database: Database
) -> None:
    async with engine.connect():
        pass
    context = TransactionContext(engine, auto_context_on_execute=True)
    query = asyncio.create_task(context.execute(text("SELECT pg_sleep(300)")))
    await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the query does not run")
    query.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query
    assert database.connections == 1
    await database.assert_quiet()


@pytest.mark.parametrize("bound", [True, False])
async def test_session_makers_make_the_sessions(
    engine: AsyncEngine, database: Database, db: DBConnect, bound: bool
) -> None:
    class OtherSession(AsyncSession):
        pass

    bind = engine if bound else None
    default = async_sessionmaker(bind, class_=OwnSession)
    other = async_sessionmaker(bind, class_=OtherSession)
    for target in (engine, db):
        context = TransactionContext(target, default_session_maker=default)
        for block in (context.session(), context.new_session(), context.transaction(), context.new_transaction()):
            async with block as session:
                assert isinstance(session, OwnSession)
                await session.execute(select(Item))
        async with context.new_session(session_maker=other) as session:
            assert isinstance(session, OtherSession)
            await session.execute(select(Item))
        async with new_db_ctx():
            session = context.get_session()
            assert isinstance(session, OwnSession)
            await session.execute(select(Item))
        async with new_db_ctx(), context.transaction(session_maker=other) as session:
            assert isinstance(session, OtherSession)
            assert context.get_session() is session


# --- execute ----------------------------------------------------------------------------------------------------------


@KINDS
async def test_statements_get_a_session_of_their_own_where_that_is_asked_for(
    auto: TransactionContext, database: Database
) -> None:
    await auto.execute(add("one"))
    await auto.execute(text("INSERT INTO item VALUES (:name)"), {"name": "two"})
    await auto.execute(insert(Item), [{"name": "three"}, {"name": "four"}])
    result = await auto.execute(update(Item).where(Item.name == "four").values(name="five"))
    assert result.rowcount == 1
    assert auto.get_session(strict=False) is None
    rows = await auto.execute(select(Item.name).order_by(Item.name))
    assert rows.scalars().all() == ["five", "one", "three", "two"] == await database.names()


async def test_only_queries_go_without_a_commit(auto: TransactionContext, database: Database) -> None:
    setting = "pg_notify('tests', 'x')"
    for query in (select(text(setting)), union_all(select(text(setting)), select(text(setting)))):
        await auto.execute(query)
        assert database.backends("query = 'ROLLBACK;'")
    await auto.execute(text("SELECT 1"))
    assert not database.backends("query = 'ROLLBACK;'")
    assert database.backends("query = 'COMMIT;'")


@pytest.mark.parametrize("force", [True, False, None])
async def test_queries_are_committed_where_that_is_forced(
    db: DBConnect, database: Database, force: bool | None
) -> None:
    forcing = TransactionContext(db, auto_context_on_execute=True, auto_context_force_transaction=True)
    await forcing.execute(select(text("1")), force_transaction=force)
    assert bool(database.backends("query = 'COMMIT;'")) is (force is not False)


async def test_a_query_that_writes_is_committed(auto: TransactionContext, database: Database) -> None:
    new = add("one").returning(Item.name).cte("new")
    assert (await auto.execute(select(new.c.name))).scalar_one() == "one"
    assert await database.names() == ["one"]


async def test_a_statement_with_a_session_of_its_own_may_fail(auto: TransactionContext, database: Database) -> None:
    with pytest.raises(IntegrityError):
        await auto.execute(insert(Item), [{"name": "one"}, {"name": "one"}])
    with pytest.raises(IntegrityError):
        await auto.execute(text("INSERT INTO child VALUES ('nobody')"))
    assert await database.names() == []


@KINDS
async def test_results_can_be_read_after_their_session(auto: TransactionContext, database: Database) -> None:
    await auto.execute(insert(Item), [{"name": str(number)} for number in range(3)])
    query = select(Item).order_by(Item.name)
    assert [item.name for item in (await auto.execute(query)).scalars()] == ["0", "1", "2"]
    assert (await auto.execute(query)).unique().scalars().all()[0].name == "0"
    assert (await auto.execute(query)).mappings().first()["Item"].name == "0"  # type: ignore[index]
    assert [row.name for row in (await auto.execute(select(Item.name).order_by(Item.name))).all()] == ["0", "1", "2"]
    assert [len(rows) for rows in (await auto.execute(query)).partitions(2)] == [2, 1]
    frozen = (await auto.execute(query)).freeze()
    assert len(frozen().all()) == len(frozen().all()) == 3


async def test_objects_can_be_read_after_their_session(db: DBConnect, database: Database) -> None:
    """The objects stay readable even with `expire_on_commit`, as no session could load them again."""
    auto = TransactionContext(db, default_session_maker=async_sessionmaker(), auto_context_on_execute=True)
    item = (await auto.execute(add("one").returning(Item))).scalar_one()
    assert item.name == "one"
    async with auto.transaction() as session:
        session.add(Parent(name="parent", children=[Child()]))
    parents = (await auto.execute(select(Parent).options(joinedload(Parent.children)))).unique().scalars().all()
    assert [child.parent for parent in parents for child in parent.children] == ["parent"]


# --- types: never run -------------------------------------------------------------------------------------------------


async def types(context: TransactionContext, strict: bool) -> None:
    """What both SQLAlchemy 2.0 and 2.1 say of the same statements, though their rows are typed differently."""
    assert_type((await context.execute(select(Item.name))).scalars().all(), Sequence[str])
    assert_type((await context.execute(select(Item.name))).scalar_one(), str)
    assert_type((await context.execute(select(Item))).scalars().one(), Item)
    item, name = (await context.execute(select(Item, Item.name))).tuples().one()
    assert_type(item, Item)
    assert_type(name, str)
    assert_type((await context.execute(select(Item.name).union(select(Item.name)))).scalars().all(), Sequence[str])
    assert_type((await context.execute(insert(Item).returning(Item))).scalars().all(), Sequence[Item])
    assert_type((await context.execute(update(Item).values(name="a"))).rowcount, int)
    assert_type((await context.execute(text("SELECT 1"))).scalar_one(), Any)
    await context.execute(update(Item), [{"name": "a"}], force_transaction=True, execution_options={"a": 1})

    async with context.session() as one, context.transaction() as two:
        assert_type(one, AsyncSession)
        assert_type(two, AsyncSession)
    async with context.new_session() as one, context.new_transaction() as two:
        assert_type(one, AsyncSession)
        assert_type(two, AsyncSession)
    assert_type(context.get_session(), AsyncSession)
    assert_type(context.get_session(strict=True), AsyncSession)
    assert_type(context.get_session(strict=False), AsyncSession | None)
    assert_type(context.get_session(strict), AsyncSession | None)

    TransactionContext(context._db, default_session_maker=async_sessionmaker(class_=OwnSession))
    context.execute("SELECT 1")  # type: ignore[call-overload]  # text() is what SQLAlchemy wants
