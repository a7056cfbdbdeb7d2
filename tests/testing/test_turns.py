"""Several sessions in one shared transaction: who waits for whom, and what cannot be shown on one connection."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.database import Item, eventually, insert
from tests.support.items import names

from ctxdb_core import (
    DBConnect,
    db_session,
    gather_in_new_ctx,
    new_db_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from ctxdb_core.testing import SharedTransactionError, shared_transaction
from ctxdb_core.testing._shared_connection import SharedConnection


async def test_a_session_of_its_own_runs_inside_of_a_transaction_that_has_written(db: DBConnect) -> None:
    async with shared_transaction(db):
        async with new_db_ctx():
            await insert(db, "outer")
            await run_in_new_ctx(insert, db, "inner")
            await insert(db, "again")
        assert await names(db) == ["again", "inner", "outer"]


async def test_a_roll_back_that_undoes_the_commit_of_another_session_is_told_at_the_end(db: DBConnect) -> None:
    with pytest.raises(SharedTransactionError, match="has undone what another session had committed"):
        async with shared_transaction(db):
            with pytest.raises(LookupError):
                async with new_db_ctx():
                    await insert(db, "outer")
                    await run_in_new_ctx(insert, db, "inner")
                    raise LookupError


async def test_session_that_has_only_read_does_not_block_other_sessions(db: DBConnect) -> None:
    async with shared_transaction(db):
        async with new_non_ctx_session(db) as reader:
            await reader.scalars(select(Item))
            await asyncio.create_task(run_in_new_ctx(insert, db, "one"))
            assert (await reader.scalars(select(Item.name))).all() == ["one"]
            async with new_db_ctx():
                await insert(db, "two")
                assert len((await reader.scalars(select(Item.name))).all()) == 2
        assert await names(db) == ["one", "two"]


async def test_a_session_waits_no_longer_where_a_test_has_stopped_the_time(
    db: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As freezegun does.
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    inserted, released = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with new_db_ctx():
            await insert(db, "one")
            inserted.set()
            await released.wait()

    async with shared_transaction(db, timeout=0.1):
        holder = asyncio.create_task(hold())
        await inserted.wait()
        with pytest.raises(SharedTransactionError, match="commit or roll back that one first"):
            await run_in_new_ctx(insert, db, "two")
        released.set()
        await holder
        assert await names(db) == ["one"]


async def _fail_to_commit(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO child VALUES ('nobody')"))
    with pytest.raises(IntegrityError):
        await session.commit()


@pytest.mark.parametrize("end", [_fail_to_commit, AsyncSession.invalidate], ids=["commit that fails", "invalidate"])
async def test_a_session_that_waits_goes_on_however_the_other_transaction_ends(
    db: DBConnect, monkeypatch: pytest.MonkeyPatch, end: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    inserted, waits = asyncio.Event(), threading.Event()
    wait = SharedConnection._wait

    async def note(*args: Any) -> None:
        waits.set()
        await wait(*args)

    monkeypatch.setattr(SharedConnection, "_wait", note)

    async def hold() -> None:
        async with new_non_ctx_session(db) as session:
            session.add(Item(name="undone"))
            await session.flush()
            inserted.set()
            await eventually(waits.is_set, "the other session does not wait")
            await end(session)

    async with shared_transaction(db):
        holder = asyncio.create_task(hold())
        await inserted.wait()
        await run_in_new_ctx(insert, db, "one")
        await holder
        assert await names(db) == ["one"]


async def test_sessions_of_several_tasks_take_turns(db: DBConnect) -> None:
    async def work(name: str) -> None:
        await insert(db, name)
        await asyncio.sleep(0)
        await insert(db, name * 2)

    async with shared_transaction(db):
        await gather_in_new_ctx(*[lambda name=name: work(name) for name in "abcd"])
        assert await names(db) == ["a", "aa", "b", "bb", "c", "cc", "d", "dd"]


async def test_sessions_of_several_tasks_take_turns_inside_of_a_transaction(db: DBConnect) -> None:
    async with shared_transaction(db):
        async with new_db_ctx():
            await insert(db, "outer")
            await gather_in_new_ctx(*[lambda name=name: insert(db, name) for name in "abc"])
        assert await names(db) == ["a", "b", "c", "outer"]


async def test_failing_task_leaves_the_work_of_other_tasks(db: DBConnect) -> None:
    async def fail() -> None:
        await insert(db, "failed")
        raise LookupError

    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")
        results = await asyncio.gather(run_in_new_ctx(fail), run_in_new_ctx(insert, db, "two"), return_exceptions=True)
        assert isinstance(results[0], LookupError)
        assert await names(db) == ["one", "two"]


async def test_a_transaction_that_waits_in_vain_is_told_why(db: DBConnect) -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        await insert(db, "held")
        begun.set()
        await end.wait()

    async with shared_transaction(db, timeout=0.05):
        holding = asyncio.create_task(run_in_new_ctx(hold))
        await begun.wait()
        with pytest.raises(SharedTransactionError, match=r"has waited for 0\.05 s"):
            await run_in_new_ctx(insert, db, "one")
        end.set()
        await holding
        assert await names(db) == ["held"]


@pytest.mark.parametrize("second_commits", [True, False])
async def test_transactions_can_be_committed_in_the_order_in_which_they_began(
    db: DBConnect, second_commits: bool
) -> None:
    async with shared_transaction(db):
        async with new_non_ctx_session(db) as first, new_non_ctx_session(db) as second:
            first.add(Item(name="first"))
            await first.flush()
            second.add(Item(name="second"))
            await second.flush()
            await first.commit()
            if second_commits:
                await second.commit()
        assert await names(db) == (["first", "second"] if second_commits else ["first"])


async def test_two_transactions_that_write_by_turns_are_refused_at_once(db: DBConnect) -> None:
    with pytest.raises(SharedTransactionError, match="has undone"):
        async with shared_transaction(db), new_non_ctx_session(db) as first, new_non_ctx_session(db) as second:
            await first.execute(text("INSERT INTO item VALUES ('first')"))
            await second.execute(text("INSERT INTO item VALUES ('second')"))
            with pytest.raises(SharedTransactionError, match="one that was begun after it"):
                await first.execute(text("INSERT INTO item VALUES ('third')"))
            with pytest.raises(SharedTransactionError, match="one that was begun after it"):
                await first.rollback()
            with pytest.raises(SharedTransactionError, match="was undone"):
                await second.commit()


async def test_the_tests_session_blocks_no_other_session(db: DBConnect) -> None:
    async def read() -> list[str]:
        session = await db_session(db)
        return list((await session.scalars(select(Item.name))).all())

    async with shared_transaction(db, timeout=0.05) as session:
        running = asyncio.Event()

        async def application() -> list[str]:
            await running.wait()
            return await run_in_new_ctx(read)

        task = asyncio.create_task(application())
        session.add(Item(name="prepared"))
        await session.flush()
        running.set()
        assert await task == ["prepared"]
        await session.rollback()
        assert await names(db) == ["prepared"]


@pytest.mark.parametrize("fails", [False, True])
async def test_the_tests_session_blocks_no_other_session_after_a_savepoint(db: DBConnect, *, fails: bool) -> None:
    async with shared_transaction(db, timeout=0.05) as session:
        session.add(Item(name="prepared"))
        with suppress(LookupError):
            async with session.begin_nested():
                session.add(Item(name="behind"))
                await session.flush()
                if fails:
                    raise LookupError
        await asyncio.create_task(run_in_new_ctx(insert, db, "application"))
        await session.rollback()
        assert await names(db) == ["application", *(() if fails else ("behind",)), "prepared"]


async def test_a_savepoint_that_is_open_keeps_others_waiting(db: DBConnect) -> None:
    may_write = asyncio.Event()

    async def write() -> None:
        await may_write.wait()
        await insert(db, "two")

    async with shared_transaction(db, timeout=0.05) as session:
        task = asyncio.create_task(run_in_new_ctx(write))
        async with session.begin_nested():
            async with session.begin_nested():
                session.add(Item(name="one"))
            may_write.set()
            with pytest.raises(SharedTransactionError, match="commit or roll back that one first"):
                await task
        await asyncio.create_task(run_in_new_ctx(insert, db, "three"))
        assert await names(db) == ["one", "three"]


@pytest.mark.parametrize("lock", ["SELECT name FROM item FOR UPDATE", "SELECT pg_advisory_xact_lock(1)"])
async def test_session_with_a_lock_blocks_other_sessions(db: DBConnect, postgresql: None, lock: str) -> None:
    async def count_up() -> None:
        session = await db_session(db)
        await session.execute(text(lock))
        number = await session.scalar(text("SELECT name FROM item"))
        await asyncio.sleep(0)
        await session.execute(text("UPDATE item SET name = :name"), {"name": str(int(number) + 1)})

    async with shared_transaction(db) as session:
        session.add(Item(name="0"))
        await session.flush()
        await gather_in_new_ctx(*[count_up] * 5)
        assert await names(db) == ["5"]


async def test_a_roll_back_of_what_has_only_taken_a_lock_undoes_nothing(db: DBConnect, postgresql: None) -> None:
    async with shared_transaction(db):
        with pytest.raises(LookupError):
            async with new_db_ctx():
                await (await db_session(db)).execute(select(Item).with_for_update())
                await run_in_new_ctx(insert, db, "stands")
                raise LookupError
        assert await names(db) == ["stands"]


async def test_the_tests_session_can_be_rolled_back(db: DBConnect) -> None:
    async with shared_transaction(db) as session:
        session.add(Item(name="one"))
        await session.flush()
        await session.rollback()
        assert await names(db) == []


async def test_a_failing_test_keeps_its_error_and_is_told_the_problem(db: DBConnect) -> None:
    with pytest.raises(AssertionError) as caught:
        async with shared_transaction(db):
            with pytest.raises(LookupError):
                async with new_db_ctx():
                    await insert(db, "outer")
                    await run_in_new_ctx(insert, db, "inner")
                    raise LookupError
            assert await names(db) == ["inner"]
    assert "has undone what another session had committed" in "".join(caught.value.__notes__)


async def test_a_deadlock_of_one_task_is_found_at_once_while_it_commits(db: DBConnect) -> None:
    """What is written by the commit of a unit of work runs in a stand-in of its task."""
    with pytest.raises(SharedTransactionError, match="has undone"):
        async with shared_transaction(db, timeout=60), asyncio.timeout(20), new_non_ctx_session(db) as second:
            with pytest.raises(SharedTransactionError, match="one that was begun after it"):
                async with new_db_ctx():
                    first = await insert(db, "first")
                    second.add(Item(name="second"))
                    await second.flush()
                    first.add(Item(name="third"))
            with pytest.raises(SharedTransactionError, match="was undone"):
                await second.commit()
