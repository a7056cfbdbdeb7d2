"""While a task is in a block on the session of its unit of work, no other task adds to that block, or ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from sqlalchemy import insert as insert_into
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from tests.support.blocks import savepoint, transaction
from tests.support.database import Database, Item, insert

from ctxdb_core import (
    ContextNotInitiatedError,
    DBConnect,
    SessionAlreadyActiveError,
    TransactionContext,
    atomic_db_session,
    commit_db_session,
    db_session,
    joining_session,
    new_db_ctx,
    rollback_db_session,
    run_in_new_ctx,
    transactional,
)
from ctxdb_core._sqlalchemy.task_blocks import _around

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)

Block = Callable[[DBConnect], AbstractAsyncContextManager[Any]]


# --- the blocks -------------------------------------------------------------------------------------------------------


BLOCKS = pytest.mark.parametrize(
    "block",
    [
        savepoint,
        transaction,
        joining_session,
        atomic_db_session,
        lambda db: atomic_db_session(db, "savepoint"),
        lambda db: transactional(db, "nested"),
        lambda db: TransactionContext(db).transaction(),
    ],
    ids=["savepoint", "transaction", "joining_session", "atomic", "atomic-savepoint", "nested", "context"],
)


# --- what another task may do in the middle of it ---------------------------------------------------------------------


async def statement(db: DBConnect) -> None:
    await insert(db, "other")


async def new_object(db: DBConnect) -> None:
    (await db_session(db)).add(Item(name="other"))


async def merged_object(db: DBConnect) -> None:
    await (await db_session(db)).merge(Item(name="other"))


async def changed_object(db: DBConnect) -> None:
    session = await db_session(db)
    (await session.scalars(select(Item).where(Item.name == "first"))).one().name = "changed"
    await session.flush()


async def deleted_object(db: DBConnect) -> None:
    session = await db_session(db)
    await session.delete((await session.scalars(select(Item).where(Item.name == "first"))).one())


async def connection(db: DBConnect) -> None:
    await (await (await db_session(db)).connection()).execute(insert_into(Item).values(name="other"))


async def synchronous_code(db: DBConnect) -> None:
    def write(session: Session) -> None:
        with session.begin_nested():
            session.execute(insert_into(Item).values(name="other"))

    await (await db_session(db)).run_sync(write)


async def commit(db: DBConnect) -> None:
    await (await db_session(db)).commit()


async def rollback(db: DBConnect) -> None:
    await (await db_session(db)).rollback()


async def in_savepoint(db: DBConnect) -> None:
    async with savepoint(db):
        await insert(db, "other")


async def in_joining_session(db: DBConnect) -> None:
    async with joining_session(db) as session:
        session.add(Item(name="other"))


async def in_atomic_session(db: DBConnect) -> None:
    async with atomic_db_session(db):
        await insert(db, "other")


WRITES = pytest.mark.parametrize(
    "write",
    [
        statement,
        new_object,
        merged_object,
        changed_object,
        deleted_object,
        connection,
        synchronous_code,
        commit,
        rollback,
        commit_db_session,
        rollback_db_session,
        in_savepoint,
        in_joining_session,
        in_atomic_session,
    ],
)


async def in_the_middle_of(
    block: Block, db: DBConnect, act: Callable[[DBConnect], Awaitable[Any]], *, fails: bool = True
) -> BaseException | None:
    """Have one task do `act` while another task is in `block`, which fails then; return the error of `act`."""
    is_inside, is_done = asyncio.Event(), asyncio.Event()

    async def stay() -> None:
        async with block(db) as session:
            await (session or await db_session(db)).execute(insert_into(Item).values(name="block"))
            is_inside.set()
            await is_done.wait()
            if fails:
                raise LookupError

    async def act_inside() -> None:
        await is_inside.wait()
        try:
            await act(db)
        finally:
            is_done.set()

    error, other = await asyncio.gather(stay(), act_inside(), return_exceptions=True)
    assert isinstance(error, LookupError) or not fails
    return other


@BLOCKS
async def test_a_block_that_fails_undoes_no_write_of_another_task(
    db: DBConnect, database: Database, block: Block
) -> None:
    async with new_db_ctx():
        assert isinstance(await in_the_middle_of(block, db, statement), SessionAlreadyActiveError)
        await insert(db, "after")
    assert await database.names() == ["after"]


@KINDS
@WRITES
async def test_another_task_is_refused_to_write_in_a_savepoint(
    db: DBConnect, database: Database, write: Callable[[DBConnect], Awaitable[Any]]
) -> None:
    async with new_db_ctx():
        await insert(db, "first")
        assert isinstance(await in_the_middle_of(savepoint, db, write), SessionAlreadyActiveError)
    assert await database.names() == ["first"]


@WRITES
async def test_a_block_stands_whatever_another_task_attempts_in_it(
    db: DBConnect, database: Database, write: Callable[[DBConnect], Awaitable[Any]]
) -> None:
    async with new_db_ctx():
        await insert(db, "first")
        assert isinstance(await in_the_middle_of(savepoint, db, write, fails=False), SessionAlreadyActiveError)
    assert await database.names() in (["block", "first"], ["block", "changed"])


@BLOCKS
async def test_another_task_reads_while_a_block_is_open(db: DBConnect, block: Block) -> None:
    async def read(db: DBConnect) -> None:
        await (await db_session(db)).scalars(select(Item))

    async with new_db_ctx():
        assert await in_the_middle_of(block, db, read) is None


async def test_another_task_writes_beside_a_block_in_a_unit_of_its_own(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        assert await in_the_middle_of(savepoint, db, lambda db: run_in_new_ctx(statement, db)) is None
    assert await database.names() == ["other"]


@BLOCKS
async def test_tasks_that_a_block_starts_write_in_it(db: DBConnect, database: Database, block: Block) -> None:
    async with new_db_ctx(), block(db), asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(insert(db, str(number)))
    assert await database.names() == ["0", "1", "2"]


async def test_a_task_that_a_block_starts_has_a_savepoint_in_it(db: DBConnect, database: Database) -> None:
    async with new_db_ctx(), savepoint(db):
        await asyncio.create_task(in_savepoint(db))
        await insert(db, "after")
    assert await database.names() == ["after", "other"]


async def test_a_task_writes_when_the_block_of_another_task_has_ended(db: DBConnect, database: Database) -> None:
    has_ended, is_done = asyncio.Event(), asyncio.Event()

    async def stay() -> None:
        async with savepoint(db):
            await insert(db, "block")
        has_ended.set()
        await is_done.wait()

    async with new_db_ctx(), asyncio.TaskGroup() as group:
        group.create_task(stay())
        await has_ended.wait()
        await in_savepoint(db)
        is_done.set()
    assert await database.names() == ["block", "other"]


async def test_a_savepoint_that_a_task_has_left_open_belongs_to_all(db: DBConnect, database: Database) -> None:
    # A framework enters the dependencies of a handler like this: in tasks that end before the handler begins.
    async with new_db_ctx():
        session = await db_session(db)
        entered = await asyncio.create_task(_enter(session.begin_nested()))
        await insert(db, "one")
        await entered.__aexit__(None, None, None)
    assert await database.names() == ["one"]


async def test_a_transaction_that_is_begun_without_a_block_belongs_to_all(db: DBConnect, database: Database) -> None:
    has_begun, is_done = asyncio.Event(), asyncio.Event()

    async def begin_without_block() -> None:
        await (await db_session(db)).begin()
        has_begun.set()
        await is_done.wait()

    async with new_db_ctx(), asyncio.TaskGroup() as group:
        group.create_task(begin_without_block())
        await has_begun.wait()
        await insert(db, "one")
        is_done.set()
    assert await database.names() == ["one"]


async def test_a_unit_of_work_commits_although_a_task_is_in_a_block(db: DBConnect, database: Database) -> None:
    is_inside, is_over = asyncio.Event(), asyncio.Event()

    async def stay() -> None:
        async with savepoint(db):
            is_inside.set()
            await is_over.wait()

    async with new_db_ctx():
        await insert(db, "one")
        task = asyncio.create_task(stay())
        await is_inside.wait()
    is_over.set()
    await asyncio.wait([task])
    assert await database.names() == ["one"]


async def test_a_unit_of_work_is_rolled_back_and_keeps_its_connection_although_a_task_is_in_a_block(
    db: DBConnect, database: Database
) -> None:
    async def stay() -> None:
        async with (await db_session(db)).begin_nested():
            entered.set()
            await leave.wait()

    async def fail() -> None:
        async with new_db_ctx():
            await insert(db, "one")
            staying.append(asyncio.create_task(stay()))
            await entered.wait()
            raise error

    error = LookupError()
    staying: list[asyncio.Task[None]] = []
    entered, leave = asyncio.Event(), asyncio.Event()
    with pytest.raises(LookupError):
        await fail()
    leave.set()
    await asyncio.gather(*staying, return_exceptions=True)
    assert not hasattr(error, "__notes__")
    async with new_db_ctx():
        await insert(db, "two")
    assert database.connections == 1
    assert await database.names() == ["two"]


async def test_the_blocks_of_a_worker_are_forgotten(db: DBConnect) -> None:
    for number in range(5):
        async with new_db_ctx(), savepoint(db):
            await insert(db, str(number))
    assert len(_around.get()) <= 1


async def _enter(block: Any) -> Any:
    await block.__aenter__()
    return block


@pytest.mark.parametrize("end", [commit_db_session, rollback_db_session, commit, rollback])
async def test_an_end_that_waits_for_its_turn_is_refused_in_a_block_that_has_begun_meanwhile(
    db: DBConnect, database: Database, end: Callable[[DBConnect], Awaitable[Any]]
) -> None:
    is_done = asyncio.Event()

    async def stay() -> None:
        async with savepoint(db):
            await insert(db, "block")
            await is_done.wait()

    async with new_db_ctx():
        session = await insert(db, "first")
        # The savepoint and the end both wait until the statement's turn is over: the savepoint is the first.
        statement = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.1)")))
        await asyncio.sleep(0)
        staying = asyncio.create_task(stay())
        await asyncio.sleep(0)
        ending = asyncio.ensure_future(end(db))
        await asyncio.wait([statement, ending])
        is_done.set()
        await staying
        assert isinstance(ending.exception(), SessionAlreadyActiveError)
    assert await database.names() == ["block", "first"]


# SQLAlchemy warns of an object that is added in the middle of a flush.
@pytest.mark.filterwarnings("ignore:Usage of the")
async def test_an_object_that_is_added_while_another_task_sets_a_savepoint_is_stored(
    db: DBConnect, database: Database
) -> None:
    refused: list[BaseException] = []

    async def fail() -> None:
        async with savepoint(db):
            raise LookupError

    async with new_db_ctx():
        session = await db_session(db)
        session.add(Item(name="first"))
        failing = asyncio.create_task(fail())
        added = 0
        while not failing.done():
            # Some objects are added in the middle of the flush that comes before the savepoint.
            await asyncio.sleep(0)
            try:
                session.add(Item(name=f"added {added}"))
                added += 1
            except SessionAlreadyActiveError as exc:
                refused.append(exc)
        assert isinstance(failing.exception(), LookupError)
    assert refused
    assert len(await database.names()) == added + 1


async def test_a_transactional_block_is_left_by_the_context_that_has_entered_it(db: DBConnect) -> None:
    async with new_db_ctx():
        block = transactional(db)
        with pytest.raises(ContextNotInitiatedError, match="let the task that enters a block leave it"):
            await block.__aexit__(None, None, None)
