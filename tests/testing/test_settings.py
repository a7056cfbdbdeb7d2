"""Settings of a session for its own transaction in a shared one: neither other sessions nor later ones have them."""

from __future__ import annotations

import asyncio
from contextvars import Context

import pytest
from sqlalchemy import Executable, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.database import Database, Item, insert
from tests.support.items import names

from ctxdb_core import DBConnect, db_session, new_db_ctx, new_non_ctx_session, run_in_new_ctx, transactional
from ctxdb_core.testing import SharedTransactionError, shared_transaction

POSTGRESQL = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)

# The beginning of a statement that counts for hours.
ENDLESS = "WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 100000000000) "


async def setting(session: AsyncSession, name: str) -> str | None:
    value: str | None = await session.scalar(select(func.current_setting(name, True)))
    return value


@POSTGRESQL
async def test_the_statement_timeout_of_a_unit_ends_with_the_unit(db: DBConnect) -> None:
    async with shared_transaction(db) as session:
        async with new_db_ctx(statement_timeout=1.5):
            assert await setting(await db_session(db), "statement_timeout") == "1500ms"
        async with new_db_ctx():
            assert await setting(await db_session(db), "statement_timeout") == "0"
        assert await setting(session, "statement_timeout") == "0"


@POSTGRESQL
async def test_the_statement_timeout_of_a_unit_is_not_that_of_sessions_which_take_turns_with_it(db: DBConnect) -> None:
    async def timeout() -> str | None:
        return await setting(await db_session(db), "statement_timeout")

    async with shared_transaction(db) as session, new_db_ctx(statement_timeout=1.5):
        assert await timeout() == "1500ms"
        assert await setting(session, "statement_timeout") == "0"
        await insert(db, "one")
        assert await run_in_new_ctx(timeout) == "0"
        assert await timeout() == "1500ms"


@POSTGRESQL
async def test_a_reader_with_a_statement_timeout_blocks_no_other_session(db: DBConnect) -> None:
    async with shared_transaction(db, timeout=0.05), new_db_ctx(statement_timeout=1.5):
        await (await db_session(db)).scalars(select(Item))
        # The task has no context variables, so it cannot be known to run inside of this transaction.
        await asyncio.create_task(_in_a_unit_beside(db), context=Context())
        assert await names(db) == ["beside"]


async def _in_a_unit_beside(db: DBConnect) -> None:
    async with new_non_ctx_session(db) as session:
        session.add(Item(name="beside"))
        await session.commit()


@POSTGRESQL
async def test_a_statement_that_takes_too_long_fails_and_the_others_go_on(db: DBConnect) -> None:
    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")
        with pytest.raises(DBAPIError) as caught:
            async with new_db_ctx(statement_timeout=0.2):
                session = await insert(db, "two")
                await session.execute(text("SELECT pg_sleep(60)"))
        assert getattr(caught.value.orig, "sqlstate", None) == "57014"
        assert await names(db) == ["one"]


@POSTGRESQL
async def test_an_autocommit_block_has_its_statement_timeout_to_itself(db: DBConnect) -> None:
    async with shared_transaction(db) as session:
        async with new_db_ctx(statement_timeout=1.5), transactional(db, "not_supported") as block:
            assert await setting(block, "statement_timeout") == "1500ms"
            assert await setting(session, "statement_timeout") == "0"
            assert await setting(block, "statement_timeout") == "1500ms"
        assert await setting(session, "statement_timeout") == "0"
        async with new_db_ctx(), transactional(db, "not_supported") as block:
            assert await setting(block, "statement_timeout") == "0"


@POSTGRESQL
@pytest.mark.parametrize(
    "statement",
    [
        text("SET LOCAL shop.tenant = 'one'"),
        text("/* who */ set local SHOP.Tenant TO 'one'"),
        text("SELECT set_config('shop.tenant', 'one', true)"),
        text("SELECT set_config('shop.tenant', :value, true)").bindparams(value="one"),
        select(func.set_config("shop.tenant", "one", True)),
    ],
    ids=["SET LOCAL", "in other letters", "set_config", "with a parameter", "with parameters"],
)
async def test_setting_of_a_transaction_ends_with_the_transaction(db: DBConnect, statement: Executable) -> None:
    async with shared_transaction(db) as session:
        for commit in (True, False):
            async with new_non_ctx_session(db) as own:
                await own.execute(statement)
                assert await setting(own, "shop.tenant") == "one"
                assert not await setting(session, "shop.tenant")
                assert await setting(own, "shop.tenant") == "one"
                await (own.commit() if commit else own.rollback())
                assert not await setting(own, "shop.tenant")
        assert not await setting(session, "shop.tenant")


@POSTGRESQL
async def test_a_setting_that_a_savepoint_undoes_stays_undone(db: DBConnect) -> None:
    async with shared_transaction(db) as session:
        async with new_db_ctx():
            own = await db_session(db)
            await own.execute(text("SET LOCAL shop.tenant = 'one'"))
            savepoint = await own.begin_nested()
            await own.execute(text("SET LOCAL shop.tenant = 'two'"))
            await savepoint.rollback()
            assert await run_in_new_ctx(_tenant, db) == ""
            assert await setting(own, "shop.tenant") == "one"
        assert await setting(session, "shop.tenant") == ""


