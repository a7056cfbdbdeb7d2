"""`on_commit` callbacks and savepoints: what is undone runs none."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction
from tests.support.database import Database, insert, insert_row_that_fails_at_commit

from ctxdb_core import (
    DBConnect,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    on_commit,
    on_rollback,
    rollback_db_session,
)
from ctxdb_core.events import DBEvent, SessionClosed, SessionOpened, TransactionBegun, TransactionCommitted

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


class FailingAfterCommits(Session):
    pass


@event.listens_for(FailingAfterCommits, "after_commit")
def fail(session: Session) -> None:
    raise LookupError("the listener")


def failing_after_commits(database: Database, host: str) -> DBConnect:
    return DBConnect(
        lambda host: database.watch_new(),
        lambda engine: async_sessionmaker(engine, expire_on_commit=False, sync_session_class=FailingAfterCommits),
        host=host,
    )


@KINDS
async def test_a_commit_stands_although_a_listener_of_it_fails(database: Database) -> None:
    seen: list[str] = []
    events: list[type[DBEvent]] = []
    async with failing_after_commits(database, "first") as db:
        db.on_event(lambda each: events.append(type(each)))
        with pytest.raises(LookupError, match="the listener") as caught:
            async with new_db_ctx():
                await insert(db, "stands")
                on_commit(db, lambda: seen.append("committed"))
                on_rollback(db, lambda: seen.append("rolled back"))
        await database.assert_quiet()
    assert seen == ["committed"]
    assert await database.names() == ["stands"]
    assert caught.value.__notes__ == [
        "ctxdb: the commit on <DBConnect host='first'> had succeeded, and stands: a listener of it failed after that"
    ]
    assert events == [SessionOpened, TransactionBegun, TransactionCommitted, SessionClosed]


def fail_at_end_of_transaction(session: Session, transaction: SessionTransaction) -> None:
    raise LookupError("the listener")


@KINDS
async def test_an_error_that_comes_behind_a_commit_tells_that_the_commit_stands(
    db: DBConnect, database: Database
) -> None:
    seen: list[str] = []
    with pytest.raises(LookupError, match="the listener") as caught:
        async with new_db_ctx():
            await insert(db, "stands")
            on_commit(db, lambda: seen.append("committed"))
            event.listen(Session, "after_transaction_end", fail_at_end_of_transaction)
            try:
                await commit_db_session(db)
            finally:
                event.remove(Session, "after_transaction_end", fail_at_end_of_transaction)
    assert seen == ["committed"]
    assert await database.names() == ["stands"]
    assert caught.value.__notes__ == [
        "ctxdb: the commit had succeeded, and stands: what came behind it failed, such as a listener"
    ]


async def test_a_commit_that_fails_in_a_session_class_which_rolls_back_itself_tells_of_no_commit(
    database: Database,
) -> None:
    class RollsBack:
        rollback: Callable[[], None]

        def commit(self) -> None:
            try:
                super().commit()  # type: ignore[misc]  # that of the session
            except IntegrityError:
                self.rollback()
                raise

    class RollingBack(RollsBack, Session):
        pass

    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, sync_session_class=RollingBack, expire_on_commit=False)

    async with DBConnect.from_url(database.url, session_maker_creator=make) as db:
        with pytest.raises(IntegrityError) as caught:
            async with new_db_ctx():
                await insert_row_that_fails_at_commit(db)
    assert not hasattr(caught.value, "__notes__")


async def test_the_error_of_a_commit_that_is_refused_tells_of_no_commit(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        session.sync_session.autobegin = False
        with pytest.raises(InvalidRequestError, match="Autobegin") as caught:
            await session.commit()
    assert not hasattr(caught.value, "__notes__")


async def test_a_commit_is_told_as_one_although_a_listener_fails_before_the_observers_hear_of_it(
    database: Database,
) -> None:
    events: list[type[DBEvent]] = []
    event.listen(Session, "after_commit", fail, insert=True)
    try:
        async with database.connect() as db:
            db.on_event(lambda each: events.append(type(each)))
            with pytest.raises(LookupError, match="the listener"):
                async with new_db_ctx():
                    await insert(db, "stands")
    finally:
        event.remove(Session, "after_commit", fail)
    assert events == [SessionOpened, TransactionBegun, TransactionCommitted, SessionClosed]


async def test_a_unit_goes_on_after_a_listener_of_its_early_commit_has_failed(database: Database) -> None:
    async with failing_after_commits(database, "first") as db, new_db_ctx():
        session = await insert(db, "early")
        with pytest.raises(LookupError):
            await commit_db_session(db)
        assert await session.scalar(text("SELECT name FROM item")) == "early"
        await rollback_db_session(db)


async def test_a_roll_back_after_a_commit_whose_listener_has_failed_is_no_commit(database: Database) -> None:
    seen: list[str] = []
    async with failing_after_commits(database, "first") as db, new_db_ctx():
        await insert(db, "early")
        with pytest.raises(LookupError):
            await commit_db_session(db)
        on_commit(db, lambda: seen.append("committed"))
        on_rollback(db, lambda: seen.append("rolled back"))
        session = await insert(db, "undone")
        # The user's own call, and none that the unit of work is asked for.
        await session.rollback()
        await rollback_db_session(db)
    assert seen == ["rolled back"]
    assert await database.names() == ["early"]


async def commit_of_session(session: AsyncSession) -> None:
    await session.commit()


async def commit_in_run_sync(session: AsyncSession) -> None:
    await session.run_sync(Session.commit)


@KINDS
@pytest.mark.parametrize("commit", [commit_of_session, commit_in_run_sync])
async def test_callbacks_of_a_commit_of_the_session_run_while_the_unit_goes_on(
    db: DBConnect, database: Database, commit: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    told = asyncio.Event()
    async with new_db_ctx():
        on_commit(db, told.set)
        session = await insert(db, "one")
        await commit(session)
        await asyncio.wait_for(told.wait(), 20)
    assert await database.names() == ["one"]


async def test_callbacks_of_a_roll_back_of_the_session_run_while_the_unit_goes_on(db: DBConnect) -> None:
    told = asyncio.Event()
    async with new_db_ctx():
        on_rollback(db, told.set)
        session = await insert(db, "one")
        await session.rollback()
        await asyncio.wait_for(told.wait(), 20)


async def test_callbacks_run_when_the_commits_of_all_databases_have_ended(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    order: list[str] = []
    async with new_db_ctx():
        await insert(db, "one")
        on_commit(db, lambda: order.append("callback"))
        session = await insert(second_db, "two")
        event.listen(session.sync_session, "after_commit", lambda session: order.append("second commit"))
    assert order == ["second commit", "callback"]
    assert await database.names() == ["one", "two"]


async def test_callbacks_of_several_commits_run_in_their_order_and_before_the_unit_has_ended(db: DBConnect) -> None:
    order: list[int] = []
    goes_on = asyncio.Event()

    async def first() -> None:
        await goes_on.wait()
        order.append(1)

    async with new_db_ctx():
        for callback in (first, lambda: order.append(2)):
            on_commit(db, callback)
            session = await insert(db, callback.__name__)
            await session.commit()
        asyncio.get_running_loop().call_later(0, goes_on.set)
    assert order == [1, 2]


async def test_callbacks_of_several_databases_run_behind_the_last_commit(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    stored: list[list[str]] = []

    async def note() -> None:
        stored.append(sorted(await database.names()))

    async with new_db_ctx():
        on_commit(db, note)
        await insert(db, "one")
        await insert(second_db, "two")
    assert stored == [["one", "two"]]


async def test_the_databases_before_a_commit_whose_listener_fails_are_named(database: Database) -> None:
    def plain(host: str) -> DBConnect:
        return DBConnect(lambda host: database.watch_new(), host=host)

    async with plain("first") as first, failing_after_commits(database, "second") as second, plain("third") as third:
        with pytest.raises(LookupError) as caught:
            async with new_db_ctx():
                for number, db in enumerate((first, second, third)):
                    await insert(db, str(number))
        await database.assert_quiet()
    assert await database.names() == ["0", "1"]
    assert (
        "a listener of the commit on <DBConnect host='second'> failed after the one on <DBConnect host='first'>"
        in (caught.value.__notes__[0])
    )


@pytest.mark.postgresql
async def test_the_databases_of_one_host_are_told_apart_in_the_error_of_a_commit(database: Database) -> None:
    other = make_url(database.url).set(database="template1")
    async with database.connect() as first, DBConnect.from_url(other) as second:
        with pytest.raises(IntegrityError) as caught:
            async with new_db_ctx():
                await (await db_session(second)).execute(text("SELECT 1"))
                session = await db_session(first)
                await session.execute(
                    text("CREATE TEMPORARY TABLE once (id int UNIQUE DEFERRABLE INITIALLY DEFERRED) ON COMMIT DROP")
                )
                await session.execute(text("INSERT INTO once VALUES (1), (1)"))
    assert re.search(r"after the one on <DBConnect .*> \(.*/template1\) had succeeded", caught.value.__notes__[0])
