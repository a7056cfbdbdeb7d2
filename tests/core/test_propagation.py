"""`transactional`: how functions and blocks take part in transactions."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, assert_type

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from tests.support.database import Database, Item, insert
from tests.support.late import after_its_unit

from ctxdb_core import (
    ContextClosedError,
    CtxDBError,
    DBConnect,
    DeadlineExceededError,
    SessionAlreadyActiveError,
    TransactionAlreadyActiveError,
    TransactionContext,
    TransactionOptionsError,
    TransactionRequiredError,
    UnexpectedRollbackError,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    on_commit,
    rollback_db_session,
    set_statement_timeout,
    transactional,
)
from ctxdb_core.adapters import Propagation, is_context_initiated

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
POSTGRESQL = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
BEGINNING: tuple[Propagation, ...] = ("required", "requires_new", "nested")
JOINING: tuple[Propagation, ...] = ("required", "mandatory", "supports")
WITHOUT: tuple[Propagation, ...] = ("never", "supports", "not_supported")


# --- outside of a transaction -----------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("propagation", BEGINNING)
async def test_a_transaction_is_begun_where_there_is_none(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    async with transactional(db, propagation) as session:
        assert await insert(db, "one") is session
        assert await database.names() == []
    assert await database.names() == ["one"]
    with pytest.raises(LookupError):
        async with transactional(db, propagation):
            await insert(db, "two")
            raise LookupError
    assert await database.names() == ["one"]
    assert not is_context_initiated()


async def test_mandatory_is_an_error_where_there_is_no_transaction(db: DBConnect) -> None:
    with pytest.raises(TransactionRequiredError, match="new_db_ctx"):
        async with transactional(db, "mandatory"):
            pytest.fail("the block was entered")


@KINDS
@pytest.mark.parametrize("propagation", WITHOUT)
async def test_without_a_transaction_each_statement_stands_by_itself(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    with pytest.raises(LookupError):
        async with transactional(db, propagation) as session:
            assert await insert(db, "one") is session
            assert await database.names() == ["one"]
            raise LookupError
    assert await database.names() == ["one"]
    async with new_db_ctx():
        # The connection has transactions again.
        await insert(db, "undone")
        await rollback_db_session(db)
    assert await database.names() == ["one"]


async def test_without_a_transaction_what_was_added_is_written_at_the_end(db: DBConnect, database: Database) -> None:
    seen: list[str] = []
    async with transactional(db, "supports") as session:
        session.add(Item(name="one"))
        on_commit(db, lambda: seen.append("done"))
    assert await database.names() == ["one"]
    assert seen == ["done"]


@POSTGRESQL
async def test_without_a_transaction_statements_run_that_refuse_to_be_in_one(db: DBConnect) -> None:
    async with new_db_ctx(), transactional(db, "not_supported") as session:
        await session.execute(text("VACUUM item"))


async def test_a_block_without_a_transaction_has_no_transaction_to_be_joined(db: DBConnect, database: Database) -> None:
    async with transactional(db, "not_supported") as session:
        for propagation in WITHOUT:
            async with transactional(db, propagation) as inner:
                assert inner is session
        with pytest.raises(TransactionRequiredError):
            async with transactional(db, "mandatory"):
                pytest.fail("the block was entered")
        with pytest.raises(TransactionRequiredError, match="transactional"):
            async with atomic_db_session(db):
                pytest.fail("the block was entered")
        async with transactional(db, "required") as inner:
            assert inner is not session
            await insert(db, "one")
            assert await database.names() == []
        assert await database.names() == ["one"]


# --- inside of a transaction ------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("propagation", [*JOINING, "nested"])
async def test_a_joined_transaction_is_committed_by_the_block_that_began_it(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    async with new_db_ctx():
        outer = await insert(db, "outer")
        async with transactional(db, propagation) as session:
            assert session is outer
            await insert(db, "inner")
        assert await database.names() == []
    assert await database.names() == ["inner", "outer"]


@pytest.mark.parametrize("propagation", [*JOINING, "nested"])
async def test_a_unit_of_work_is_a_transaction_before_its_first_statement(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            async with transactional(db, propagation):
                await insert(db, "one")
            raise LookupError
    assert await database.names() == []


@POSTGRESQL
@pytest.mark.parametrize("propagation", ["requires_new", "not_supported"])
async def test_a_suspended_transaction_is_left_alone(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    with pytest.raises(LookupError, match="outer"):
        async with new_db_ctx():
            outer = await insert(db, "outer")
            async with transactional(db, propagation) as session:
                assert session is not outer
                await insert(db, "inner")
            assert await database.names() == ["inner"]
            assert await db_session(db) is outer
            raise LookupError("outer")
    assert await database.names() == ["inner"]


async def test_an_error_of_a_new_transaction_leaves_the_suspended_one_alone(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "outer")
        with pytest.raises(LookupError):
            async with transactional(db, "requires_new"):
                await insert(db, "inner")
                raise LookupError
    assert await database.names() == ["outer"]


@pytest.mark.parametrize("statement", [False, True])
async def test_never_is_an_error_inside_of_a_transaction(db: DBConnect, *, statement: bool) -> None:
    async with new_db_ctx():
        if statement:
            await insert(db, "outer")
        with pytest.raises(TransactionAlreadyActiveError, match="not_supported"):
            async with transactional(db, "never"):
                pytest.fail("the block was entered")


@KINDS
async def test_an_error_of_a_nested_block_undoes_that_block_alone(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "outer")
        with pytest.raises(LookupError):
            async with transactional(db, "nested"):
                await insert(db, "inner")
                raise LookupError
    assert await database.names() == ["outer"]


# --- in the blocks of a TransactionContext ----------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("propagation", ["required", "nested"])
@pytest.mark.parametrize("kind", ["session", "new_session"])
@pytest.mark.parametrize("statement", [False, True])
async def test_in_a_mere_session_a_transaction_is_begun_and_committed(
    db: DBConnect, database: Database, propagation: Propagation, kind: str, *, statement: bool
) -> None:
    async with getattr(TransactionContext(db), kind)() as session:
        if statement:
            await session.execute(select(Item))
        with pytest.raises(LookupError):
            async with transactional(db, propagation):
                await insert(db, "undone")
                raise LookupError
        async with transactional(db, propagation) as same:
            assert same is session
            async with transactional(db, "mandatory"), transactional(db):
                await insert(db, "one")
            if database.is_postgresql:
                assert await database.names() == []
        assert await database.names() == ["one"]
        assert not session.in_transaction()


async def test_in_a_mere_session_mandatory_is_an_error(db: DBConnect) -> None:
    context = TransactionContext(db)
    async with context.session() as session:
        await session.execute(select(Item))
        with pytest.raises(TransactionRequiredError, match="mere session"):
            async with transactional(db, "mandatory"):
                pytest.fail("the block was entered")
        await session.rollback()
        async with session.begin(), transactional(db, "mandatory"):
            pass
    async with context.transaction(), transactional(db, "mandatory"):
        pass


@POSTGRESQL
async def test_in_a_mere_session_the_transaction_has_the_isolation_level_of_the_block(
    db: DBConnect, database: Database
) -> None:
    async with TransactionContext(db).session():
        async with transactional(db, isolation_level="SERIALIZABLE") as session:
            assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
            await insert(db, "one")
        assert await database.names() == ["one"]


@pytest.mark.parametrize("begun_by", ["hand", "atomic block", "savepoint", "block"])
async def test_transaction_with_an_owner_in_a_mere_session_is_joined(
    db: DBConnect, database: Database, begun_by: str
) -> None:
    context = TransactionContext(db)
    async with context.session() as session:
        blocks: dict[str, Callable[[], AbstractAsyncContextManager[object]]] = {
            "hand": session.begin,
            "atomic block": lambda: atomic_db_session(db),
            "savepoint": session.begin_nested,
            "block": context.transaction,
        }
        with pytest.raises(LookupError):
            async with blocks[begun_by]():
                async with transactional(db):
                    await insert(db, "one")
                raise LookupError
        await session.commit()
    assert await database.names() == []


async def test_a_block_of_one_database_leaves_the_sessions_of_others_alone(db: DBConnect, second_db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(second_db)
        async with TransactionContext(db).new_transaction(), transactional(second_db) as joined:
            assert joined is session


# --- errors of joined blocks ------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("propagation", JOINING)
async def test_half_of_a_joined_block_is_never_committed(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    with pytest.raises(UnexpectedRollbackError, match="requires_new") as caught:
        async with new_db_ctx():
            await insert(db, "outer")
            with pytest.raises(LookupError):
                async with transactional(db, propagation):
                    await insert(db, "half")
                    raise LookupError
            await insert(db, "after")
    assert isinstance(caught.value.__cause__, LookupError)
    assert await database.names() == []


async def test_an_error_before_the_first_statement_counts_like_any_other(db: DBConnect, database: Database) -> None:
    with pytest.raises(UnexpectedRollbackError):
        async with new_db_ctx():
            with pytest.raises(LookupError):
                async with transactional(db):
                    raise LookupError
            await insert(db, "after")
    assert await database.names() == []


async def test_an_error_that_propagates_surfaces_as_it_is(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx(), transactional(db):
            await insert(db, "one")
            raise LookupError
    assert await database.names() == []


async def test_an_early_commit_of_a_failed_transaction_is_refused_and_a_roll_back_ends_it(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        for end in (commit_db_session, rollback_db_session):
            with pytest.raises(LookupError):
                async with transactional(db):
                    await insert(db, "half")
                    raise LookupError
            if end is commit_db_session:
                with pytest.raises(UnexpectedRollbackError):
                    await end(db)
            else:
                await end(db)
            await insert(db, end.__name__)
            await commit_db_session(db)
    assert await database.names() == ["commit_db_session", "rollback_db_session"]


async def test_the_sessions_own_commit_is_refused_as_well(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await insert(db, "outer")
        with pytest.raises(LookupError):
            async with transactional(db):
                raise LookupError
        with pytest.raises(UnexpectedRollbackError):
            await session.commit()
        await rollback_db_session(db)
    assert await database.names() == []


async def test_a_savepoint_contains_the_error_of_a_block_that_joined_in_it(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "outer")
        with pytest.raises(LookupError):
            async with transactional(db, "nested"), transactional(db):
                await insert(db, "half")
                raise LookupError
    assert await database.names() == ["outer"]


async def test_a_savepoint_is_not_released_after_an_error_of_a_block_that_joined_in_it(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert(db, "outer")
        with pytest.raises(UnexpectedRollbackError):
            async with transactional(db, "nested"):
                with pytest.raises(LookupError):
                    async with transactional(db):
                        await insert(db, "half")
                        raise LookupError
        await insert(db, "after")
    assert await database.names() == ["after", "outer"]


@KINDS
async def test_savepoints_of_two_tasks_do_not_meet(db: DBConnect, database: Database) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    @transactional(db, "nested")
    async def first() -> None:
        await insert(db, "half")
        entered.set()
        await leave.wait()
        raise LookupError

    @transactional(db, "nested")
    async def second() -> None:
        await insert(db, "second")

    async def other() -> None:
        await entered.wait()
        try:
            await second()
        finally:
            leave.set()

    async with new_db_ctx():
        results = await asyncio.gather(first(), other(), return_exceptions=True)
        assert [type(result) for result in results] == [LookupError, SessionAlreadyActiveError]
        assert "requires_new" in str(results[1])
        # The second task may have its block when that of the first has ended.
        await other()
    assert await database.names() == ["second"]


async def test_an_error_of_a_joined_block_is_not_contained_by_the_savepoint_of_another_task(
    db: DBConnect, database: Database
) -> None:
    joined, nested, failed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @transactional(db)
    async def join() -> None:
        await insert(db, "half")
        joined.set()
        await nested.wait()
        raise LookupError

    @transactional(db, "nested")
    async def nest() -> None:
        nested.set()
        await failed.wait()
        raise LookupError

    async def other() -> None:
        await joined.wait()
        await nest()

    with pytest.raises(UnexpectedRollbackError):
        async with new_db_ctx():
            task = asyncio.create_task(other())
            with pytest.raises(LookupError):
                await join()
            failed.set()
            with pytest.raises(LookupError):
                await task
    assert await database.names() == []


async def test_a_failed_joined_block_keeps_each_database_of_the_unit_from_its_commit(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    with pytest.raises(UnexpectedRollbackError):
        async with new_db_ctx():
            await insert(db, "elsewhere")
            await insert(second_db, "outer")
            with pytest.raises(LookupError):
                async with transactional(second_db):
                    raise LookupError
    assert await database.names() == []


async def test_a_joined_block_that_is_cancelled_is_not_committed(db: DBConnect, database: Database) -> None:
    with pytest.raises(UnexpectedRollbackError):
        async with new_db_ctx():
            await insert(db, "outer")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), transactional(db):
                    await insert(db, "half")
                    await asyncio.sleep(60)
    assert await database.names() == []


@pytest.mark.parametrize("propagation", [*BEGINNING, "mandatory"])
async def test_an_exception_of_no_rollback_for_leaves_the_work_done(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    async with new_db_ctx():
        await insert(db, "outer")
        with pytest.raises(KeyError, match="found elsewhere"):
            async with transactional(db, propagation, no_rollback_for=LookupError):
                await insert(db, "inner")
                raise KeyError("found elsewhere")
    assert await database.names() == ["inner", "outer"]


@pytest.mark.parametrize("wrong", [LookupError("one"), [LookupError], "LookupError", (LookupError, 1)])
async def test_value_that_is_no_class_of_exceptions_is_refused(db: DBConnect, wrong: Any) -> None:
    with pytest.raises(CtxDBError, match="no_rollback_for="):
        transactional(db, no_rollback_for=wrong)


# --- options ----------------------------------------------------------------------------------------------------------


@POSTGRESQL
@pytest.mark.parametrize("propagation", [*BEGINNING, "mandatory"])
async def test_the_transaction_has_the_isolation_level_of_the_block(db: DBConnect, propagation: Propagation) -> None:
    block = transactional(db, propagation, isolation_level="SERIALIZABLE", read_only=True)
    async with new_db_ctx(), block as session:
        assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
        with pytest.raises(DBAPIError, match="read-only"):
            async with session.begin_nested():
                await insert(db, "refused")


@pytest.mark.parametrize("propagation", ["required", "nested", "mandatory"])
async def test_a_joined_transaction_of_another_level_is_an_error_and_stays(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    async with new_db_ctx():
        await insert(db, "outer")
        with pytest.raises(TransactionOptionsError):
            async with transactional(db, propagation, isolation_level="SERIALIZABLE"):
                pytest.fail("the block was entered")
    assert await database.names() == ["outer"]


@pytest.mark.parametrize("propagation", ["requires_new", "not_supported"])
async def test_a_suspended_units_deadline_holds_for_what_it_waits_for(db: DBConnect, propagation: Propagation) -> None:
    async with new_db_ctx():
        await set_statement_timeout(deadline=asyncio.get_running_loop().time() - 1)
        with pytest.raises(DeadlineExceededError):
            async with transactional(db, propagation):
                await insert(db, "late")


def test_contradicting_arguments_are_refused_at_once(unused_db: DBConnect) -> None:
    for propagation in WITHOUT:
        with pytest.raises(ValueError, match="leave them out"):
            transactional(unused_db, propagation, read_only=True)
    with pytest.raises(ValueError, match="'requires_new'"):
        transactional(unused_db, "sometimes")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match="SERIALIZABLE"):
        transactional(unused_db, isolation_level="CHAOS")  # type: ignore[arg-type]  # as above


@pytest.fixture
def unused_db() -> DBConnect:
    return DBConnect.from_url("sqlite+aiosqlite://")


# --- as a decorator ---------------------------------------------------------------------------------------------------


async def test_each_call_of_a_decorated_function_is_a_block(db: DBConnect, database: Database) -> None:
    @transactional(db)
    async def add(name: str, *, fail: bool = False) -> str:
        """Add it."""
        await insert(db, name)
        if fail:
            raise LookupError
        return name

    added = await add("one")
    assert_type(added, str)
    assert added == "one"
    # mypy refuses calls that the signature of the decorated function does not allow.
    refused = lambda: add(1, fail=False)  # type: ignore[arg-type]  # noqa: E731
    assert callable(refused)
    with pytest.raises(LookupError):
        await add("two", fail=True)
    assert await database.names() == ["one"]
    assert add.__doc__ == "Add it."
    assert list(inspect.signature(add).parameters) == ["name", "fail"]


async def test_methods_can_be_decorated(db: DBConnect, database: Database) -> None:
    class Items:
        prefix = "an "

        @transactional(db, "requires_new")
        async def add(self, name: str) -> None:
            await insert(db, self.prefix + name)

        @classmethod
        @transactional(db)
        async def add_one(cls) -> None:
            await cls().add("one")

    await Items.add_one()
    assert await database.names() == ["an one"]


async def test_transactional_object_can_be_nested_and_used_by_several_tasks_at_once(
    db: DBConnect, database: Database
) -> None:
    block = transactional(db, "requires_new")

    @block
    async def add(name: str, depth: int = 2) -> None:
        async with block as session:
            assert session is await insert(db, f"{name}{depth}")
            await asyncio.sleep(0)
            if depth:
                await add(name, depth - 1)
            assert session is await db_session(db)

    # The pool has five connections, and each level of each call may take two.
    await asyncio.gather(add("a", 0), add("b", 0))
    await add("c", 1)
    assert await database.names() == ["a0", "b0", "c0", "c1"]
    assert not is_context_initiated()


def test_only_async_functions_can_be_decorated(unused_db: DBConnect) -> None:
    def plain() -> None:
        pass

    async def stream() -> AsyncIterator[int]:
        yield 1

    for fn in (plain, stream):
        with pytest.raises(TypeError, match="no async function"):
            transactional(unused_db)(fn)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(TypeError, match="on which database"):
        transactional(plain)  # type: ignore[arg-type]  # as above


# --- after the end ----------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("propagation", BEGINNING)
async def test_a_block_that_finds_a_unit_which_has_ended_begins_a_transaction_of_its_own(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    async def late() -> None:
        with pytest.raises(LookupError):
            async with transactional(db, propagation):
                await insert(db, "undone")
                raise LookupError
        async with transactional(db, propagation) as session:
            assert await insert(db, "late") is session
            assert await database.names() == []

    await after_its_unit(late)
    assert await database.names() == ["late"]


@pytest.mark.parametrize("propagation", WITHOUT)
async def test_a_block_that_finds_a_unit_which_has_ended_can_run_without_a_transaction(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    async def late() -> None:
        async with transactional(db, propagation):
            await insert(db, "late")
            assert await database.names() == ["late"]

    await after_its_unit(late)


async def test_a_block_that_must_join_is_told_that_the_unit_has_ended(db: DBConnect) -> None:
    async def late() -> None:
        async with transactional(db, "mandatory"):
            pytest.fail("the block was entered")

    with pytest.raises(ContextClosedError):
        await after_its_unit(late)


@pytest.mark.parametrize("propagation", [*JOINING, "nested", "never"])
async def test_half_of_a_block_is_not_committed_when_its_unit_has_ended_in_the_middle(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    joined, ended = asyncio.Event(), asyncio.Event()

    @transactional(db)
    async def work() -> None:
        await insert(db, "first half")
        joined.set()
        await ended.wait()
        async with transactional(db, propagation):
            await insert(db, "second half")

    with pytest.raises(LookupError):
        async with new_db_ctx():
            task = asyncio.create_task(work())
            await joined.wait()
            raise LookupError
    ended.set()
    with pytest.raises(ContextClosedError):
        await task
    assert await database.names() == []
