"""`begin` and `finalize`, as an adapter uses them."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError
from tests.support.database import Database, insert, insert_row_that_fails_at_commit

from ctxdb_core import ContextClosedError, DBConnect, db_session, new_db_ctx
from ctxdb_core.adapters import UnitOfWork, begin, finalize, is_context_initiated, is_inside


def begun(request: MutableMapping[str, Any] | None = None) -> UnitOfWork:
    unit = begin(request)
    assert unit is not None
    return unit


async def test_a_unit_of_work_lasts_until_its_last_finalize(db: DBConnect, database: Database) -> None:
    unit = begun()
    assert is_context_initiated()
    session = await insert(db, "response")
    await finalize(unit, commit=True, last=False)
    assert await database.names() == ["response"]
    assert database.checked_out == 0
    assert await insert(db, "background") is session
    await finalize(unit, commit=True)
    assert await database.names() == ["background", "response"]
    assert not is_context_initiated()


async def test_a_roll_back_for_the_response_leaves_what_follows(db: DBConnect, database: Database) -> None:
    unit = begun()
    await insert(db, "response")
    await finalize(unit, commit=False, last=False)
    await insert(db, "background")
    await finalize(unit, commit=True)
    assert await database.names() == ["background"]


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("block", ["begin", "begin_nested"])
async def test_work_after_the_response_in_a_block_around_its_start_is_committed_at_the_end(
    db: DBConnect, database: Database, block: str, *, commit: bool
) -> None:
    unit = begin()
    assert unit is not None
    # As a dependency of FastAPI does, which ends after the background tasks.
    async with getattr(await db_session(db), block)():
        await insert(db, "response")
        await finalize(unit, commit=commit, last=False)
        await insert(db, "task")
        async with (await db_session(db)).begin_nested():
            await insert(db, "task, too")
    await insert(db, "then")
    await finalize(unit, commit=True)
    assert await database.names() == [*(["response"] if commit else []), "task", "task, too", "then"]


async def test_finalizing_again_does_nothing(db: DBConnect, database: Database) -> None:
    unit = begun()
    await insert(db, "one")
    await finalize(unit, commit=True)
    await finalize(unit, commit=False)
    assert await database.names() == ["one"]


async def test_a_failing_commit_leaves_a_unit_that_can_still_be_ended(db: DBConnect, database: Database) -> None:
    unit = begun()
    await insert_row_that_fails_at_commit(db)
    with pytest.raises(IntegrityError):
        await finalize(unit, commit=True, last=False)
    assert database.checked_out == 0
    await insert(db, "of the error response")
    await finalize(unit, commit=True)
    assert await database.names() == ["of the error response"]


async def test_a_failing_last_commit_closes_everything(db: DBConnect, database: Database) -> None:
    unit = begun()
    await insert_row_that_fails_at_commit(db)
    with pytest.raises(IntegrityError):
        await finalize(unit, commit=True)
    assert database.checked_out == 0
    assert unit.closed
    assert not is_context_initiated()


async def test_a_failing_roll_back_is_attached_to_the_error(db: DBConnect, database: Database) -> None:
    unit = begun()
    session = await insert(db, "one")
    original = session.rollback

    async def failing_rollback() -> None:
        await original()
        raise OSError("the roll-back failed")

    session.rollback = failing_rollback  # type: ignore[method-assign]  # a failure that cannot be had otherwise
    error = LookupError("the original")
    await finalize(unit, commit=False, error=error)
    assert any("the roll-back failed" in note for note in error.__notes__)
    assert database.checked_out == 0


async def test_a_failing_close_hinders_no_other_close(db: DBConnect, database: Database) -> None:
    async with database.connect() as second:
        unit = begun()
        first = await insert(db, "one")
        await insert(second, "two")

        async def failing_close() -> None:
            raise OSError("closing failed")

        first.close = failing_close  # type: ignore[method-assign]  # as above
        error = LookupError("the original")
        await finalize(unit, commit=False, error=error)
        assert database.checked_out == 0
        assert await database.names() == []


async def test_an_adapter_installed_twice_leaves_the_end_to_the_outer_one() -> None:
    request: dict[str, Any] = {}
    unit = begun(request)
    assert begin(request) is None
    await finalize(unit, commit=True)
    again = begun(request)
    await finalize(again, commit=True)


async def test_an_inherited_unit_of_work_is_not_joined() -> None:
    async with new_db_ctx():
        unit = begun({})
        await finalize(unit, commit=True)
        assert is_context_initiated()


async def test_a_unit_of_work_that_a_test_harness_shares_is_joined() -> None:
    class Shared(UnitOfWork):
        shared = True

    unit = Shared()
    unit.enter()
    assert begin({}) is None
    unit.leave()
    own = begun({})
    await finalize(own, commit=True)


async def test_unit_can_be_finalized_in_another_task(db: DBConnect, database: Database) -> None:
    unit = begun()
    await insert(db, "one")
    await asyncio.create_task(finalize(unit, commit=True))
    assert await database.names() == ["one"]
    assert not is_context_initiated()
    with pytest.raises(ContextClosedError):
        await db_session(db)
    unit.leave()


async def test_code_is_inside_of_a_unit_of_work_also_in_tasks_and_in_units_within_it() -> None:
    async def look() -> bool:
        return is_inside(unit)

    unit = begun()
    assert is_inside(unit)
    assert await asyncio.create_task(look())
    async with new_db_ctx(), new_db_ctx():
        assert is_inside(unit)
        assert await asyncio.create_task(look())
    await finalize(unit, commit=True)
    assert not is_inside(unit)


async def test_code_around_or_beside_a_unit_of_work_is_not_inside_of_it() -> None:
    async def begin_beside() -> UnitOfWork:
        return begun()

    beside = await asyncio.create_task(begin_beside())
    assert not is_inside(beside)
    async with new_db_ctx():
        assert not is_inside(beside)
    await finalize(beside, commit=True)
