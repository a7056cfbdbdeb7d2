"""What a `DBConnect` tells its listeners."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar

import pytest
from sqlalchemy import text
from sqlalchemy.event import listen
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from tests.support.database import Database, Item, eventually, insert, insert_row_that_fails_at_commit

from ctxdb_core import (
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    gather_in_new_ctx,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
    run_in_new_ctx,
)
from ctxdb_core.events import (
    DBEvent,
    SessionClosed,
    SessionOpened,
    TransactionBegun,
    TransactionCommitted,
    TransactionRolledBack,
)

SELECT = text("SELECT 1")
SECRETIVE = "postgresql+asyncpg://user:s3cret@host/app?password=s3cret"
ONE_COMMIT = [SessionOpened, TransactionBegun, TransactionCommitted, SessionClosed]
ONE_ROLL_BACK = [SessionOpened, TransactionBegun, TransactionRolledBack, SessionClosed]

everywhere = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


class Heard(list[DBEvent]):
    """A listener that keeps what it hears."""

    def __call__(self, event: DBEvent) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[type[DBEvent]]:
        return [type(event) for event in self]

    @property
    def roll_back(self) -> TransactionRolledBack:
        (found,) = (event for event in self if isinstance(event, TransactionRolledBack))
        return found

    def assert_paired(self) -> None:
        """Every session is opened and closed, every transaction begun and ended, each once and in its order."""
        for session_id in {event.session_id for event in self}:
            kinds = [type(event) for event in self if event.session_id == session_id]
            assert (kinds[0], kinds[-1]) == (SessionOpened, SessionClosed), kinds
            between = kinds[1:-1]
            assert between[::2] == [TransactionBegun] * (len(between) // 2), kinds
            assert set(between[1::2]) <= {TransactionCommitted, TransactionRolledBack}, kinds


@pytest.fixture
def heard(db: DBConnect) -> Heard:
    heard = Heard()
    db.on_event(heard)
    return heard


@everywhere
async def test_a_unit_of_work_tells_of_its_session_and_transaction(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        await insert(db, "one")
    assert heard.kinds == ONE_COMMIT
    assert {(event.db, event.host, event.session_id) for event in heard} == {(db, "127.0.0.1", heard[0].session_id)}


async def test_events_of_different_sessions_have_different_ids(db: DBConnect, heard: Heard) -> None:
    await gather_in_new_ctx(lambda: insert(db, "one"), lambda: insert(db, "two"))
    assert len({event.session_id for event in heard}) == 2
    heard.assert_paired()


async def test_a_session_without_a_statement_has_no_transaction(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        await db_session(db)
        await commit_db_session(db)
    assert heard.kinds == [SessionOpened, SessionClosed]
    closed = heard[-1]
    assert isinstance(closed, SessionClosed)
    assert (closed.transactions, closed.connection_held) == (0, 0)


async def test_each_transaction_of_a_session_is_told(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        await commit_db_session(db)
        await insert(db, "two")
        await rollback_db_session(db)
        async with atomic_db_session(db) as session:
            await session.execute(SELECT)
        await close_db_session(db)
    assert heard.kinds == [
        SessionOpened,
        *(TransactionBegun, TransactionCommitted),
        *(TransactionBegun, TransactionRolledBack),
        *(TransactionBegun, TransactionCommitted),
        SessionClosed,
    ]


async def test_a_closed_session_tells_how_long_it_has_held_connections_in_all(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        await commit_db_session(db)
        await insert(db, "two")
    ends = [event for event in heard if isinstance(event, TransactionCommitted)]
    closed = heard[-1]
    assert isinstance(closed, SessionClosed)
    assert closed.transactions == 2
    assert closed.connection_held == sum(end.connection_held for end in ends)
    assert all(0 < end.duration <= end.connection_held <= closed.duration for end in ends)


async def test_a_session_that_replaces_a_closed_session_has_events_of_its_own(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        await close_db_session(db)
        await insert(db, "two")
    assert heard.kinds == ONE_ROLL_BACK + ONE_COMMIT


@everywhere
async def test_the_connection_is_back_when_the_end_of_a_transaction_is_told(db: DBConnect, database: Database) -> None:
    checked_out: list[tuple[type[DBEvent], int]] = []
    db.on_event(lambda event: checked_out.append((type(event), database.checked_out)))
    async with new_db_ctx():
        await insert(db, "one")
    with suppress(LookupError):
        async with new_db_ctx():
            await insert(db, "two")
            raise LookupError
    assert checked_out == [*zip(ONE_COMMIT, (0, 1, 0, 0), strict=True), *zip(ONE_ROLL_BACK, (0, 1, 0, 0), strict=True)]


async def test_an_error_of_the_code_comes_with_the_roll_back(db: DBConnect, heard: Heard) -> None:
    error = LookupError()
    with suppress(LookupError):
        async with new_db_ctx():
            await insert(db, "one")
            raise error
    assert heard.kinds == ONE_ROLL_BACK
    assert heard.roll_back.error is error
    assert not heard.roll_back.commit_failed


@everywhere
async def test_a_failing_commit_is_a_roll_back_with_its_error(db: DBConnect, heard: Heard) -> None:
    with pytest.raises(IntegrityError) as caught:
        async with new_db_ctx():
            await insert_row_that_fails_at_commit(db)
    assert heard.kinds == ONE_ROLL_BACK
    assert heard.roll_back.commit_failed
    assert heard.roll_back.error is caught.value


async def test_a_failing_flush_of_a_commit_is_a_failed_commit(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        await insert(db, "one")
    heard.clear()
    with pytest.raises(IntegrityError) as caught:
        async with new_db_ctx():
            (await db_session(db)).add(Item(name="one"))
    assert heard.kinds == ONE_ROLL_BACK
    assert heard.roll_back.commit_failed
    assert heard.roll_back.error is caught.value


async def test_a_wanted_roll_back_has_no_error(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        await rollback_db_session(db)
    assert heard.roll_back.error is None
    assert not heard.roll_back.commit_failed


async def test_an_earlier_error_is_not_taken_for_the_reason_of_a_later_roll_back(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        with suppress(LookupError):
            async with atomic_db_session(db) as session:
                await session.execute(SELECT)
                raise LookupError
        await insert(db, "one")
        await rollback_db_session(db)
    assert [event.error is None for event in heard if isinstance(event, TransactionRolledBack)] == [False, True]


async def test_an_error_before_the_first_connection_is_not_taken_for_the_reason_of_a_later_roll_back(
    db: DBConnect, heard: Heard
) -> None:
    async with new_db_ctx():
        with suppress(LookupError):
            async with atomic_db_session(db) as session:
                session.add(Item(name="one"))
                raise LookupError
        await insert(db, "one")
        await rollback_db_session(db)
    assert heard.roll_back.error is None


class Interruption(BaseException):
    """Something that keeps SQLAlchemy from saying that a transaction has ended."""


@pytest.fixture
async def interrupted(db: DBConnect, heard: Heard) -> AsyncSession:
    """A session whose commit was interrupted after it had succeeded."""
    session = await db.create_session()
    await session.execute(SELECT)
    pool = (await db.engine()).pool
    interrupted = False

    def interrupt(*args: object) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise Interruption

    listen(pool, "reset", interrupt)
    with pytest.raises(Interruption):
        await session.commit()
    assert heard.kinds == ONE_COMMIT[:2]
    return session


async def test_an_end_that_was_interrupted_is_told_when_the_session_is_closed(
    interrupted: AsyncSession, heard: Heard
) -> None:
    await interrupted.close()
    assert heard.kinds == ONE_COMMIT


async def test_an_end_that_was_interrupted_is_told_when_the_next_transaction_begins(
    interrupted: AsyncSession, heard: Heard
) -> None:
    await interrupted.execute(SELECT)
    await interrupted.close()
    assert heard.kinds == [*ONE_COMMIT[:3], *ONE_ROLL_BACK[1:]]


async def test_savepoints_are_no_transactions(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        async with session.begin_nested():
            await insert(db, "one")
        savepoint = await session.begin_nested()
        await insert(db, "two")
        await savepoint.rollback()
        await insert(db, "three")
    assert heard.kinds == ONE_COMMIT


async def test_a_roll_back_after_a_savepoint_was_released_is_no_commit(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        async with session.begin_nested():
            await insert(db, "one")
        await close_db_session(db)
    assert heard.kinds == ONE_ROLL_BACK
    assert not heard.roll_back.commit_failed
    assert heard.roll_back.duration == heard.roll_back.connection_held


async def test_the_users_own_commit_and_roll_back_are_told(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        session = await insert(db, "one")
        await session.commit()
        await insert(db, "two")
        await session.rollback()
    assert heard.kinds == [*ONE_COMMIT[:3], *ONE_ROLL_BACK[1:]]


@everywhere
async def test_sessions_outside_of_any_unit_of_work_tell_as_well(db: DBConnect, heard: Heard) -> None:
    async with new_non_ctx_atomic_session(db) as session:
        await session.execute(SELECT)
    async with new_non_ctx_session(db) as session:
        await session.execute(SELECT)
    async with await db.create_session() as session, session.begin():
        await session.execute(SELECT)
    assert heard.kinds == ONE_COMMIT + ONE_ROLL_BACK + ONE_COMMIT


async def test_a_closed_session_that_is_used_again_is_opened_anew(db: DBConnect, heard: Heard) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(SELECT)
        await session.close()
        await session.execute(SELECT)
    assert heard.kinds == ONE_ROLL_BACK * 2
    heard.assert_paired()


@everywhere
async def test_read_only_transactions_tell_as_well(database: Database) -> None:
    heard = Heard()
    async with DBConnect.from_url(database.url, read_only=True) as db:
        db.on_event(heard)
        async with new_db_ctx():
            await (await db_session(db)).execute(SELECT)
    assert heard.kinds == ONE_COMMIT


async def test_a_killed_connection_ends_its_transaction(db: DBConnect, database: Database, heard: Heard) -> None:
    with pytest.raises(DBAPIError) as caught:
        async with new_db_ctx():
            await insert(db, "one")
            database.terminate_backends()
            await insert(db, "two")
    assert heard.kinds == ONE_ROLL_BACK
    assert heard.roll_back.error is caught.value


async def test_an_invalidated_session_is_closed(db: DBConnect, heard: Heard) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(SELECT)
        await session.invalidate()
        assert heard.kinds == ONE_ROLL_BACK
    assert heard.kinds == ONE_ROLL_BACK


async def test_a_roll_back_that_fails_ends_its_transaction(db: DBConnect, heard: Heard) -> None:
    async with new_db_ctx():
        session = await insert(db, "one")

        async def failing_rollback() -> None:
            raise OSError

        session.rollback = failing_rollback  # type: ignore[method-assign]  # a failure that cannot be had otherwise
        await rollback_db_session(db)
    assert heard.kinds == ONE_ROLL_BACK


def _again_and_again(task: asyncio.Task[None]) -> None:
    if not task.done():
        task.cancel()
        asyncio.get_running_loop().call_soon(_again_and_again, task)


@everywhere
@pytest.mark.parametrize("cancel", [asyncio.Task.cancel, _again_and_again])
async def test_cancelled_at_any_step_everything_that_begins_ends(
    db: DBConnect, heard: Heard, cancel: Callable[[asyncio.Task[None]], object]
) -> None:
    async def work() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(SELECT)
            await commit_db_session(db)
            await (await db_session(db)).execute(SELECT)

    def after(turns: int, task: asyncio.Task[None]) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(after, turns - 1, task)
        else:
            cancel(task)

    for turns in range(40):
        # There is an open connection in the pool: otherwise, most turns would be spent on opening one.
        await work()
        task = asyncio.create_task(work())
        after(turns, task)
        with suppress(asyncio.CancelledError):
            await task
        heard.assert_paired()
    errors = {type(event.error) for event in heard if isinstance(event, TransactionRolledBack)}
    assert errors == {asyncio.CancelledError}


async def test_a_session_that_another_task_was_quicker_to_make_is_closed(database: Database) -> None:
    async def come_in_between(db: DBConnect) -> None:
        await asyncio.sleep(0)

    heard = Heard()
    db = DBConnect(lambda host: database.watch_new(), host="127.0.0.1", before_create_session_handler=come_in_between)
    db.on_event(heard)
    async with db, new_db_ctx():
        first, second = await asyncio.gather(db_session(db), db_session(db))
        assert first is second
    assert heard.kinds.count(SessionOpened) == 2
    heard.assert_paired()


async def test_events_name_the_host_that_the_session_is_on(database: Database) -> None:
    heard = Heard()
    async with DBConnect(lambda host: database.watch_new(), host="old") as db:
        db.on_event(heard)
        async with new_db_ctx():
            await insert(db, "one")
            await db.change_host("new")
            await run_in_new_ctx(insert, db, "two")
    hosts = [(type(event), event.host) for event in heard]
    assert hosts == [
        *[(kind, "old") for kind in ONE_COMMIT[:2]],
        *[(kind, "new") for kind in ONE_COMMIT],
        *[(kind, "old") for kind in ONE_COMMIT[2:]],
    ]


async def test_events_show_no_password() -> None:
    heard = Heard()
    async with DBConnect(create_async_engine, host=SECRETIVE) as db:
        db.on_event(heard)
        await (await db.create_session()).close()
    assert heard.kinds == [SessionOpened, SessionClosed]
    assert "s3cret" not in repr(list(heard))


async def test_a_listener_that_raises_is_logged_and_hinders_nothing(
    db: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: DBEvent) -> None:
        raise LookupError("no such metric")

    def cancelling(event: DBEvent) -> None:
        raise asyncio.CancelledError

    heard = Heard()
    for listener in (broken, cancelling, heard):
        db.on_event(listener)
    async with new_db_ctx():
        await insert(db, "one")
    assert await database.names() == ["one"]
    assert heard.kinds == ONE_COMMIT
    logged = [record for record in caplog.records if record.name == "ctxdb" and record.levelno == logging.ERROR]
    assert len(logged) == 8
    assert "broken" in logged[0].getMessage()
    assert "SessionOpened" in logged[0].getMessage()
    assert logged[0].exc_info is not None


@everywhere
async def test_a_listener_is_called_in_the_context_of_the_task_that_causes_the_event(db: DBConnect) -> None:
    request: ContextVar[str] = ContextVar("request")
    seen: dict[str, list[type[DBEvent]]] = {"a": [], "b": []}
    db.on_event(lambda event: seen[request.get()].append(type(event)))

    async def serve(name: str) -> None:
        request.set(name)
        async with new_db_ctx():
            await insert(db, name)

    await asyncio.gather(serve("a"), serve("b"))
    assert seen == {"a": ONE_COMMIT, "b": ONE_COMMIT}


async def test_a_listener_hears_nothing_once_it_is_taken_back(db: DBConnect) -> None:
    heard, other = Heard(), Heard()
    stop = db.on_event(heard)
    db.on_event(other)
    async with new_db_ctx():
        await insert(db, "one")
        stop()
        stop()
    assert heard.kinds == ONE_COMMIT[:2]
    assert other.kinds == ONE_COMMIT


async def test_a_listener_that_was_registered_twice_is_called_twice(db: DBConnect) -> None:
    heard = Heard()
    db.on_event(heard)
    stop = db.on_event(heard)
    await (await db.create_session()).close()
    stop()
    await (await db.create_session()).close()
    assert heard.kinds == [
        *(SessionOpened, SessionOpened, SessionClosed, SessionClosed),
        *(SessionOpened, SessionClosed),
    ]


async def test_a_listener_hears_of_whole_sessions_only(db: DBConnect) -> None:
    early, late = Heard(), Heard()
    db.on_event(early)
    async with new_db_ctx():
        await insert(db, "one")
        db.on_event(late)
        await commit_db_session(db)
        await insert(db, "two")
    assert late == []
    async with new_db_ctx():
        await insert(db, "three")
    assert late.kinds == ONE_COMMIT


async def test_a_listener_hears_of_its_own_database_only(db: DBConnect, database: Database, heard: Heard) -> None:
    other = Heard()
    async with database.connect() as second:
        second.on_event(other)
        async with new_db_ctx():
            await insert(second, "one")
    assert heard == []
    assert other.kinds == ONE_COMMIT


async def test_sessions_of_a_database_without_listeners_are_left_as_they_are(db: DBConnect, heard: Heard) -> None:
    async with DBConnect.from_url("sqlite+aiosqlite://") as silent:
        session = await silent.create_session()
        assert session.sync_session.info == {}
        assert "close" not in vars(session.sync_session)
        await session.close()


async def test_an_abandoned_database_with_listeners_closes_its_connections(database: Database) -> None:
    db = DBConnect(lambda host: create_async_engine(database.url), host="127.0.0.1")
    db.on_event(lambda event: None)
    await run_in_new_ctx(insert, db, "one")
    assert len(database.backends("true")) == 1
    del db
    gc.collect()
    await eventually(lambda: not database.backends("true"), "the connection is still open")


async def test_events_can_be_matched(db: DBConnect) -> None:
    lines: list[str] = []

    def listener(event: DBEvent) -> None:
        match event:
            case TransactionCommitted(host=host):
                lines.append(f"committed on {host}")
            case TransactionRolledBack(error=LookupError()):
                lines.append("nothing found")

    db.on_event(listener)
    await run_in_new_ctx(insert, db, "one")
    with suppress(LookupError):
        async with new_db_ctx():
            await insert(db, "two")
            raise LookupError
    assert lines == ["committed on 127.0.0.1", "nothing found"]
