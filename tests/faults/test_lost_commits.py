"""Commits whose answers are lost: which error they raise, and which rows are stored."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import TextClause, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from tests.support.database import Database, Item, eventually, insert, insert_row_that_fails_at_commit
from tests.support.faulty_network import Fault, FaultyNetwork, Point

from ctxdb_core import (
    ArgumentValueError,
    CommitOutcomeUnknownError,
    DBConnect,
    TransactionContext,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    on_rollback,
)

FAULTS = [Fault.DROP, Fault.RESET, Fault.HALF_CLOSE]


class DerivedSessionMaker(async_sessionmaker[AsyncSession]):
    """A class that is derived from SQLAlchemy's, and so might make sessions in another way."""


@pytest.fixture
async def resolving(database: Database, far: DBConnect) -> AsyncIterator[DBConnect]:
    """The database on the other side of the network, whose commits are resolved."""
    async with DBConnect(lambda host: database.watch_new(), host="127.0.0.1", resolve_commits=True) as db:
        yield db
        await database.assert_quiet()


async def _write(db: DBConnect, outcomes: list[str] | None = None) -> None:
    async with new_db_ctx():
        await insert(db, "a")
        if outcomes is not None:
            on_commit(db, lambda: outcomes.append("committed"))
            on_rollback(db, lambda: outcomes.append("rolled back"))


async def _assert_healthy(db: DBConnect) -> None:
    async def use() -> None:
        async with new_db_ctx():
            await (await db_session(db)).scalar(text("SELECT 1"))

    await asyncio.gather(*(use() for _ in range(6)))


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_lost_answer_to_commit_is_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database, fault: Fault
) -> None:
    outcomes: list[str] = []
    network.fail(Point.COMMITTED, fault)
    with pytest.raises(CommitOutcomeUnknownError, match="COMMIT was under way") as raised:
        await _write(far, outcomes)
    assert raised.value.databases == (f"127.0.0.1/{database.name}",)
    assert raised.value.transaction_ids == {}
    assert raised.value.__cause__ is not None
    assert outcomes == []
    assert await database.names() == ["a"]
    await _assert_healthy(far)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_commit_that_does_not_arrive_is_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database, fault: Fault
) -> None:
    network.fail(Point.COMMIT, fault)
    with pytest.raises(CommitOutcomeUnknownError):
        await _write(far)
    await eventually(lambda: not database.backends("state = 'idle in transaction'"), "the transaction is open")
    assert await database.names() == []
    await _assert_healthy(far)


@pytest.mark.parametrize("point", [Point.STATEMENT, Point.ANSWER])
async def test_a_connection_that_is_lost_before_commit_is_no_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database, point: Point
) -> None:
    outcomes: list[str] = []
    network.fail(point, Fault.DROP)
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            on_rollback(far, lambda: outcomes.append("rolled back"))
            await insert(far, "a")
    assert outcomes == ["rolled back"]
    assert await database.names() == []
    await _assert_healthy(far)


async def test_a_connection_that_is_known_to_be_closed_before_commit_is_no_unknown_outcome(
    db: DBConnect, database: Database, database_kind: str
) -> None:
    if database_kind != "asyncpg":
        pytest.skip("psycopg notices that the connection is closed when it sends COMMIT")
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            session = await insert(db, "a")
            raw: Any = await (await session.connection()).get_raw_connection()
            database.terminate_backends()
            await eventually(raw.driver_connection.is_closed, "the driver does not notice that it is closed")
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["asyncpg"])
async def test_a_connection_whose_end_was_announced_before_commit_is_no_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    # SQLAlchemy 2.0 lets the driver's own error through.
    with pytest.raises((DBAPIError, asyncpg.InternalClientError)) as raised:
        async with new_db_ctx():
            await insert(far, "a")
            network.break_all(Fault.NOTICE)
            for _ in range(5):
                # The event loop reads what has been written to a connection on the same machine.
                await asyncio.sleep(0)
    assert not isinstance(raised.value, CommitOutcomeUnknownError)
    assert await database.names() == []
    await _assert_healthy(far)


