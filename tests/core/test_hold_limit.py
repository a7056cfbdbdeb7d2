"""The warning about connections that are held for too long, and where in the code they were taken."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from tests.support.database import Database, Item, insert

from ctxdb_core import (
    DBConnect,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from ctxdb_core._databases.hold import Hold

AN_HOUR = 3600.0
TAKEN = re.compile(r"taken at (?P<file>.+):(?P<line>\d+) in (?P<function>[\w.<>]+)\(\)")

everywhere = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


def limited(database: Database, limit: float) -> DBConnect:
    return DBConnect(lambda host: database.watch_new(), host="here", warn_connection_held_after=limit)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def messages() -> list[str]:
        return [record.getMessage() for record in caplog.records if "longer than" in record.getMessage()]

    return messages


def line_of(comment: str) -> int:
    (line,) = (
        number
        for number, line in enumerate(Path(__file__).read_text(encoding="utf-8").splitlines(), start=1)
        if line.endswith(f"# {comment}")
    )
    return line


async def take(db: DBConnect) -> None:
    session = await db_session(db)
    await session.execute(text("SELECT 1"))  # taken here


@everywhere
async def test_the_code_that_holds_a_connection_is_named_while_it_holds_it(
    database: Database, warnings: Callable[[], list[str]]
) -> None:
    async with limited(database, 0) as db, new_db_ctx():
        await take(db)
        (warning,) = warnings()
        place = TAKEN.search(warning)
        assert place is not None
        assert place.groupdict() == {"file": __file__, "line": str(line_of("taken here")), "function": "take"}
        assert "<DBConnect host='here'>" in warning
        assert "longer than 0 s" in warning


async def test_a_connection_is_warned_of_once(database: Database, warnings: Callable[[], list[str]]) -> None:
    async with limited(database, 0) as db, new_db_ctx():
        for _ in range(3):
            await take(db)
        await commit_db_session(db)
        assert len(warnings()) == 1


async def test_each_transaction_that_holds_a_connection_too_long_is_warned_of(
    database: Database, warnings: Callable[[], list[str]]
) -> None:
    async with limited(database, 0) as db, new_db_ctx():
        await take(db)
        await commit_db_session(db)
        await take(db)
        assert len(warnings()) == 2


async def test_connection_taken_by_a_flush_is_attributed_to_the_commit(
    database: Database, warnings: Callable[[], list[str]]
) -> None:
    async with limited(database, 0) as db, new_db_ctx():
        (await db_session(db)).add(Item(name="one"))
        await commit_db_session(db)  # committed here
    (warning,) = warnings()
    assert f"{__file__}:{line_of('committed here')} in test_connection_taken_by_a_flush" in warning


async def test_sessions_outside_of_any_unit_of_work_are_warned_of(
    database: Database, warnings: Callable[[], list[str]]
) -> None:
    async with limited(database, 0) as db, new_non_ctx_session(db) as session:
        await session.execute(text("SELECT 1"))
        assert len(warnings()) == 1


async def test_the_warning_names_the_host_that_the_connection_leads_to(
    database: Database, warnings: Callable[[], list[str]]
) -> None:
    async with limited(database, 0) as db, new_db_ctx():
        await db_session(db)
        await db.change_host("there")
        await take(db)
    assert "host='here'" in warnings()[0]


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[asyncio.TimerHandle]]:
    """The timers of one hour, which only a hold limit of one hour starts."""
    started: list[asyncio.TimerHandle] = []
    loop_class = asyncio.BaseEventLoop
    call_later = loop_class.call_later

    def noted(loop: Any, delay: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        handle = call_later(loop, delay, *args, **kwargs)
        if delay == AN_HOUR:
            started.append(handle)
        return handle

    monkeypatch.setattr(loop_class, "call_later", noted)
    yield started
    assert all(handle.cancelled() for handle in started)


@everywhere
async def test_timer_is_cancelled_once_the_connection_is_back(
    database: Database, warnings: Callable[[], list[str]], timers: list[asyncio.TimerHandle]
) -> None:
    async with limited(database, AN_HOUR) as db:
        async with new_db_ctx():
            await take(db)
            assert [handle.cancelled() for handle in timers] == [False]
            await commit_db_session(db)
            assert [handle.cancelled() for handle in timers] == [True]
            await take(db)
        assert [handle.cancelled() for handle in timers] == [True, True]
    assert warnings() == []


@everywhere
async def test_timer_is_cancelled_with_a_cancelled_statement(
    database: Database, timers: list[asyncio.TimerHandle]
) -> None:
    async with limited(database, AN_HOUR) as db:

        async def work() -> None:
            async with new_db_ctx():
                await insert(db, "one")
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_soon(task.cancel)
                await insert(db, "two")

        with suppress(asyncio.CancelledError):
            await asyncio.create_task(work())
        assert [handle.cancelled() for handle in timers] == [True]


async def test_timer_is_cancelled_with_an_invalidated_connection(
    database: Database, timers: list[asyncio.TimerHandle]
) -> None:
    async with limited(database, AN_HOUR) as db, new_non_ctx_session(db) as session:
        await session.execute(text("SELECT 1"))
        await session.invalidate()
        assert [handle.cancelled() for handle in timers] == [True]


async def test_without_a_limit_nothing_is_timed(
    database: Database, db: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr("ctxdb_core._databases.observer.Hold", unwanted)
    db.on_event(lambda event: None)
    await run_in_new_ctx(insert, db, "one")


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    yield engine
    engine.dispose()


async def test_a_hold_that_has_blocked_the_event_loop_is_warned_of_at_its_end(
    engine: Engine, warnings: Callable[[], list[str]]
) -> None:
    with engine.connect() as connection:
        hold = Hold("here", connection, 0)
        hold.end()
    await asyncio.sleep(0)
    (warning,) = warnings()
    assert "was held for" in warning


@pytest.mark.parametrize("forgotten", [True, False])
async def test_a_connection_that_is_back_by_another_way_is_not_warned_of(
    engine: Engine, warnings: Callable[[], list[str]], forgotten: bool
) -> None:
    connection = engine.connect()
    hold = Hold("here", connection, 0)
    if forgotten:
        del connection
        gc.collect()
    else:
        connection.close()
    for _ in range(3):
        await asyncio.sleep(0)
    assert warnings() == []
    del hold


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        DBConnect.from_url("sqlite+aiosqlite://", warn_connection_held_after=-1)


async def test_from_url_takes_the_limit(database: Database, warnings: Callable[[], list[str]]) -> None:
    async with DBConnect.from_url(database.url, warn_connection_held_after=0) as db, new_db_ctx():
        await take(db)
    assert len(warnings()) == 1
