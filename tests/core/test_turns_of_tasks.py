"""Tasks of one unit of work that use its session at once are served one after the other, each call whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack, suppress
from typing import Any

import anyio
import pytest
from sqlalchemy import Integer, literal, literal_column, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, column_property, mapped_column
from sqlalchemy.util import await_only, greenlet_spawn
from tests.support.database import Database, Item, eventually, insert, insert_row_that_fails_at_commit

from ctxdb_core import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    SessionAlreadyActiveError,
    SessionOwnedError,
    TransactionAbortedError,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    on_begin,
    rollback_db_session,
    set_rollback_only,
)
from ctxdb_core._sqlalchemy.door import Door

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


async def read(db: DBConnect, number: int) -> int:
    return (await (await db_session(db)).execute(select(literal(number)))).scalar_one()


@KINDS
async def test_gathered_tasks_read_on_a_cold_pool_of_one_connection(database: Database) -> None:
    async with database.connect(pool_size=1, max_overflow=0) as db, new_db_ctx():
        assert await asyncio.gather(*(read(db, number) for number in range(8))) == list(range(8))


async def test_calls_are_served_in_the_order_in_which_they_came(db: DBConnect) -> None:
    served: list[int] = []

    async def note(number: int) -> None:
        await read(db, number)
        served.append(number)

    async with new_db_ctx():
        await asyncio.gather(*(note(number) for number in range(6)))
    assert served == list(range(6))


@KINDS
async def test_a_call_is_whole_with_its_autoflush(db: DBConnect) -> None:
    async def count() -> int:
        return len((await (await db_session(db)).scalars(select(Item.name))).all())

    async with new_db_ctx():
        session = await db_session(db)
        session.add_all(Item(name=str(number)) for number in range(5))
        assert await asyncio.gather(*(count() for _ in range(4))) == [5] * 4


async def test_a_task_that_is_cancelled_while_it_waits_delays_no_other_task(db: DBConnect) -> None:
    async with new_db_ctx():
        first = asyncio.create_task(_sleep(db, 0.2))
        await asyncio.sleep(0)
        second, third = asyncio.create_task(read(db, 2)), asyncio.create_task(read(db, 3))
        await asyncio.sleep(0)
        second.cancel()
        assert await third == 3
        await first
    assert second.cancelled()


async def test_a_commit_waits_for_the_statement_that_is_under_way(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        sleeping = asyncio.create_task(_sleep(db, 0.2))
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the statement does not run")
        await commit_db_session(db)
        assert sleeping.done()
        assert await database.names() == ["one"]


async def test_a_roll_back_waits_for_the_statement_that_is_under_way(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        sleeping = asyncio.create_task(_sleep(db, 0.2))
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the statement does not run")
        await rollback_db_session(db)
        await sleeping
        assert await read(db, 1) == 1


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_the_failure_of_one_task_stops_the_statements_of_its_siblings(db: DBConnect, database: Database) -> None:
    async def fail() -> None:
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the statement does not run")
        raise LookupError("the one that failed")

    sleeping: asyncio.Task[None] | None = None
    with pytest.raises(LookupError):
        async with new_db_ctx():
            sleeping, waiting = asyncio.create_task(_sleep(db, 300)), asyncio.create_task(_after(db, 300))
            await fail()
    assert sleeping is not None
    results = await asyncio.gather(sleeping, waiting, return_exceptions=True)
    assert [type(result) for result in results] == [ContextClosedError, ContextClosedError]
    assert isinstance(results[0].__cause__, LookupError)  # type: ignore[union-attr]  # it is an error, as just seen
    await eventually(lambda: not database.backends("query ~ 'pg_sleep' AND state = 'active'"), "a query runs on")


async def test_a_sibling_that_is_stopped_in_a_hook_is_told_why(db: DBConnect) -> None:
    has_begun = asyncio.Event()

    async def wait(session: AsyncSession) -> None:
        has_begun.set()
        await asyncio.sleep(60)

    sibling = None
    with pytest.raises(LookupError):
        async with new_db_ctx():
            on_begin(db, wait)
            sibling = asyncio.create_task(read(db, 1))
            await has_begun.wait()
            raise LookupError
    assert sibling is not None
    await asyncio.wait([sibling])
    assert not sibling.cancelled()
    assert isinstance(sibling.exception(), ContextClosedError)


async def test_a_sibling_that_is_stopped_as_its_turn_comes_is_told_why(db: DBConnect) -> None:
    sibling = None
    with pytest.raises(LookupError):
        async with new_db_ctx():
            session = await db_session(db)
            first = asyncio.create_task(session.execute(text("SELECT 1")))
            # With this callback, the first task ends in the same moment in which the sibling gets its turn.
            first.add_done_callback(lambda _: None)
            await asyncio.sleep(0)
            sibling = asyncio.create_task(read(db, 1))
            await first
            raise LookupError
    assert sibling is not None
    await asyncio.wait([sibling])
    assert not sibling.cancelled()


async def insert_beside(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO item VALUES ('beside')"))


async def commit_beside(session: AsyncSession) -> None:
    await session.commit()


@pytest.mark.parametrize("call", [insert_beside, commit_beside])
async def test_a_sibling_whose_call_comes_between_a_failed_commit_and_its_roll_back_is_told_why_it_is_refused(
    db: DBConnect, database: Database, call: Callable[[AsyncSession], Coroutine[Any, Any, None]]
) -> None:
    async def work() -> None:
        async with new_db_ctx():
            session = await insert(db, "undone")
            await insert_row_that_fails_at_commit(db)
            beside.append(asyncio.create_task(let_commit_begin_and_call(session)))

    async def let_commit_begin_and_call(session: AsyncSession) -> None:
        await database.commit_is_held()
        calling = asyncio.create_task(call(session))
        await asyncio.sleep(0)
        held.close()
        await calling

    beside: list[asyncio.Task[None]] = []
    with ExitStack() as held:
        held.enter_context(database.held_commits())
        with pytest.raises(IntegrityError):
            await work()
    with pytest.raises(TransactionAbortedError, match=r"commit of this transaction has failed .*violates foreign key"):
        await beside[0]
    assert await database.names() == []


async def commit_unit(db: DBConnect) -> None:
    await commit_db_session(db)


async def commit_session(db: DBConnect) -> None:
    await (await db_session(db)).commit()


@pytest.mark.parametrize("commit", [commit_unit, commit_session])
@pytest.mark.parametrize("error", [None, LookupError()], ids=["cancellation", "error"])
async def test_the_end_of_a_unit_of_work_sees_a_commit_of_a_sibling_through(
    db: DBConnect,
    database: Database,
    commit: Callable[[DBConnect], Coroutine[Any, Any, None]],
    error: Exception | None,
) -> None:
    async def work() -> None:
        async with new_db_ctx():
            await insert(db, "sibling")
            beside.append(asyncio.create_task(commit(db)))
            await database.commit_is_held()
            committing.set()
            if error is not None:
                raise error

    beside: list[asyncio.Task[None]] = []
    committing = asyncio.Event()
    with database.held_commits():
        working = asyncio.create_task(work())
        await committing.wait()
        await asyncio.sleep(0)
        if error is None:
            working.cancel()
            await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError if error is None else LookupError):
        await working
    await beside[0]
    assert await database.names() == ["sibling"]


async def test_a_commit_of_a_sibling_that_flushes_when_the_unit_of_work_fails_succeeds_and_is_no_error(
    db: DBConnect, database: Database
) -> None:
    beside: list[asyncio.Task[None]] = []

    async def work() -> None:
        async with new_db_ctx():
            (await db_session(db)).add(Item(name="sibling"))
            beside.append(asyncio.create_task(commit_db_session(db)))
            await eventually(lambda: bool(database.backends("wait_event_type = 'Lock'")), "the flush waits for no lock")
            raise LookupError

    async with new_non_ctx_session(db) as rival:
        await rival.execute(text("INSERT INTO item VALUES ('sibling')"))
        working = asyncio.create_task(work())
        await eventually(lambda: bool(beside) and beside[0].cancelling() > 0, "the unit stops no call")
    with pytest.raises(LookupError):
        await working
    await beside[0]
    assert await database.names() == ["sibling"]


async def test_an_event_listener_may_use_the_session_inside_of_a_call(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)

        def nested(sync_session: Session) -> object:
            return await_only(session.scalar(text("SELECT 5")))

        assert await session.run_sync(nested) == 5


async def test_lazy_loading_takes_its_turn(database: Database) -> None:
    async with database.connect(pool_size=1, max_overflow=0) as db, new_db_ctx():
        session = await db_session(db)
        session.add(Item(name="one"))
        await session.flush()
        item = (await session.scalars(select(Item))).one()
        session.expire(item)
        # `awaitable_attrs` loads an attribute like this: in a greenlet of SQLAlchemy's own.
        name: Any = AsyncAttrs._AsyncAttrGetitem(item)
        results = await asyncio.gather(name.name, read(db, 1), read(db, 2))
        assert list(results) == ["one", 1, 2]


class Ruins(AsyncAttrs, DeclarativeBase):
    pass


class Ruin(Ruins):
    __tablename__ = "item"
    name: Mapped[str] = mapped_column(primary_key=True)
    age: Mapped[int] = column_property(literal_column("1 / (length(name) - length(name))", Integer), deferred=True)


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_the_turn_of_lazy_loading_ends_with_the_load_although_the_error_is_kept(db: DBConnect) -> None:
    async with asyncio.timeout(20), new_db_ctx():
        session = await db_session(db)
        session.add_all([Ruin(name="one"), Ruin(name="two")])
        await commit_db_session(db)
        one, two = (await session.scalars(select(Ruin))).all()
        errors = await asyncio.gather(one.awaitable_attrs.age, two.awaitable_attrs.age, return_exceptions=True)
        assert all(isinstance(error, DBAPIError) for error in errors)
        await session.rollback()
        assert list(await asyncio.gather(read(db, 1), read(db, 2))) == [1, 2]


async def test_a_lazy_load_that_is_cancelled_gives_its_turn_back(db: DBConnect) -> None:
    async with asyncio.timeout(20), new_db_ctx():
        session = await db_session(db)
        session.add(Item(name="one"))
        await session.flush()
        item = (await session.scalars(select(Item))).one()
        session.expire(item)
        first = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.2)")))
        await asyncio.sleep(0)
        name: Any = AsyncAttrs._AsyncAttrGetitem(item)
        lazy = asyncio.ensure_future(name.name)
        await asyncio.sleep(0)
        lazy.cancel()
        await asyncio.wait([lazy, first])
        assert lazy.cancelled()
        assert await read(db, 1) == 1


async def test_a_session_class_may_commit_in_a_task_of_its_own(database: Database) -> None:
    class Shielded(AsyncSession):
        async def commit(self) -> None:
            await asyncio.shield(asyncio.create_task(super().commit()))

        async def close(self) -> None:
            await asyncio.shield(asyncio.create_task(super().close()))

    db = DBConnect(
        lambda host: database.watch_new(), lambda engine: async_sessionmaker(engine, class_=Shielded), host="a"
    )
    async with db, new_db_ctx():
        session = await db_session(db)
        assert isinstance(session, Shielded)
        session.add(Item(name="one"))
    assert await database.names() == ["one"]


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_a_session_is_refused_on_the_event_loop_of_another_thread(db: DBConnect) -> None:
    async def statement(session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))

    async def commit(session: AsyncSession) -> None:
        await session.commit()

    async def run(session: AsyncSession, use: Callable[[AsyncSession], Awaitable[None]]) -> list[BaseException]:
        raised: list[BaseException] = []

        def elsewhere() -> None:
            try:
                asyncio.run(use(session))  # type: ignore[arg-type]  # a coroutine
            except ContextNotInitiatedError as exc:
                raised.append(exc)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        return raised

    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        for use in (statement, commit):
            assert len(await run(session, use)) == 1
        assert await read(db, 1) == 1


async def _sleep(db: DBConnect, seconds: float) -> None:
    await (await db_session(db)).execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


async def _after(db: DBConnect, seconds: float) -> None:
    # This call begins in a later turn of the event loop than the others, and so waits for its turn at the session.
    await asyncio.sleep(0)
    await _sleep(db, seconds)


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_a_task_that_waits_is_cancelled_in_the_same_moment_as_the_task_that_it_waits_for() -> None:
    door = Door()

    async def hold() -> None:
        async with door.turn():
            await asyncio.Event().wait()

    async def wait() -> None:
        async with door.turn():
            pass

    tasks = [asyncio.create_task(hold()), asyncio.create_task(wait())]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert not door.is_busy


@KINDS
async def test_a_group_of_tasks_that_is_cancelled_raises_no_other_error(db: DBConnect) -> None:
    async def work() -> None:
        async with new_db_ctx(), asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(read(db, number))

    for steps in range(30):
        task = asyncio.create_task(work())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("fails", [True, False])
async def test_a_session_that_is_being_closed_ends_with_its_unit(
    db: DBConnect, database: Database, fails: bool
) -> None:
    with suppress(LookupError):
        async with new_db_ctx():
            statement = asyncio.create_task((await db_session(db)).execute(text("SELECT pg_sleep(0.5)")))
            await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the statement does not run")
            closing = asyncio.create_task(close_db_session(db))
            await asyncio.sleep(0)
            if fails:
                raise LookupError
    assert database.checked_out == 0
    await closing
    await asyncio.wait([statement])
    error = statement.exception()
    assert isinstance(error, ContextClosedError) if fails else error is None


async def test_a_session_is_closed_although_the_task_that_closes_it_is_cancelled(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        statement = asyncio.create_task((await db_session(db)).execute(text("SELECT pg_sleep(0.5)")))
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the statement does not run")
        closing = asyncio.create_task(close_db_session(db))
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert database.checked_out == 0
        await statement


# --- several sessions -------------------------------------------------------------------------------------------------


async def test_calls_of_two_sessions_inside_of_one_another_are_no_deadlock(database: Database) -> None:
    async with database.connect() as first, database.connect() as second:
        are_inside = asyncio.Barrier(2)

        async def nest(outer: DBConnect, inner: DBConnect) -> int:
            inner_session = await db_session(inner)

            def call(session: Session) -> Any:
                session.execute(select(literal(1)))
                await_only(are_inside.wait())
                return await_only(inner_session.scalar(select(literal(2))))

            return await (await db_session(outer)).run_sync(call)

        async with asyncio.timeout(20), new_db_ctx():
            results = await asyncio.gather(nest(first, second), nest(second, first), return_exceptions=True)
            assert 2 in results
            assert sorted(type(result).__name__ for result in results) == ["SessionAlreadyActiveError", "int"]
            assert [await read(db, 1) for db in (first, second)] == [1, 1]


async def test_hooks_that_use_the_session_of_one_another_are_no_deadlock(database: Database) -> None:
    async with database.connect() as first, database.connect() as second:
        inside: list[DBConnect] = []

        def read_from(other: DBConnect) -> Callable[[AsyncSession], Awaitable[None]]:
            async def hook(session: AsyncSession) -> None:
                inside.append(other)
                await eventually(lambda: len(inside) >= 2, "the other hook was not called")
                await asyncio.create_task(read(other, 1))

            return hook

        async with asyncio.timeout(20), new_db_ctx():
            on_begin(first, read_from(second))
            on_begin(second, read_from(first))
            results = await asyncio.gather(read(first, 1), read(second, 2), return_exceptions=True)
        assert any(isinstance(result, SessionAlreadyActiveError) for result in results)


async def test_calls_inside_of_one_another_wait_for_their_turns_in_one_order(database: Database) -> None:
    async with database.connect() as first, database.connect() as second:

        async def nest(number: int) -> int:
            inner_session = await db_session(second)

            def call(session: Session) -> Any:
                session.execute(select(literal(number)))
                return await_only(inner_session.scalar(select(literal(number))))

            return await (await db_session(first)).run_sync(call)

        async with asyncio.timeout(20), new_db_ctx():
            results = await asyncio.gather(*(nest(number) for number in range(4)), read(second, 4), read(first, 5))
            assert results == list(range(6))


# --- tasks that outlive the turn in which they were started ----------------------------------------------------------


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_task_that_a_hook_has_started_takes_its_turn_when_the_hook_is_over(
    db: DBConnect, database: Database
) -> None:
    started: list[asyncio.Task[int]] = []

    async def read_later() -> int:
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the statement does not run")
        return await read(db, 1)

    async def hook(session: AsyncSession) -> None:
        started.append(asyncio.create_task(read_later()))

    async with new_db_ctx():
        on_begin(db, hook)
        await _sleep(db, 0.3)
        assert await started[0] == 1
        assert await read(db, 2) == 2


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_call_waits_for_the_statements_that_a_hook_has_left_running(db: DBConnect) -> None:
    started: list[asyncio.Task[None]] = []

    async def hook(session: AsyncSession) -> None:
        started.append(asyncio.create_task(_sleep(db, 0.2)))
        await asyncio.sleep(0)

    async with new_db_ctx():
        on_begin(db, hook)
        assert await read(db, 1) == 1
        await started[0]


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_no_statement_of_a_hook_that_was_cancelled_runs_on(db: DBConnect, database: Database) -> None:
    started: list[asyncio.Task[None]] = []

    async def hook(session: AsyncSession) -> None:
        started.append(asyncio.create_task(_sleep(db, 300)))
        await asyncio.wait(started)

    with anyio.CancelScope() as scope:
        async with new_db_ctx():
            on_begin(db, hook)
            reading = asyncio.create_task(read(db, 1))
            await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the statement does not run")
            scope.cancel()
            await reading
    assert database.checked_out == 0
    assert not database.backends("query ~ 'pg_sleep' AND state = 'active'")
    await asyncio.wait([*started, reading])
    assert reading.cancelled()


class Executing(AsyncSession):
    """Has a call of its own, as SQLModel's session has."""

    async def names(self, name: str) -> list[str]:
        found = await greenlet_spawn(self.sync_session.scalars, select(Item.name).where(Item.name == name))
        return list(found)

    async def answer(self, number: int) -> int:
        return await greenlet_spawn(lambda: number)