async def test_a_lost_connection_whose_driver_connection_was_lent_is_no_unknown_outcome(
    db: DBConnect, database: Database
) -> None:
    with pytest.raises(DBAPIError) as raised:
        async with new_db_ctx():
            session = await insert(db, "a")
            assert (await (await session.connection()).get_raw_connection()).driver_connection is not None
            database.terminate_backends()
    assert not isinstance(raised.value, CommitOutcomeUnknownError)
    assert raised.value.connection_invalidated
    assert await database.names() == []
    assert database.checked_out == 0


async def test_a_commit_is_unknown_if_the_server_panics_in_the_middle_of_it(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    network.fail(Point.COMMITTED, Fault.PANIC)
    with pytest.raises(CommitOutcomeUnknownError, match="No space left"):
        await _write(far)
    assert await database.names() == ["a"]
    await _assert_healthy(far)


async def test_a_commit_that_the_server_refuses_is_no_unknown_outcome(db: DBConnect, database: Database) -> None:
    with pytest.raises(DBAPIError, match="foreign key"):
        async with new_db_ctx():
            await insert_row_that_fails_at_commit(db)
    assert await database.names("child", "parent") == []


async def test_a_commit_is_unknown_if_the_server_ends_in_the_middle_of_it(db: DBConnect, database: Database) -> None:
    with database.held_commits():
        writing = asyncio.create_task(_write(db))
        await database.commit_is_held()
        database.terminate_backends("query ~ '^COMMIT'")
        with pytest.raises(CommitOutcomeUnknownError):
            await writing
    await _assert_healthy(db)


async def test_each_way_to_commit_raises_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    context = TransactionContext(far)

    async def early() -> None:
        async with new_db_ctx():
            await insert(far, "early")
            await commit_db_session(far)

    async def in_a_block() -> None:
        async with new_db_ctx(), (await db_session(far)).begin():
            await insert(far, "block")

    async def outside() -> None:
        async with new_non_ctx_atomic_session(far) as session:
            await session.execute(text("INSERT INTO item VALUES ('outside')"))

    async def in_a_context() -> None:
        async with context.transaction() as session:
            await session.execute(text("INSERT INTO item VALUES ('context')"))

    async def on_the_engine() -> None:
        async with (await far.engine()).begin() as connection:
            await connection.execute(text("INSERT INTO item VALUES ('engine')"))

    for write in (early, in_a_block, outside, in_a_context, on_the_engine):
        network.fail(Point.COMMITTED, Fault.DROP)
        with pytest.raises(CommitOutcomeUnknownError):
            await write()
    assert await database.names() == ["block", "context", "early", "engine", "outside"]


async def _end(session: AsyncSession) -> None:
    """Do nothing: the end of the unit of work commits."""


async def _select(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


@pytest.mark.parametrize("go_on", [_end, _select])
async def test_what_follows_an_unknown_commit_of_a_task_is_an_unknown_outcome(
    far: DBConnect, network: FaultyNetwork, database: Database, go_on: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    outcomes: list[str] = []
    network.fail(Point.COMMITTED, Fault.DROP)
    with pytest.raises(CommitOutcomeUnknownError, match="may be stored") as raised:
        async with new_db_ctx():
            session = await insert(far, "a")
            on_commit(far, lambda: outcomes.append("committed"))
            on_rollback(far, lambda: outcomes.append("rolled back"))
            await asyncio.wait([asyncio.create_task(session.commit())])
            await go_on(session)
    assert raised.value.databases == (f"127.0.0.1/{database.name}",)
    assert outcomes == []
    assert await database.names() == ["a"]
    await _assert_healthy(far)


async def test_a_unit_with_a_task_that_was_cancelled_in_its_commit_ends_by_an_unknown_outcome(
    db: DBConnect, database: Database
) -> None:
    async def unit() -> None:
        async with new_db_ctx():
            session = await insert(db, "a")
            committing = asyncio.create_task(session.commit())
            await database.commit_is_held()
            committing.cancel()
            await asyncio.wait([committing])

    with database.held_commits(), pytest.raises(CommitOutcomeUnknownError):
        await unit()


async def test_other_databases_of_a_unit_are_rolled_back_after_an_unknown_commit(
    far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    outcomes: list[str] = []
    async with database.connect() as other:
        with pytest.raises(CommitOutcomeUnknownError):
            async with new_db_ctx():
                await insert(far, "a")
                await insert(other, "b")
                on_rollback(other, lambda: outcomes.append("rolled back"))
                network.fail(Point.COMMITTED, Fault.DROP)
    assert outcomes == ["rolled back"]
    assert await database.names() == ["a"]


# --- resolve_commits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_stored_commit_succeeds_although_its_answer_is_lost(
    resolving: DBConnect, network: FaultyNetwork, database: Database, fault: Fault
) -> None:
    outcomes: list[str] = []
    network.fail(Point.COMMITTED, fault)
    await _write(resolving, outcomes)
    assert network.failed.is_set()
    assert outcomes == ["committed"]
    assert await database.names() == ["a"]
    await _assert_healthy(resolving)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_commit_that_did_not_arrive_is_resolved_as_rolled_back(
    resolving: DBConnect, network: FaultyNetwork, database: Database, fault: Fault
) -> None:
    outcomes: list[str] = []
    network.fail(Point.COMMIT, fault)
    with pytest.raises((DBAPIError, OSError)):
        await _write(resolving, outcomes)
    assert outcomes == ["rolled back"]
    assert await database.names() == []
    await _assert_healthy(resolving)


async def test_a_lost_commit_is_resolved_after_the_server_has_ended_it(
    resolving: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    with database.held_commits():
        writing = asyncio.create_task(_write(resolving))
        await database.commit_is_held()
        network.break_all(Fault.DROP)
        await eventually(lambda: network.connections > 1, "the server is not asked")
    # A server goes on to commit although its client has gone.
    await writing
    assert await database.names() == ["a"]


async def test_a_lost_commit_is_resolved_although_its_task_is_cancelled_meanwhile(
    resolving: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    outcomes: list[str] = []
    with database.held_commits():
        writing = asyncio.create_task(_write(resolving, outcomes))
        await database.commit_is_held()
        network.break_all(Fault.DROP)
        await eventually(lambda: network.connections > 1, "the server is not asked")
        writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert outcomes == ["committed"]
    assert await database.names() == ["a"]


async def test_a_lost_commit_stays_unknown_if_the_server_cannot_be_asked_in_time(
    resolving: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    with pytest.raises(CommitOutcomeUnknownError) as raised:
        async with new_db_ctx(deadline=asyncio.get_running_loop().time() + 1):
            session = await insert(resolving, "a")
            xid = await session.scalar(text("SELECT CAST(pg_current_xact_id() AS text)"))
            network.fail(Point.COMMITTED, Fault.DROP)
            network.lets_in = False
    assert raised.value.transaction_ids == {f"127.0.0.1/{database.name}": int(xid)}


async def _in_a_unit(db: DBConnect, statement: TextClause) -> None:
    async with new_db_ctx():
        await (await db_session(db)).execute(statement)


async def _in_a_block(db: DBConnect, statement: TextClause) -> None:
    async with new_db_ctx(), (await db_session(db)).begin():
        await (await db_session(db)).execute(statement)


async def _in_a_savepoint(db: DBConnect, statement: TextClause) -> None:
    async with new_db_ctx(), (await db_session(db)).begin_nested():
        await (await db_session(db)).execute(statement)


async def _in_a_transaction_context(db: DBConnect, statement: TextClause) -> None:
    async with TransactionContext(db).transaction() as session:
        await session.execute(statement)


async def _outside_of_a_unit(db: DBConnect, statement: TextClause) -> None:
    async with new_non_ctx_atomic_session(db) as session:
        await session.execute(statement)


async def _by_a_lazy_session_maker(db: DBConnect, statement: TextClause) -> None:
    async with db.lazy_session_maker() as session:
        await session.execute(statement)
        await session.commit()


@pytest.mark.parametrize("maker_class", [async_sessionmaker, DerivedSessionMaker])
@pytest.mark.parametrize(
    "execute",
    [
        _in_a_unit,
        _in_a_block,
        _in_a_savepoint,
        _in_a_transaction_context,
        _outside_of_a_unit,
        _by_a_lazy_session_maker,
    ],
)
async def test_only_a_commit_that_has_written_asks_for_its_transaction(
    far: DBConnect,
    network: FaultyNetwork,
    database: Database,
    execute: Callable[[DBConnect, TextClause], Awaitable[None]],
    maker_class: type[async_sessionmaker[AsyncSession]],
) -> None:
    asked: list[str] = []
    network.on_statement = asked.append
    async with DBConnect(lambda host: database.watch_new(), maker_class, host="far", resolve_commits=True) as db:
        await execute(db, text("SELECT 1"))
        assert not any("pg_current_xact_id" in statement for statement in asked)
        await execute(db, text("INSERT INTO item VALUES ('a')"))
        assert sum("pg_current_xact_id" in statement for statement in asked) == 1
        network.fail(Point.COMMITTED, Fault.DROP)
        await execute(db, text("INSERT INTO item VALUES ('b')"))
    assert await database.names() == ["a", "b"]


async def test_a_lost_commit_that_flushes_objects_is_resolved(
    resolving: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    network.fail(Point.COMMITTED, Fault.DROP)
    async with new_db_ctx():
        (await db_session(resolving)).add(Item(name="a"))
    network.fail(Point.COMMITTED, Fault.DROP)
    async with new_non_ctx_session(resolving) as session:
        session.add(Item(name="b"))
        await session.commit()
    assert await database.names() == ["a", "b"]


async def test_a_lost_commit_is_resolved_after_a_rolled_back_reader_on_its_connection(
    resolving: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(resolving)
        async with session.begin_nested():
            await session.execute(text("SELECT 1"))
        await session.rollback()
    network.fail(Point.COMMITTED, Fault.DROP)
    async with (await resolving.engine()).begin() as connection:
        await connection.execute(text("INSERT INTO item VALUES ('a')"))
    assert await database.names() == ["a"]


async def test_from_url_with_resolve_commits_resolves_lost_commits(network: FaultyNetwork, database: Database) -> None:
    url = make_url(database.url).set(port=network.port)
    async with DBConnect.from_url(url, resolve_commits=True) as db:
        network.fail(Point.COMMITTED, Fault.DROP)
        await _write(db)
    assert await database.names() == ["a"]


async def test_a_database_that_resolves_its_commits_can_be_overridden_by_a_database_that_cannot(
    database: Database,
) -> None:
    async with (
        DBConnect.from_url(database.url, resolve_commits=True) as db,
        db.overridden("sqlite+aiosqlite://"),
        new_db_ctx(),
    ):
        assert await (await db_session(db)).scalar(text("SELECT 1")) == 1


async def test_only_postgresql_can_resolve_commits() -> None:
    with pytest.raises(ArgumentValueError, match="resolve_commits"):
        DBConnect.from_url("sqlite+aiosqlite://", resolve_commits=True)
    db = DBConnect(lambda host: create_async_engine("sqlite+aiosqlite://"), host="here", resolve_commits=True)
    with pytest.raises(ArgumentValueError, match="resolve_commits"):
        await db.engine()


@pytest.mark.parametrize("resolves", [False, True])
async def test_a_lost_commit_is_noticed_on_an_engine_that_shares_its_dialect_with_a_closed_one(
    far: DBConnect, network: FaultyNetwork, database: Database, *, resolves: bool
) -> None:
    """The engines that ``execution_options`` returns have one dialect, by which commits are made."""
    base = database.watch_new()

    def create(host: str) -> AsyncEngine:
        return base.execution_options(logging_token="app")

    async with DBConnect(create, host="127.0.0.1") as first:
        await _assert_healthy(first)
    del first
    gc.collect()
    async with DBConnect(create, host="127.0.0.1", resolve_commits=resolves) as second:
        network.fail(Point.COMMITTED, Fault.RESET)
        if resolves:
            await _write(second)
        else:
            with pytest.raises(CommitOutcomeUnknownError):
                await _write(second)
    assert network.failed.is_set()
    assert await database.names() == ["a"]
    await base.dispose()
