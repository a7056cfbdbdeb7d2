"""The warning of a unit of work that is thrown away without being ended, and the units that it does not concern."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from weakref import ref

from sqlalchemy import text
from tests.support.database import Database, eventually, insert

from ctxdb_core import DBConnect, close_db_session, db_session, new_db_ctx
from ctxdb_core.adapters import UnitOfWork, begin, finalize, running_unit


@asynccontextmanager
async def resource_warnings() -> AsyncIterator[list[str]]:
    """Collect the garbage of the block, and the warnings that this gives."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
        await collect_garbage()
    found += _of_units(caught)


def _of_units(caught: list[warnings.WarningMessage]) -> list[str]:
    messages = [str(warning.message) for warning in caught if warning.category is ResourceWarning]
    # There may be the garbage of other tests.
    return [message for message in messages if "unit of work" in message]


async def collect_garbage() -> None:
    # The event loop keeps callbacks that are due, with their contexts, until its next turn.
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()


def begun() -> UnitOfWork:
    unit = begin()
    assert unit is not None
    return unit


async def test_a_unit_of_work_that_is_thrown_away_with_an_open_session_is_warned_of(db: DBConnect) -> None:
    async with resource_warnings() as found:
        unit = begun()
        await db_session(db)
        unit.leave()
        del unit
    (warning,) = found
    assert "<DBConnect host='127.0.0.1'>" in warning
    assert "new_db_ctx" in warning
    assert "finalize" in warning


async def test_the_connection_of_a_unit_of_work_that_is_thrown_away_is_closed(database: Database) -> None:
    async with DBConnect.from_url(database.url) as db:
        async with resource_warnings() as found:
            unit = begun()
            await insert(db, "one")
            unit.leave()
            del unit
        assert len(found) == 1
        await eventually(lambda: not database.backends("true"), "the connection is still open")
    assert await database.names() == []


async def test_a_connection_does_not_keep_the_unit_of_work_that_it_was_opened_in(db: DBConnect) -> None:
    unit = begun()
    await insert(db, "one")
    await finalize(unit, commit=True)
    ended = ref(unit)
    del unit
    await collect_garbage()
    assert ended() is None


async def test_several_open_sessions_are_named_together(db: DBConnect, database: Database) -> None:
    async with resource_warnings() as found, DBConnect(lambda host: database.watch_new(), host="second") as second:
        unit = begun()
        for each in (db, second):
            await db_session(each)
        unit.leave()
        del unit
    assert len(found) == 1
    assert "127.0.0.1" in found[0]
    assert "second" in found[0]


async def test_ended_units_are_not_reported(db: DBConnect) -> None:
    async with resource_warnings() as found:
        async with new_db_ctx():
            await insert(db, "one")
        with suppress(LookupError):
            async with new_db_ctx():
                await insert(db, "two")
                raise LookupError
        for last in (False, True):
            unit = begun()
            await insert(db, f"finalized {last}")
            if not last:
                await finalize(unit, commit=True, last=False)
            await finalize(unit, commit=True)
            del unit
        async with new_db_ctx():
            await db_session(db)
    assert found == []


async def test_unit_without_open_sessions_is_not_reported(db: DBConnect) -> None:
    async with resource_warnings() as found:
        unit = begun()
        unit.leave()
        del unit
        unit = begun()
        await insert(db, "one")
        await close_db_session(db)
        unit.leave()
        del unit
    assert found == []


async def test_unit_of_a_cancelled_task_is_not_reported(db: DBConnect) -> None:
    async def work() -> None:
        async with new_db_ctx():
            await insert(db, "one")
            await asyncio.Event().wait()

    async with resource_warnings() as found:
        tasks = [asyncio.create_task(work()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        del tasks, task
    assert found == []


def test_units_are_not_reported_when_their_event_loop_ends() -> None:
    async def main() -> None:
        db = DBConnect.from_url("sqlite+aiosqlite://")
        holding = asyncio.Event()

        async def work() -> None:
            async with new_db_ctx():
                session = await db_session(db)
                await session.connection()
                holding.set()
                await asyncio.Event().wait()

        tasks.append(asyncio.create_task(work()))
        await holding.wait()

    tasks: list[asyncio.Task[None]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
        assert tasks.pop().cancelled()
        gc.collect()
    assert _of_units(caught) == []


def test_the_warning_shows_where_the_session_was_opened_if_asked_to() -> None:
    import tracemalloc

    async def main() -> None:
        unit = begun()
        await db_session(DBConnect.from_url("sqlite+aiosqlite://"))
        unit.leave()

    tracemalloc.start(25)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            asyncio.run(main())
            gc.collect()
        (warning,) = (each for each in caught if "unit of work" in str(each.message))
        traceback = tracemalloc.get_object_traceback(warning.source)
        assert traceback is not None
        assert any(frame.filename == __file__ for frame in traceback)
    finally:
        tracemalloc.stop()


async def test_a_connection_does_not_keep_the_unit_of_work_whose_commit_it_was_asked_about(database: Database) -> None:
    async with DBConnect(
        lambda host: database.watch_new(), host="127.0.0.1", resolve_commits=database.is_postgresql
    ) as db:

        async def work() -> ref[UnitOfWork]:
            async with new_db_ctx():
                await insert(db, "a")
                unit = running_unit()
                assert unit is not None
                return ref(unit)

        # The connection is opened by another unit, whose context is that of another task.
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))
        unit = await asyncio.create_task(work())
        await collect_garbage()
        assert unit() is None
        assert database.connections == 1
