"""What code asks of its unit of work: hooks at the begin and the end of transactions, and `set_rollback_only`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from tests.support.database import Database, Item, insert

from ctxdb_core import (
    ContextNotInitiatedError,
    CtxDBError,
    DBConnect,
    SessionOwnedError,
    TransactionAlreadyActiveError,
    TransactionRequiredError,
    UnexpectedRollbackError,
    atomic_db_session,
    commit_db_session,
    db_session,
    joining_session,
    new_db_ctx,
    on_begin,
    on_commit,
    on_rollback,
    rollback_db_session,
    run_in_new_ctx,
    set_rollback_only,
    transactional,
    unit_of_work,
)
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core.adapters import begin, finalize

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


# --- set_rollback_only ------------------------------------------------------------------------------------------------


@KINDS
async def test_a_unit_marked_rollback_only_is_rolled_back_without_an_error(db: DBConnect, database: Database) -> None:
    async with unit_of_work():
        await insert(db, "one")
        set_rollback_only()
    assert await database.names() == []


async def test_only_the_named_database_is_rolled_back(db: DBConnect, second_db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "kept")
        await insert(second_db, "undone")
        set_rollback_only(second_db)
    assert await database.names() == ["kept"]


async def test_a_mark_for_rollback_holds_for_sessions_that_are_opened_later(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        set_rollback_only()
        await insert(db, "one")
    assert await database.names() == []


async def test_before_commit_may_mark_the_unit_for_rollback(db: DBConnect, database: Database) -> None:
    async def rehearse(session: AsyncSession) -> None:
        set_rollback_only()

    async with new_db_ctx(before_commit=rehearse):
        await insert(db, "one")
    assert await database.names() == []


async def test_before_commit_may_mark_one_database_of_several(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async def rehearse(session: AsyncSession) -> None:
        set_rollback_only(second_db)

    async with new_db_ctx(before_commit=rehearse):
        await insert(db, "kept")
        await insert(second_db, "undone")
    assert await database.names() == ["kept"]


async def test_before_commit_may_mark_one_database_where_the_code_has_marked_another(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async def rehearse(session: AsyncSession) -> None:
        set_rollback_only(db)

    async with new_db_ctx(before_commit=rehearse):
        await insert(db, "undone")
        await insert(second_db, "undone, too")
        set_rollback_only(second_db)
    assert await database.names() == []


async def test_before_commit_may_open_a_session_beside_a_database_that_is_rolled_back(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async def record(session: AsyncSession) -> None:
        if session is await db_session(db):
            await insert(recording, "record")

    async with DBConnect(lambda host: database.watch_new(), host="127.0.0.1") as recording:
        unit = begin(before_commit=record)
        assert unit is not None
        await insert(db, "kept")
        await insert(second_db, "undone")
        set_rollback_only(second_db)
        await finalize(unit, commit=True, last=False)
        assert sorted(await database.names()) == ["kept", "record"]
        await finalize(unit, commit=True)


async def test_objects_of_a_session_that_expires_are_readable_where_another_database_is_rolled_back(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    def make(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=True)

    async with DBConnect(lambda host: database.watch_new(), make, host="127.0.0.1") as expiring:
        unit = begin()
        assert unit is not None
        (await db_session(expiring)).add(item := Item(name="kept"))
        await insert(second_db, "undone")
        set_rollback_only(second_db)
        await finalize(unit, commit=True, last=False)
        assert item.name == "kept"
        await finalize(unit, commit=True)
    assert await database.names() == ["kept"]


async def test_an_explicit_commit_is_refused_if_before_commit_marks_the_unit(db: DBConnect, database: Database) -> None:
    async def rehearse(session: AsyncSession) -> None:
        set_rollback_only()

    async with new_db_ctx(before_commit=rehearse):
        await insert(db, "one")
        with pytest.raises(UnexpectedRollbackError, match="set_rollback_only"):
            await commit_db_session(db)
    assert await database.names() == []


async def test_a_plain_function_as_before_commit_is_named_in_the_error(db: DBConnect, database: Database) -> None:
    def prepare(session: AsyncSession) -> None: ...

    with pytest.raises(CtxDBError, match=r"prepare.*, given as `before_commit`, is no async function"):
        async with new_db_ctx(before_commit=prepare):  # type: ignore[arg-type]  # the mistake
            await insert(db, "one")
    assert await database.names() == []


async def test_a_plain_function_for_on_begin_is_named_in_the_error(db: DBConnect) -> None:
    def settle_in(session: AsyncSession) -> None: ...

    async with new_db_ctx():
        on_begin(db, settle_in)  # type: ignore[arg-type]  # the mistake
        with pytest.raises(CtxDBError, match=r"settle_in.*, given as the callback of `on_begin`, is no async function"):
            await insert(db, "one")


async def test_an_explicit_commit_is_refused_after_a_mark_for_rollback(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        set_rollback_only(db)
        with pytest.raises(UnexpectedRollbackError, match="set_rollback_only"):
            await commit_db_session(db)
    assert await database.names() == []


async def test_the_end_of_a_block_of_the_session_does_not_commit_what_was_marked(
    db: DBConnect, database: Database
) -> None:
    with suppress(UnexpectedRollbackError):
        async with new_db_ctx(), (await db_session(db)).begin():
            await insert(db, "one")
            set_rollback_only()
    assert await database.names() == []


async def test_a_block_inside_of_a_marked_unit_is_rolled_back_with_it(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        async with atomic_db_session(db):
            await insert(db, "one")
            set_rollback_only(db)
        await insert(db, "two")
    assert await database.names() == ["two"]


async def test_a_unit_of_work_beside_the_marked_one_is_committed(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        set_rollback_only()
        await run_in_new_ctx(insert, db, "beside")
    assert await database.names() == ["beside"]


async def test_set_rollback_only_is_refused_without_a_transaction(db: DBConnect) -> None:
    with pytest.raises(ContextNotInitiatedError):
        set_rollback_only()
    with pytest.raises(ContextNotInitiatedError):
        set_rollback_only(db)
    async with transactional(db, "not_supported"):
        with pytest.raises(TransactionRequiredError):
            set_rollback_only(db)


# --- on_rollback ------------------------------------------------------------------------------------------------------


async def test_a_rollback_callback_runs_for_what_was_rolled_back_alone(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        await insert(db, "kept")
        on_rollback(db, lambda: seen.append("committed"))
    async with new_db_ctx():
        await insert(db, "undone")
        on_commit(db, lambda: seen.append("committed"))
        on_rollback(db, lambda: seen.append("rolled back"))
        set_rollback_only()
    assert seen == ["rolled back"]


async def test_a_rollback_callback_runs_where_an_exception_ends_the_unit(db: DBConnect, database: Database) -> None:
    async def note() -> None:
        await insert(db, "note")

    with pytest.raises(LookupError):
        async with new_db_ctx():
            await insert(db, "one")
            on_rollback(db, note)
            raise LookupError
    assert await database.names() == ["note"]


async def test_a_rollback_callback_goes_with_its_savepoint(db: DBConnect, database: Database) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        with pytest.raises(LookupError):
            async with session.begin_nested():
                await insert(db, "two")
                on_rollback(db, lambda: seen.append("savepoint"))
                raise LookupError
        async with session.begin_nested():
            on_rollback(db, lambda: seen.append("released"))
    assert (await database.names(), seen) == (["one"], ["savepoint"])


async def test_a_rollback_callback_runs_after_a_failing_commit(db: DBConnect) -> None:
    seen: list[str] = []
    with pytest.raises(IntegrityError):
        async with new_db_ctx():
            await (await db_session(db)).execute(text("INSERT INTO child VALUES ('orphan')"))
            on_rollback(db, lambda: seen.append("rolled back"))
    assert seen == ["rolled back"]


# --- on_begin ---------------------------------------------------------------------------------------------------------


async def setting(db: DBConnect) -> str:
    value: str = await (await db_session(db)).scalar(text("SELECT current_setting('shop.tenant', true)"))
    return value


async def set_tenant(session: AsyncSession) -> None:
    await session.execute(text("SELECT set_config('shop.tenant', 'ada', true)"))


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_each_transaction_of_a_unit_begins_with_the_hook(db: DBConnect) -> None:
    async with new_db_ctx():
        on_begin(db, set_tenant)
        for end in (commit_db_session, rollback_db_session):
            assert await setting(db) == "ada"
            await end(db)
        assert await setting(db) == "ada"
    async with new_db_ctx():
        assert not await setting(db)


async def test_the_hook_comes_before_the_first_flush(db: DBConnect, database: Database) -> None:
    found: list[list[str]] = []

    async def note(session: AsyncSession) -> None:
        found.append(list((await session.scalars(select(Item.name).execution_options(autoflush=False))).all()))

    async with new_db_ctx():
        on_begin(db, note)
        session = await db_session(db)
        session.add(Item(name="one"))
        await session.commit()
        session.add(Item(name="two"))
    assert found == [[], ["one"]]
    assert await database.names() == ["one", "two"]


async def test_a_hook_without_statements_is_awaited_once_in_each_transaction(db: DBConnect, database: Database) -> None:
    begun: list[str] = []

    async def note(session: AsyncSession) -> None:
        begun.append("note")

    async with new_db_ctx():
        on_begin(db, note)
        session = await db_session(db)
        session.add(Item(name="flushed"))
        await commit_db_session(db)
        assert begun == ["note"]
        await session.execute(text("INSERT INTO item VALUES ('executed')"))
        await session.scalar(text("SELECT 1"))
        await commit_db_session(db)
        assert begun == ["note"] * 2
        async with session.begin_nested():
            session.add(Item(name="nested"))
        await rollback_db_session(db)
        assert begun == ["note"] * 3
        await session.flush()
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert begun == ["note"] * 4
    assert await database.names() == ["executed", "flushed"]


async def test_a_hook_that_follows_one_without_statements_is_awaited_in_the_same_transaction(db: DBConnect) -> None:
    async def do_nothing(session: AsyncSession) -> None:
        pass

    async with new_db_ctx():
        on_begin(db, do_nothing)
        await (await db_session(db)).flush()
        on_begin(db, set_tenant)
        assert await setting(db) == "ada"


async def test_the_hook_comes_after_the_options_of_the_transaction(db: DBConnect) -> None:
    async with new_db_ctx():
        on_begin(db, set_tenant)
        async with atomic_db_session(db, isolation_level="SERIALIZABLE") as session:
            assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
            assert await setting(db) == "ada"


async def test_no_statement_is_made_in_a_transaction_whose_hook_has_failed(db: DBConnect) -> None:
    attempts: list[int] = []

    async def fail_once(session: AsyncSession) -> None:
        attempts.append(1)
        await session.execute(text("SELECT 1"))
        if len(attempts) == 1:
            raise LookupError
        await set_tenant(session)

    async with new_db_ctx():
        on_begin(db, fail_once)
        with pytest.raises(LookupError):
            await setting(db)
        assert await setting(db) == "ada"


async def test_a_hook_is_refused_where_a_statement_has_been_made(db: DBConnect) -> None:
    async with new_db_ctx():
        await setting(db)
        with pytest.raises(TransactionAlreadyActiveError, match="on_begin"):
            on_begin(db, set_tenant)
        await commit_db_session(db)
        on_begin(db, set_tenant)
        assert await setting(db) == "ada"


async def test_tasks_at_once_find_what_the_hook_has_set(db: DBConnect) -> None:
    async with new_db_ctx():
        on_begin(db, set_tenant)
        assert await asyncio.gather(*(setting(db) for _ in range(4))) == ["ada"] * 4


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_hook_is_refused_inside_of_a_savepoint(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        async with session.begin_nested():
            with pytest.raises(TransactionAlreadyActiveError, match="savepoint"):
                on_begin(db, set_tenant)
        # No statement has been made in the transaction.
        on_begin(db, set_tenant)


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_read_only_database_has_transactions_for_the_hook(database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True, pool_size=1) as db:
        async with new_db_ctx():
            on_begin(db, set_tenant)
            session = await db_session(db)
            for end in (session.commit, session.rollback, session.close):
                assert await setting(db) == "ada"
                assert await session.scalar(text("SHOW transaction_read_only")) == "on"
                await end()
            await session.connection(execution_options={"logging_token": "first"})
            assert await setting(db) == "ada"
        async with new_db_ctx():
            assert not await setting(db)
            # Each statement is a transaction of its own again.
            session = await db_session(db)
            assert await session.scalar(text("SELECT now()")) != await session.scalar(text("SELECT now()"))


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_no_statement_is_made_in_autocommit_without_what_the_hook_has_set(database: Database) -> None:
    async with database.connect(isolation_level="AUTOCOMMIT") as db:
        for begin in (insert, _connect, partial(_connect, logging_token="first")):
            with pytest.raises(TransactionRequiredError, match="autocommit"):
                async with new_db_ctx():
                    on_begin(db, set_tenant)
                    await begin(db, "item")
    assert await database.names() == []


async def test_a_connection_in_autocommit_is_refused_where_a_hook_sets_something(db: DBConnect) -> None:
    async with new_db_ctx():
        on_begin(db, set_tenant)
        with pytest.raises(TransactionRequiredError, match="autocommit"):
            await _connect(db, "item", isolation_level="AUTOCOMMIT")
        assert await setting(db) == "ada"


async def _connect(db: DBConnect, name: str, **options: Any) -> None:
    session = await db_session(db)
    connection = await session.connection(execution_options=options or None)
    await connection.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})


async def test_a_hook_that_is_registered_by_another_hook_follows_that_hook(db: DBConnect) -> None:
    calls: list[str] = []

    async def register(session: AsyncSession) -> None:
        calls.append("register")
        if len(calls) == 1:
            on_begin(db, set_tenant)
        await session.execute(text("SELECT 1"))

    async with new_db_ctx():
        on_begin(db, register)
        for _ in range(2):
            assert await setting(db) == "ada"
            await commit_db_session(db)
    assert calls == ["register"] * 2


async def test_a_hook_is_refused_in_a_block_without_transactions(db: DBConnect) -> None:
    async with transactional(db, "not_supported"):
        with pytest.raises(TransactionRequiredError):
            on_begin(db, set_tenant)


async def test_a_session_whose_hook_has_only_set_something_may_be_closed(db: DBConnect) -> None:
    async def set_role(session: AsyncSession) -> None:
        await session.execute(text("SET LOCAL ROLE postgres"))

    async with new_db_ctx():
        on_begin(db, set_role)
        async with await db_session(db) as session:
            assert await session.scalar(text("SELECT 1")) == 1


async def test_a_session_whose_hook_has_written_may_not_be_closed(db: DBConnect) -> None:
    async def write(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO item VALUES ('of the hook')"))

    async with new_db_ctx():
        on_begin(db, write)
        session = await db_session(db)
        assert await session.scalar(text("SELECT 1")) == 1
        with pytest.raises(SessionOwnedError):
            await session.close()


async def test_the_statements_of_a_hook_come_before_objects_that_were_added_earlier(db: DBConnect) -> None:
    seen = []

    async def look(session: AsyncSession) -> None:
        seen.append((await session.scalars(select(Item.name))).all())

    async with new_db_ctx():
        on_begin(db, look)
        (await db_session(db)).add(Item(name="added"))
        assert (await (await db_session(db)).scalars(select(Item.name))).all() == ["added"]
    assert seen == [[]]


async def test_a_flush_of_nothing_begins_no_transaction_by_its_hook(db: DBConnect) -> None:
    begun: list[AsyncSession] = []

    async def note(session: AsyncSession) -> None:
        begun.append(session)

    async with new_db_ctx():
        on_begin(db, note)
        session = await insert(db, "one")
        await commit_db_session(db)
        await session.flush()
        assert begun == [session]
        assert not session.in_transaction()


async def test_a_setting_of_the_hook_outlasts_the_savepoint_that_a_transaction_begins_with(db: DBConnect) -> None:
    async with new_db_ctx():
        on_begin(db, set_tenant)
        session = await db_session(db)
        with pytest.raises(LookupError):
            async with session.begin_nested():
                await session.execute(text("SELECT 1"))
                raise LookupError
        assert await setting(db) == "ada"
        await commit_db_session(db)

        def undo_savepoint(sync_session: Session) -> None:
            with suppress(LookupError), sync_session.begin_nested():
                sync_session.execute(text("SELECT 1"))
                raise LookupError

        await session.run_sync(undo_savepoint)
        assert await setting(db) == "ada"


async def begin_by_flush(session: AsyncSession) -> None:
    session.add(Item(name="one"))
    await session.flush()


async def begin_by_commit_of_block(session: AsyncSession) -> None:
    async with session.begin():
        session.add(Item(name="one"))


async def begin_by_savepoint(session: AsyncSession) -> None:
    async with session.begin_nested():
        session.add(Item(name="one"))


async def begin_in_run_sync(session: AsyncSession) -> None:
    await session.run_sync(lambda sync_session: sync_session.execute(text("SELECT 1")))


async def begin_by_lazy_load(session: AsyncSession) -> None:
    on_begin_of_session, guard_of(session).on_begin = guard_of(session).on_begin, None
    item = Item(name="one")
    session.add(item)
    await session.commit()
    session.expire(item)
    guard_of(session).on_begin = on_begin_of_session
    name: Any = AsyncAttrs._AsyncAttrGetitem(item)
    await name.name


BEGINNINGS = pytest.mark.parametrize(
    "start",
    [begin_by_flush, begin_by_commit_of_block, begin_by_savepoint, begin_in_run_sync, begin_by_lazy_load],
)


@BEGINNINGS
async def test_a_hook_may_make_its_statements_in_a_task(
    db: DBConnect, start: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    async def set_tenant_in_task(session: AsyncSession) -> None:
        await asyncio.wait_for(asyncio.create_task(set_tenant(session)), 20)

    async with new_db_ctx():
        on_begin(db, set_tenant_in_task)
        await start(await db_session(db))
        assert await setting(db) == "ada"


@BEGINNINGS
async def test_the_error_of_a_hook_surfaces_wherever_the_transaction_begins(
    db: DBConnect, database: Database, start: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    attempts: list[int] = []

    async def fail_once(session: AsyncSession) -> None:
        attempts.append(1)
        await session.execute(text("SELECT 1"))
        if len(attempts) == 1:
            raise LookupError
        await set_tenant(session)

    async with new_db_ctx():
        on_begin(db, fail_once)
        session = await db_session(db)
        with pytest.raises(LookupError):
            await start(session)
        session.expunge_all()
        await session.rollback()
        assert await setting(db) == "ada"


# --- joining_session --------------------------------------------------------------------------------------------------


@KINDS
async def test_commit_of_a_joining_session_is_committed_with_the_unit(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        async with joining_session(db) as session:
            session.add(Item(name="two"))
            await session.commit()
            assert await database.names() == []
            session.add(Item(name="undone"))
            await session.flush()
            await session.rollback()
            session.add(Item(name="three"))
        await insert(db, "four")
        assert await database.names() == []
    assert sorted(await database.names()) == ["four", "one", "three", "two"]


@KINDS
async def test_commit_of_a_joining_session_is_rolled_back_with_the_unit(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            async with joining_session(db) as session:
                session.add(Item(name="one"))
                await session.commit()
            raise LookupError
    assert await database.names() == []


async def test_a_joining_session_sees_what_was_only_added(db: DBConnect) -> None:
    async with new_db_ctx():
        (await db_session(db)).add(Item(name="one"))
        async with joining_session(db) as session:
            assert (await session.scalars(select(Item.name))).all() == ["one"]


async def test_an_exception_undoes_what_a_joining_session_has_not_committed(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        with pytest.raises(LookupError):
            async with joining_session(db) as session:
                session.add(Item(name="kept"))
                await session.commit()
                session.add(Item(name="undone"))
                await session.flush()
                raise LookupError
    assert await database.names() == ["kept"]


@KINDS
async def test_a_commit_of_the_unit_commits_the_statements_of_a_joining_session(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx(), joining_session(db) as session:
        session.add(Item(name="sent"))
        await session.flush()
        await commit_db_session(db)
        assert await database.names() == ["sent"]
        await insert(db, "later")
    assert sorted(await database.names()) == ["later", "sent"]


@KINDS
@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("end", [commit_db_session, rollback_db_session])
async def test_a_statement_of_a_joining_session_whose_transaction_the_unit_has_ended_is_refused(
    db: DBConnect, end: Callable[[DBConnect], Awaitable[None]], *, has_begun: bool
) -> None:
    async with new_db_ctx(), joining_session(db) as session:
        if has_begun:
            await session.scalars(select(Item))
        await end(db)
        with pytest.raises(TransactionRequiredError, match="open another"):
            await session.scalars(select(Item))


async def test_a_joining_session_that_adds_after_a_commit_of_the_unit_gets_an_error(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        with pytest.raises(TransactionRequiredError, match="open another"):
            async with joining_session(db) as session:
                await session.scalars(select(Item))
                await commit_db_session(db)
                session.add(Item(name="lost"))
    assert await database.names() == []
