"""Transactions that the server has rolled back by itself: no commit of a part of one is taken for a success."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.database import eventually, insert
from tests.support.mariadb import EmbeddedMariaDB, MariaDatabase

from ctxdb_core import (
    DBConnect,
    TransactionAbortedError,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    on_commit,
    on_rollback,
    retry_on_conflict,
    rollback_db_session,
)


async def _lock(session: AsyncSession, counter: int) -> None:
    await session.execute(text("UPDATE counter SET value = value + 1 WHERE id = :id"), {"id": counter})


async def _meet_deadlock(db: DBConnect, database: MariaDatabase, session: AsyncSession) -> None:
    """Have `session`, whose transaction holds little, be the victim of a deadlock."""
    await _lock(session, 1)
    async with new_non_ctx_session(db) as other:
        # The server rolls back the transaction that has changed the least.
        for number in range(20):
            await other.execute(text("INSERT INTO item VALUES (:name)"), {"name": f"other {number}"})
        await _lock(other, 2)
        waiting = asyncio.create_task(_lock(other, 1))
        await eventually(
            lambda: any("counter" in each for each in database.statements()), "no transaction waits for the row"
        )
        try:
            await _lock(session, 2)
        finally:
            await waiting
            await other.rollback()


async def _meet_timeout(db: DBConnect, session: AsyncSession) -> None:
    await session.execute(text("SET innodb_lock_wait_timeout = 0"))
    async with new_non_ctx_session(db) as other:
        await _lock(other, 1)
        await _lock(session, 1)


async def test_a_commit_after_a_swallowed_deadlock_is_an_error(db: DBConnect, database: MariaDatabase) -> None:
    outcomes: list[str] = []
    with pytest.raises(TransactionAbortedError, match=r"UPDATE counter.*1213"):
        async with new_db_ctx():
            on_commit(db, lambda: outcomes.append("committed"))
            on_rollback(db, lambda: outcomes.append("rolled back"))
            session = await insert(db, "a")
            with pytest.raises(OperationalError, match="1213"):
                await _meet_deadlock(db, database, session)
    assert outcomes == ["rolled back"]
    assert await database.names() == []


async def test_a_statement_after_a_swallowed_deadlock_is_refused(db: DBConnect, database: MariaDatabase) -> None:
    with pytest.raises(TransactionAbortedError):
        async with new_db_ctx():
            session = await insert(db, "a")
            with pytest.raises(OperationalError, match="1213"):
                await _meet_deadlock(db, database, session)
            await insert(db, "b")
    assert await database.names() == []


async def test_a_savepoint_does_not_contain_a_deadlock(db: DBConnect, database: MariaDatabase) -> None:
    with pytest.raises(TransactionAbortedError):
        async with new_db_ctx():
            session = await insert(db, "a")
            with pytest.raises(OperationalError, match="1213"):
                async with session.begin_nested():
                    await _meet_deadlock(db, database, session)
            await insert(db, "b")
    assert await database.names() == []


async def test_a_deadlock_surfaces_from_a_savepoint(db: DBConnect, database: MariaDatabase) -> None:
    with pytest.raises(OperationalError, match="1213"):
        async with new_db_ctx():
            session = await db_session(db)
            async with session.begin_nested(), session.begin_nested():
                await _meet_deadlock(db, database, session)


async def test_a_unit_goes_on_after_it_has_rolled_a_deadlock_back(db: DBConnect, database: MariaDatabase) -> None:
    async with new_db_ctx():
        session = await insert(db, "a")
        with pytest.raises(OperationalError, match="1213"):
            await _meet_deadlock(db, database, session)
        await rollback_db_session(db)
        await insert(db, "b")
    assert await database.names() == ["b"]


async def test_a_deadlock_is_a_conflict_that_is_tried_again(db: DBConnect, database: MariaDatabase) -> None:
    attempts: list[int] = []

    @retry_on_conflict(wait=0)
    async def work() -> None:
        attempts.append(len(attempts))
        session = await insert(db, "a")
        if len(attempts) == 1:
            await _meet_deadlock(db, database, session)

    await work()
    assert attempts == [0, 1]
    assert await database.names() == ["a"]


async def test_a_commit_after_a_swallowed_lock_timeout_is_an_error(db: DBConnect, database: MariaDatabase) -> None:
    with pytest.raises(TransactionAbortedError, match="1205"):
        async with new_db_ctx():
            session = await insert(db, "a")
            with pytest.raises(OperationalError, match="1205"):
                await _meet_timeout(db, session)
    assert await database.names() == []


async def test_a_savepoint_contains_a_lock_timeout(db: DBConnect, database: MariaDatabase) -> None:
    async with new_db_ctx():
        session = await insert(db, "a")
        with pytest.raises(OperationalError, match="1205"):
            async with session.begin_nested():
                await insert(db, "b")
                await _meet_timeout(db, session)
        await insert(db, "c")
    assert await database.names() == ["a", "c"]


async def test_a_savepoint_that_has_swallowed_a_lock_timeout_is_not_released(
    db: DBConnect, database: MariaDatabase
) -> None:
    with pytest.raises(TransactionAbortedError):
        async with new_db_ctx():
            session = await insert(db, "a")
            async with session.begin_nested():
                await insert(db, "b")
                with pytest.raises(OperationalError, match="1205"):
                    await _meet_timeout(db, session)
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["asyncmy"], indirect=True)
@pytest.mark.usefixtures("mariadb_server")
async def test_a_savepoint_that_the_server_has_rolled_back_contains_no_lock_timeout(database_kind: str) -> None:
    pytest.importorskip(database_kind)
    with EmbeddedMariaDB("--innodb-rollback-on-timeout") as server:
        database = MariaDatabase(server, database_kind, "test_rollback_on_timeout")
        async with database.connect() as db:
            with pytest.raises(TransactionAbortedError, match="1205"):
                async with new_db_ctx():
                    session = await insert(db, "a")
                    with pytest.raises(OperationalError, match="1205"):
                        async with session.begin_nested():
                            await _meet_timeout(db, session)
                    await insert(db, "b")
            assert await database.names() == []
        database.close()


async def test_a_duplicate_key_may_be_swallowed(db: DBConnect, database: MariaDatabase) -> None:
    async with new_db_ctx():
        await insert(db, "a")
        with pytest.raises(IntegrityError):
            await insert(db, "a")
        await insert(db, "b")
    assert await database.names() == ["a", "b"]


async def test_a_deadlock_in_autocommit_dooms_nothing(database: MariaDatabase) -> None:
    async with database.connect(isolation_level="AUTOCOMMIT") as db, new_db_ctx():
        session = await insert(db, "a")
        await session.execute(text("SET innodb_lock_wait_timeout = 0"))
        async with database.connect() as held, new_non_ctx_session(held) as other:
            await _lock(other, 1)
            with pytest.raises(OperationalError, match="1205"):
                await _lock(session, 1)
        await insert(db, "b")
    assert await database.names() == ["a", "b"]
