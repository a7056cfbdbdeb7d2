"""`shared_transaction` by itself: what happens to the transactions of sessions that share one connection."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import StaticPool
from tests.support.database import Database, Item, eventually, insert, insert_row_that_fails_at_commit
from tests.support.items import names

from ctxdb_core import (
    DBConnect,
    TransactionAbortedError,
    TransactionOptionsError,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    on_commit,
    rollback_db_session,
    run_in_new_ctx,
    transactional,
)
from ctxdb_core.adapters import Propagation
from ctxdb_core.testing import SharedTransactionError, rollback_session, shared_transaction
from ctxdb_core.testing._shared import SharedTransaction
from ctxdb_core.testing._thread import LoopThread


async def test_commit_is_seen_by_all_sessions_and_gone_at_the_end(db: DBConnect, database: Database) -> None:
    async with shared_transaction(db) as session:
        async with new_db_ctx():
            await insert(db, "one")
        assert await names(db) == ["one"]
        assert (await session.scalars(select(Item.name))).all() == ["one"]
        assert await database.names() == []
    assert await database.names() == []
    assert await names(db) == []


async def test_rolled_back_work_is_gone_at_once(db: DBConnect) -> None:
    async with shared_transaction(db):
        with pytest.raises(LookupError):
            async with new_db_ctx():
                await insert(db, "one")
                raise LookupError
        assert await names(db) == []


async def test_early_ends_of_transactions_have_their_effect(db: DBConnect) -> None:
    async with shared_transaction(db), new_db_ctx():
        await insert(db, "committed")
        await commit_db_session(db)
        await insert(db, "rolled back")
        await rollback_db_session(db)
        async with atomic_db_session(db):
            await insert(db, "atomic")
        await insert(db, "outer")
        with pytest.raises(LookupError):
            async with atomic_db_session(db, "savepoint"):
                await insert(db, "inner")
                raise LookupError
        await commit_db_session(db)
        assert await names(db) == ["atomic", "committed", "outer"]


async def test_callbacks_of_commits_run(db: DBConnect) -> None:
    called: list[str] = []
    async with shared_transaction(db):
        async with new_db_ctx():
            await insert(db, "one")
            on_commit(db, lambda: called.append("committed"))
        with pytest.raises(LookupError):
            async with new_db_ctx():
                await insert(db, "two")
                on_commit(db, lambda: called.append("rolled back"))
                raise LookupError
    assert called == ["committed"]


async def test_deferred_constraint_is_checked_by_the_commit(db: DBConnect) -> None:
    async with shared_transaction(db):
        for _ in range(2):
            with pytest.raises(IntegrityError):
                async with new_db_ctx():
                    await insert(db, "undone")
                    await insert_row_that_fails_at_commit(db)
        async with new_db_ctx():
            await insert(db, "one")
        assert await names(db) == ["one"]


async def test_deferred_constraint_is_not_checked_before_the_commit(db: DBConnect) -> None:
    async with shared_transaction(db):
        for number in range(2):
            async with new_db_ctx():
                session = await db_session(db)
                await session.execute(text(f"INSERT INTO child VALUES ('p{number}')"))
                await session.execute(text(f"INSERT INTO parent VALUES ('p{number}')"))
        async with new_non_ctx_session(db) as session:
            assert await session.scalar(text("SELECT count(*) FROM child")) == 2


async def test_deferrable_constraint_that_is_initially_immediate_stays_immediate(
    db: DBConnect, postgresql: None
) -> None:
    async with shared_transaction(db) as session:
        await session.execute(text("ALTER TABLE item ADD CONSTRAINT once UNIQUE (name) DEFERRABLE INITIALLY IMMEDIATE"))
        await session.execute(text("ALTER TABLE item DROP CONSTRAINT item_pkey"))
        await session.commit()
        async with new_db_ctx():
            await insert(db, "one")
        with pytest.raises(IntegrityError):
            async with new_db_ctx():
                await insert(db, "one")
                pytest.fail("the second row was not refused by its own statement")


async def test_a_statement_that_fails_does_not_spoil_the_other_transactions(db: DBConnect) -> None:
    async with shared_transaction(db):
        async with new_db_ctx():
            await insert(db, "one")
        with pytest.raises(IntegrityError):
            async with new_db_ctx():
                await insert(db, "one")
        async with new_db_ctx():
            await insert(db, "two")
        assert await names(db) == ["one", "two"]


async def test_a_swallowed_error_shows_at_the_commit(db: DBConnect, postgresql: None) -> None:
    async with shared_transaction(db):
        with pytest.raises(TransactionAbortedError):
            async with new_db_ctx():
                await insert(db, "one")
                with pytest.raises(IntegrityError):
                    await insert(db, "one")
        assert await names(db) == []


async def test_a_transaction_that_failed_stays_aborted_though_others_go_on(db: DBConnect, postgresql: None) -> None:
    async with shared_transaction(db):
        async with new_db_ctx():
            await insert(db, "one")
        with pytest.raises(TransactionAbortedError):
            async with new_db_ctx():
                with pytest.raises(IntegrityError):
                    await insert(db, "one")
                await run_in_new_ctx(insert, db, "noted")
                with pytest.raises(DBAPIError, match="aborted"):
                    await insert(db, "two")
        assert await names(db) == ["noted", "one"]


@pytest.mark.parametrize("end", ["COMMIT", "commit;", "END", "ROLLBACK", "/* now */ ABORT"])
async def test_a_written_out_end_of_the_transaction_ends_no_more_than_the_sessions(
    db: DBConnect, database: Database, end: str
) -> None:
    async with shared_transaction(db):
        async with new_non_ctx_session(db) as session:
            await session.execute(text("INSERT INTO item VALUES ('one')"))
            await session.execute(text(end))
        assert await names(db) == ([] if "O" in end.upper().replace("COMMIT", "") else ["one"])
        assert await database.names() == []


@pytest.mark.parametrize("statement", ["PREPARE TRANSACTION 'x'", "COMMIT AND CHAIN", "SELECT 1; COMMIT"])
async def test_statement_that_would_really_commit_is_refused(db: DBConnect, statement: str) -> None:
    async with shared_transaction(db), new_non_ctx_session(db) as session:
        with pytest.raises(SharedTransactionError, match="for good"):
            await session.execute(text(statement))


async def test_engines_are_part_of_a_shared_transaction(db: DBConnect, database: Database) -> None:
    async with shared_transaction(db):
        engine = await db.engine()
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item VALUES ('one')"))
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("INSERT INTO item VALUES ('two')"))
        maker = await db.session_maker()
        async with maker.begin() as session:
            session.add(Item(name="three"))
        assert await names(db) == ["one", "three", "two"]
        assert await database.names() == []


async def test_session_that_is_older_than_the_shared_transaction_is_refused(db: DBConnect, database: Database) -> None:
    maker = await db.session_maker()
    async with new_non_ctx_session(db) as open_session:
        await open_session.execute(text("INSERT INTO item VALUES ('older')")) if database.is_postgresql else None
        async with shared_transaction(db):
            with pytest.raises(SharedTransactionError, match="older"):
                async with maker.begin() as session:
                    session.add(Item(name="one"))
                    await session.flush()
            if database.is_postgresql:
                with pytest.raises(SharedTransactionError, match="older"):
                    await open_session.commit()
    async with maker.begin() as session:
        session.add(Item(name="afterwards"))
    assert await database.names() == ["afterwards"]


@pytest.mark.parametrize("propagation", ["not_supported", "supports", "never"])
async def test_blocks_without_transactions_are_part_of_a_shared_transaction(
    db: DBConnect, database: Database, propagation: Propagation
) -> None:
    async with shared_transaction(db):
        async with transactional(db, propagation):
            await insert(db, "one")
        assert await names(db) == ["one"]
    assert await database.names() == []


async def test_an_engine_with_options_of_its_own_is_part_of_a_shared_transaction(
    db: DBConnect, database: Database
) -> None:
    async with shared_transaction(db):
        engine = (await db.engine()).execution_options(some_option="some value")
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item VALUES ('one')"))
        assert await names(db) == ["one"]
    assert await database.names() == []


async def test_a_transaction_with_an_isolation_level_can_be_joined(db: DBConnect, database: Database) -> None:
    block = transactional(db, isolation_level="SERIALIZABLE")
    async with shared_transaction(db):
        async with block, block:
            await insert(db, "one")
        if database.is_postgresql:
            with pytest.raises(TransactionOptionsError, match="'READ COMMITTED'"):
                async with new_db_ctx():
                    await insert(db, "two")
                    async with block:
                        pytest.fail("the block was entered")
        assert await names(db) == ["one"]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "repeatable read", "READ COMMITTED"])
async def test_a_written_out_isolation_level_is_accepted(db: DBConnect, postgresql: None, level: str) -> None:
    async with shared_transaction(db):
        async with new_db_ctx():
            await (await db_session(db)).execute(text(f"SET TRANSACTION ISOLATION LEVEL {level}"))
            await insert(db, "one")
        assert await names(db) == ["one"]


async def test_a_read_only_transaction_can_be_joined_and_leaves_others_alone(db: DBConnect, database: Database) -> None:
    block = transactional(db, read_only=True)
    async with shared_transaction(db) as session:
        await run_in_new_ctx(insert, db, "one")
        async with block, block as reading:
            assert (await reading.scalars(select(Item.name))).all() == ["one"]
            # Code that may write beside a read-only transaction elsewhere may do so in a shared transaction.
            await run_in_new_ctx(insert, db, "beside") if database.is_postgresql else None
        with pytest.raises(DBAPIError):
            async with block, block:
                await insert(db, "refused")
        await run_in_new_ctx(insert, db, "two")
        session.add(Item(name="three"))
        await session.commit()
        beside = ["beside"] if database.is_postgresql else []
        assert await names(db) == [*beside, "one", "three", "two"]


async def test_a_database_can_be_closed_inside_of_a_shared_transaction(db: DBConnect) -> None:
    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")
        await db.close()
        assert await names(db) == ["one"]


async def test_a_change_of_the_host_stays_inside_of_a_shared_transaction(db: DBConnect) -> None:
    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")
        await db.change_host("elsewhere.example")
        assert await names(db) == ["one"]
    assert db.host == "127.0.0.1"


async def test_shared_transactions_cannot_be_nested(db: DBConnect) -> None:
    async with shared_transaction(db):
        with pytest.raises(SharedTransactionError, match="nested"):
            async with shared_transaction(db):
                pytest.fail("the block was entered")


async def test_session_that_outlives_the_shared_transaction_gets_an_error(db: DBConnect, database: Database) -> None:
    async with shared_transaction(db):
        session = await db.create_session()
    with pytest.raises(SharedTransactionError, match="has ended"):
        await session.execute(text("INSERT INTO item VALUES ('late')"))
    await session.close()


async def test_a_cancelled_statement_stops_and_the_shared_transaction_goes_on(
    db: DBConnect, database: Database, postgresql: None
) -> None:
    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")

        async def sleep() -> None:
            session = await insert(db, "cancelled")
            await session.execute(text("SELECT pg_sleep(60)"))

        async with asyncio.timeout(30):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await run_in_new_ctx(sleep)
            await run_in_new_ctx(insert, db, "two")
        assert await names(db) == ["one", "two"]
    assert not database.backends("query ~ 'pg_sleep'  AND state = 'active'")


async def test_writes_are_refused_once_the_connection_is_lost(
    db: DBConnect, database: Database, postgresql: None
) -> None:
    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")
        database.terminate_backends()
        with pytest.raises(DBAPIError):
            await run_in_new_ctx(insert, db, "two")
        with pytest.raises(SharedTransactionError, match="lost"):
            await run_in_new_ctx(insert, db, "three")
    assert await database.names() == []


async def test_a_read_only_database_sees_a_shared_transaction_and_cannot_write(
    db: DBConnect, database: Database
) -> None:
    replica = DBConnect.from_url(database.url, read_only=True)
    async with shared_transaction(db, replica):
        await run_in_new_ctx(insert, db, "one")
        assert await names(replica) == ["one"]
        async with new_non_ctx_session(replica) as session:
            with pytest.raises(DBAPIError):
                await session.execute(text("INSERT INTO item VALUES ('two')"))
        await run_in_new_ctx(insert, db, "three")
        assert await names(replica) == ["one", "three"]
    await replica.close()


async def test_a_read_only_database_by_itself_refuses_writes(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as replica, shared_transaction(replica):
        assert await names(replica) == []
        async with new_non_ctx_session(replica) as session:
            with pytest.raises(DBAPIError):
                await session.execute(text("INSERT INTO item VALUES ('two')"))


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("sqlite+aiosqlite://", {}),
        ("sqlite+aiosqlite:///:memory:", {"poolclass": StaticPool}),
        ("sqlite+aiosqlite:///file:shop?mode=memory&uri=true", {"poolclass": StaticPool}),
    ],
    ids=["plain", "static pool", "uri"],
)
async def test_a_shared_transaction_on_a_database_in_memory_finds_the_tables_that_were_made_in_it(
    url: str, options: dict[str, Any]
) -> None:
    async with DBConnect.from_url(url, **options) as db:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("CREATE TABLE item (name VARCHAR(40) PRIMARY KEY)"))
        async with shared_transaction(db):
            await run_in_new_ctx(insert, db, "one")
            # As a test client does, on an event loop of its own.
            await asyncio.to_thread(asyncio.run, run_in_new_ctx(insert, db, "two"))
            assert await names(db) == ["one", "two"]
        assert await names(db) == []


async def test_event_loop_of_another_thread_shares_the_transaction(db: DBConnect) -> None:
    def elsewhere() -> None:
        asyncio.run(run_in_new_ctx(insert, db, "there"))

    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "here")
        await asyncio.to_thread(elsewhere)
        # Also while this loop cannot run.
        elsewhere_again = asyncio.get_running_loop().run_in_executor(None, lambda: None)
        await elsewhere_again
        assert await names(db) == ["here", "there"]


async def test_streams_of_rows_work(db: DBConnect) -> None:
    async with shared_transaction(db), new_db_ctx():
        for name in "abc":
            await insert(db, name)
        result = await (await db_session(db)).stream(select(Item.name).order_by(Item.name))
        assert [name async for (name,) in result] == ["a", "b", "c"]


async def test_a_stream_of_rows_leaves_no_cursor_open(db: DBConnect, postgresql: None) -> None:
    async with shared_transaction(db):
        async with new_db_ctx():
            await insert(db, "one")
            result = await (await db_session(db)).stream(select(Item.name))
            assert [name async for (name,) in result] == ["one"]
        async with new_db_ctx():
            await (await db_session(db)).execute(text("TRUNCATE item"))
        assert await names(db) == []


async def test_a_test_that_is_cancelled_while_it_begins_leaves_nothing(db: DBConnect, database: Database) -> None:
    async def test() -> None:
        async with shared_transaction(db):
            pytest.fail("the block was entered")

    task = asyncio.create_task(test())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await run_in_new_ctx(insert, db, "really")
    assert await database.names() == ["really"]


async def test_the_end_of_a_shared_transaction_waits_for_no_statement(
    db: DBConnect, database: Database, postgresql: None
) -> None:
    async def sleep() -> None:
        await (await db_session(db)).execute(text("SELECT pg_sleep(60)"))

    async with asyncio.timeout(30):
        async with shared_transaction(db):
            left = asyncio.create_task(run_in_new_ctx(sleep))
            await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no statement")
        with pytest.raises(asyncio.CancelledError):
            await left


@pytest.mark.parametrize("style", [shared_transaction, rollback_session])
async def test_a_roll_back_takes_numbers_of_sequences_back_on_sqlite_alone(
    db: DBConnect, database: Database, style: Callable[[DBConnect], AbstractAsyncContextManager[AsyncSession]]
) -> None:
    key = "INT GENERATED ALWAYS AS IDENTITY" if database.is_postgresql else "INTEGER PRIMARY KEY AUTOINCREMENT"
    await database.query(f"CREATE TABLE numbered (id {key}, name VARCHAR(40))")
    ids = []
    for _ in range(2):
        async with style(db) as session:
            await session.execute(text("INSERT INTO numbered (name) VALUES ('one')"))
            ids.append(await session.scalar(text("SELECT id FROM numbered")))
    assert ids == ([1, 2] if database.is_postgresql else [1, 1])
    await database.query("DROP TABLE numbered")


async def test_the_second_of_two_shared_transactions_at_once_is_refused_and_harms_nothing(
    db: DBConnect, database: Database
) -> None:
    begun = asyncio.Event()

    async def test(name: str) -> list[str]:
        async with shared_transaction(db):
            await run_in_new_ctx(insert, db, name)
            await begun.wait()
            return await names(db)

    tests = [asyncio.create_task(test(name)) for name in ("one", "two")]
    refused, _ = await asyncio.wait(tests, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    begun.set()
    assert len(refused) == 1
    with pytest.raises(SharedTransactionError, match="cannot be nested"):
        await refused.pop()
    results = await asyncio.gather(*tests, return_exceptions=True)
    assert [result for result in results if isinstance(result, list)] in ([["one"]], [["two"]])
    await run_in_new_ctx(insert, db, "really")
    assert await database.names() == ["really"]


async def test_databases_are_free_after_a_shared_transaction_that_could_not_begin(
    db: DBConnect, database: Database, tmp_path: Path
) -> None:
    async with DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}") as other:
        with pytest.raises(SharedTransactionError, match="One connection leads to one database"):
            async with shared_transaction(db, other):
                pytest.fail("the block was entered")
    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")
    assert await database.names() == []


async def test_a_database_that_is_named_twice_is_put_back_after_a_shared_transaction(
    db: DBConnect, database: Database
) -> None:
    async with shared_transaction(db, db):
        await run_in_new_ctx(insert, db, "one")
    await run_in_new_ctx(insert, db, "really")
    assert await database.names() == ["really"]


def test_a_beginning_that_is_interrupted_leaves_nothing_behind() -> None:
    cleaned_up = []

    async def hang(db: DBConnect) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned_up.append(db)

    def interrupt(*args: object) -> None:
        # As pytest-timeout does, in the thread that waits for the beginning.
        raise InterruptedError

    db = DBConnect(
        lambda host: create_async_engine("sqlite+aiosqlite://"), host="one", before_create_session_handler=hang
    )
    handler = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with LoopThread() as thread:
            for _ in range(2):
                shared = SharedTransaction(thread, (db,), 1)
                with pytest.raises(InterruptedError):
                    thread.call(shared.begin)
                assert cleaned_up.pop() is db
    finally:
        signal.signal(signal.SIGUSR1, handler)