@KINDS
async def test_a_call_of_the_users_session_class_is_whole_with_its_autoflush(database: Database) -> None:
    async def add(session: Executing, name: str) -> list[str]:
        session.add(Item(name=name))
        return await session.names(name)

    db = DBConnect(
        lambda host: database.watch_new(), lambda engine: async_sessionmaker(engine, class_=Executing), host="a"
    )
    async with db, new_db_ctx():
        session = await db_session(db)
        assert await asyncio.gather(*(add(session, name) for name in "abcd")) == [["a"], ["b"], ["c"], ["d"]]
        assert await session.answer(7) == 7
    assert await database.names() == ["a", "b", "c", "d"]


async def by_unit(db: DBConnect) -> None:
    await commit_db_session(db)


async def by_session(db: DBConnect) -> None:
    await (await db_session(db)).commit()


async def add_during_commit(
    db: DBConnect,
    database: Database,
    is_changed: asyncio.Event,
    commit: Callable[[DBConnect], Coroutine[Any, Any, None]] = by_unit,
) -> AsyncSession:
    session = await insert(db, "first")
    item = await session.get_one(Item, "old")
    committing = asyncio.create_task(commit(db))
    await database.commit_is_held()
    session.add(Item(name="added"))
    item.name = "new"
    is_changed.set()
    await committing
    return session


