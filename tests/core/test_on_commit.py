"""`on_commit` callbacks and savepoints: what is undone runs none."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import IntegrityError
from tests.support.database import Database, insert

from ctxdb_core import DBConnect, atomic_db_session, commit_db_session, db_session, new_db_ctx, on_commit

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


@KINDS
async def test_a_callback_goes_with_the_savepoint_that_is_rolled_back(db: DBConnect, database: Database) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        on_commit(db, lambda: seen.append("before"))
        with pytest.raises(LookupError):
            async with session.begin_nested():
                on_commit(db, lambda: seen.append("undone"))
                raise LookupError
        on_commit(db, lambda: seen.append("after"))
    assert seen == ["before", "after"]
    assert await database.names() == ["one"]


async def test_a_block_behind_a_savepoint_takes_its_callbacks_along(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        await insert(db, "one")
        with pytest.raises(LookupError):
            async with atomic_db_session(db, current_transaction="savepoint"):
                on_commit(db, lambda: seen.append("undone"))
                raise LookupError
        async with atomic_db_session(db, current_transaction="savepoint"):
            on_commit(db, lambda: seen.append("released"))
    assert seen == ["released"]


async def test_a_callback_of_a_released_savepoint_goes_with_the_savepoint_around_it(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        outer = await session.begin_nested()
        async with session.begin_nested():
            on_commit(db, lambda: seen.append("released, then undone"))
        await outer.rollback()
        async with session.begin_nested(), session.begin_nested():
            on_commit(db, lambda: seen.append("released twice"))
    assert seen == ["released twice"]


async def test_a_callback_of_the_outer_savepoint_outlives_the_inner_one(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        async with session.begin_nested():
            on_commit(db, lambda: seen.append("outer"))
            inner = await session.begin_nested()
            on_commit(db, lambda: seen.append("inner"))
            await inner.rollback()
    assert seen == ["outer"]


async def test_a_savepoint_that_a_failing_statement_undoes_takes_its_callbacks_along(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                on_commit(db, lambda: seen.append("undone"))
                await insert(db, "one")
    assert seen == []


async def test_a_callback_that_was_registered_before_the_session_outlives_every_savepoint(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        on_commit(db, lambda: seen.append("early"))
        savepoint = await (await db_session(db)).begin_nested()
        await savepoint.rollback()
    assert seen == ["early"]


async def test_an_early_commit_with_open_savepoints_runs_their_callbacks(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        await session.begin_nested()
        await session.begin_nested()
        on_commit(db, lambda: seen.append("committed"))
        await commit_db_session(db)
        assert seen == ["committed"]


async def test_a_roll_back_of_everything_takes_the_callbacks_of_released_savepoints_along(db: DBConnect) -> None:
    seen: list[str] = []
    with pytest.raises(LookupError):
        async with new_db_ctx():
            session = await insert(db, "one")
            async with session.begin_nested():
                on_commit(db, lambda: seen.append("undone"))
            raise LookupError
    assert seen == []