async def _tenant(db: DBConnect) -> str | None:
    return await setting(await db_session(db), "shop.tenant")


@POSTGRESQL
async def test_a_setting_that_failed_leaves_the_others_of_its_connection(db: DBConnect) -> None:
    async with shared_transaction(db) as session, new_db_ctx(), transactional(db, "not_supported") as own:
        await own.execute(text("SET work_mem = '7MB'"))
        with pytest.raises(DBAPIError):
            await own.execute(text("SET work_mem = 'much'"))
        assert await setting(session, "work_mem") != "7MB"
        assert await setting(own, "work_mem") == "7MB"
        await own.execute(text("SET LOCAL work_mem = '8MB'"))
        assert await setting(own, "work_mem") == "7MB"
        await own.execute(text("RESET work_mem"))
        assert await setting(own, "work_mem") == await setting(session, "work_mem")


@POSTGRESQL
async def test_an_error_behind_a_savepoint_leaves_the_settings_that_were_before_it(db: DBConnect) -> None:
    async with shared_transaction(db), new_db_ctx():
        own = await db_session(db)
        await own.execute(text("SET LOCAL shop.tenant = 'one'"))
        with pytest.raises(DBAPIError):
            async with own.begin_nested():
                await own.execute(text("SET LOCAL shop.tenant = 'two'"))
                await own.execute(text("SELECT 1 / 0"))
        assert await run_in_new_ctx(_tenant, db) == ""
        assert await setting(own, "shop.tenant") == "one"


@POSTGRESQL
async def test_deferred_trigger_sees_the_settings_of_its_session(db: DBConnect) -> None:
    async with shared_transaction(db) as session:
        await session.execute(
            text(
                "CREATE FUNCTION note_tenant() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "PERFORM set_config('shop.seen', current_setting('shop.tenant'), false); RETURN NEW; END $$"
            )
        )
        await session.execute(
            text(
                "CREATE CONSTRAINT TRIGGER note_tenant AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION note_tenant()"
            )
        )
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SET LOCAL shop.tenant = 'one'"))
            await insert(db, "one")
        assert await setting(session, "shop.seen") == "one"
        assert await setting(session, "shop.tenant") == ""


@POSTGRESQL
async def test_a_role_of_one_transaction_is_not_that_of_another(db: DBConnect) -> None:
    async with shared_transaction(db) as session, new_db_ctx():
        own = await db_session(db)
        await own.execute(text("SET LOCAL ROLE pg_monitor"))
        assert await own.scalar(text("SELECT current_user")) == "pg_monitor"
        assert await session.scalar(text("SELECT current_user")) != "pg_monitor"
        assert await own.scalar(text("SELECT current_user")) == "pg_monitor"


@POSTGRESQL
async def test_a_setting_that_is_refused_changes_nothing(db: DBConnect) -> None:
    async with shared_transaction(db) as session:
        with pytest.raises(DBAPIError):
            async with new_db_ctx():
                await (await db_session(db)).execute(text("SET LOCAL work_mem = 'much'"))
        before = await setting(session, "work_mem")
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SET LOCAL work_mem = '7MB'"))
        assert await setting(session, "work_mem") == before


@SQLITE
async def test_a_statement_is_interrupted_on_sqlite(db: DBConnect) -> None:
    async with shared_transaction(db):
        await run_in_new_ctx(insert, db, "one")
        with pytest.raises(DBAPIError, match="interrupted"):
            async with new_db_ctx(statement_timeout=0.05):
                await insert(db, "two")
                await (await db_session(db)).execute(text(ENDLESS + "SELECT count(*) FROM number"))
        assert await names(db) == ["one"]


@SQLITE
async def test_the_time_that_a_statement_waits_for_its_turn_counts_on_sqlite(db: DBConnect) -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        await insert(db, "held")
        begun.set()
        await end.wait()

    async def count() -> None:
        async with new_db_ctx(statement_timeout=0.05):
            await (await db_session(db)).execute(text(ENDLESS + "SELECT count(*) FROM number"))

    async with shared_transaction(db):
        holding = asyncio.create_task(run_in_new_ctx(hold))
        await begun.wait()
        counting = asyncio.create_task(count())
        asyncio.get_running_loop().call_later(0.2, end.set)
        with pytest.raises(DBAPIError, match="interrupted"):
            await counting
        await holding
        assert await names(db) == ["held"]


@SQLITE
async def test_a_write_that_is_interrupted_is_told_to_have_lost_everything(db: DBConnect, database: Database) -> None:
    async with shared_transaction(db):
        with pytest.raises(DBAPIError, match="interrupted"):
            async with new_db_ctx(statement_timeout=0.05):
                await (await db_session(db)).execute(text(f"INSERT INTO item (name) {ENDLESS} SELECT n FROM number"))
        with pytest.raises(SharedTransactionError, match="interrupted"):
            await run_in_new_ctx(insert, db, "one")
    assert await database.names() == []