@pytest.mark.parametrize("commit", [by_unit, by_session])
async def test_additions_and_changes_while_another_task_commits_are_stored(
    db: DBConnect, database: Database, commit: Callable[[DBConnect], Coroutine[Any, Any, None]]
) -> None:
    await database.query("INSERT INTO item VALUES ('old')")

    async def unit() -> None:
        async with new_db_ctx():
            await add_during_commit(db, database, is_changed, commit)

    is_changed = asyncio.Event()
    with database.held_commits():
        running = asyncio.create_task(unit())
        await is_changed.wait()
    await running
    assert await database.names() == ["added", "first", "new"]


async def roll_back_by_unit(db: DBConnect) -> None:
    await rollback_db_session(db)


async def roll_back_by_session(db: DBConnect) -> None:
    await (await db_session(db)).rollback()


async def mark_rollback_only(db: DBConnect) -> None:
    set_rollback_only()


@pytest.mark.parametrize("roll_back", [roll_back_by_unit, roll_back_by_session, mark_rollback_only])
async def test_a_roll_back_undoes_what_was_added_or_changed_while_another_task_committed(
    db: DBConnect, database: Database, roll_back: Callable[[DBConnect], Awaitable[None]]
) -> None:
    await database.query("INSERT INTO item VALUES ('old')")

    async def unit() -> None:
        async with new_db_ctx():
            await add_during_commit(db, database, is_changed)
            await roll_back(db)

    is_changed = asyncio.Event()
    with database.held_commits():
        running = asyncio.create_task(unit())
        await is_changed.wait()
    await running
    assert await database.names() == ["first", "old"]


async def test_a_session_that_was_changed_while_another_task_committed_cannot_be_closed_with_its_changes(
    db: DBConnect, database: Database
) -> None:
    await database.query("INSERT INTO item VALUES ('old')")

    async def unit() -> None:
        async with new_db_ctx():
            session = await add_during_commit(db, database, is_changed)
            with pytest.raises(SessionOwnedError):
                await session.close()

    is_changed = asyncio.Event()
    with database.held_commits():
        running = asyncio.create_task(unit())
        await is_changed.wait()
    await running
    assert await database.names() == ["added", "first", "new"]


async def test_a_unit_ends_well_although_a_task_fails_behind_its_commit(
    db: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    is_waiting = asyncio.Event()

    async def write_behind_commit() -> None:
        await database.commit_is_held()
        is_waiting.set()
        await insert_row_that_fails_at_commit(db)

    async def unit() -> asyncio.Task[None]:
        async with new_db_ctx():
            await insert(db, "unit")
            return asyncio.create_task(write_behind_commit())

    with database.held_commits():
        running = asyncio.create_task(unit())
        await is_waiting.wait()
    await (await running)
    assert await database.names() == ["unit"]
    assert await database.names("child", "parent") == []
    assert "what its other tasks had done since its commit was not committed" in caplog.text


async def test_a_cancelled_unit_rolls_back_what_a_task_does_behind_its_commit(
    db: DBConnect, database: Database
) -> None:
    is_waiting = asyncio.Event()

    async def write_behind_commit() -> None:
        await database.commit_is_held()
        is_waiting.set()
        await insert(db, "task")

    async def unit() -> None:
        async with new_db_ctx():
            await insert(db, "unit")
            tasks.append(asyncio.create_task(write_behind_commit()))

    tasks: list[asyncio.Task[None]] = []
    with database.held_commits():
        running = asyncio.create_task(unit())
        await is_waiting.wait()
        running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await database.names() == ["unit"]
