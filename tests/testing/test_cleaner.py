"""`TableCleaner`: real commits, undone in the tables that they have changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import text
from tests.support.database import Database, eventually, insert

from ctxdb_core import DBConnect, new_db_ctx, new_non_ctx_session, run_in_new_ctx
from ctxdb_core.testing import CleanUpError, TableCleaner, rollback_session


@pytest.fixture(autouse=True)
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch for writes of others briefly: before each of these tests, its own fixtures have written."""
    monkeypatch.setattr("ctxdb_core.testing._tables.QUIET_SECONDS", 0.01)


@pytest.fixture(params=["silent", "with triggers"])
def triggers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, postgresql: None) -> None:
    """Clean as a role that may set `session_replication_role`, and as one that may not."""
    if request.param == "with triggers":
        monkeypatch.setattr("ctxdb_core.testing._postgres_tables._NO_TRIGGERS", "SET LOCAL nobody.may = no; SELECT 1/0")


@pytest.fixture
async def schema(database: Database, postgresql: None) -> AsyncIterator[Schema]:
    """Runs statements, and drops the tables whose names begin with `own_` after the test."""

    async def run(*statements: str) -> None:
        for statement in statements:
            await database.query(statement)

    yield run
    drop = "SELECT string_agg(format('DROP TABLE IF EXISTS %I CASCADE', relname), '; ') FROM pg_class "
    ((statements,),) = await database.query(drop + "WHERE relkind IN ('r', 'p') AND relname LIKE 'own\\_%'")
    await run(*(statements or "SELECT 1").split("; "))


Schema = Callable[..., Awaitable[None]]


@pytest.fixture
async def cleaner(db: DBConnect) -> AsyncIterator[TableCleaner]:
    async with TableCleaner(db) as cleaner:
        yield cleaner


@pytest.fixture
async def numbered(database: Database) -> AsyncIterator[None]:
    """A table whose rows are numbered by a sequence, with two rows in it, and a table that refers to it."""
    key = "SERIAL PRIMARY KEY" if database.is_postgresql else "INTEGER PRIMARY KEY AUTOINCREMENT"
    await database.query(f"CREATE TABLE numbered (id {key}, name VARCHAR(40))")
    await database.query("CREATE TABLE note (numbered INTEGER REFERENCES numbered (id))")
    await database.query("INSERT INTO numbered (name) VALUES ('one'), ('two')")
    await database.query("INSERT INTO note VALUES (1)")
    yield
    await database.query("DROP TABLE note")
    await database.query("DROP TABLE numbered")


async def rows(database: Database) -> list[tuple[int, str]]:
    return await database.query("SELECT id, name FROM numbered ORDER BY id")


async def test_cleaner_empties_changed_tables_and_returns_their_names(
    db: DBConnect, database: Database, cleaner: TableCleaner
) -> None:
    await run_in_new_ctx(insert, db, "one")
    assert await cleaner.clean() == ["public.item" if database.is_postgresql else "item"]
    assert await database.names() == []
    assert await cleaner.clean() == []


async def test_cleaner_sees_changes_of_other_processes(database: Database, cleaner: TableCleaner) -> None:
    await database.query("INSERT INTO item VALUES ('one')")
    assert len(await cleaner.clean()) == 1
    assert await database.names() == []


async def test_cleaner_empties_tables_that_refer_to_each_other(database: Database, cleaner: TableCleaner) -> None:
    await database.query("INSERT INTO parent VALUES ('p')")
    await database.query("INSERT INTO child VALUES ('p')")
    assert len(await cleaner.clean()) == 2
    assert await database.names("parent") == []


async def test_rolled_back_write_is_no_change(db: DBConnect, database: Database, cleaner: TableCleaner) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(text("INSERT INTO item VALUES ('one')"))
        await session.rollback()
    assert await cleaner.clean() == []


async def test_cleaner_empties_tables_that_are_newer_than_the_cleaner(
    database: Database, cleaner: TableCleaner
) -> None:
    await database.query("CREATE TABLE newer (name VARCHAR(40))")
    await database.query("INSERT INTO newer VALUES ('one')")
    await cleaner.clean()
    assert await database.names("newer") == []
    await database.query("DROP TABLE newer")


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize(
    "change",
    [
        "INSERT INTO numbered (name) VALUES ('three')",
        "UPDATE numbered SET name = 'changed' WHERE id = 2",
        "DELETE FROM numbered WHERE id = 2",
    ],
    ids=["insert", "update", "delete"],
)
async def test_rows_that_were_there_are_put_back(db: DBConnect, database: Database, change: str) -> None:
    before = await rows(database)
    async with TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []
        for _ in range(2):
            await database.query(change)
            assert [name.removeprefix("public.") for name in await cleaner.clean()] == ["numbered"]
            assert await rows(database) == before
            assert await cleaner.clean() == []
    assert await database.query("SELECT numbered FROM note") == [(1,)]


@pytest.mark.usefixtures("numbered")
async def test_sequences_go_on_where_they_were(db: DBConnect, database: Database) -> None:
    async with TableCleaner(db) as cleaner:
        for _ in range(2):
            await database.query("INSERT INTO numbered (name) VALUES ('three')")
            assert (3, "three") in await rows(database)
            await cleaner.clean()


@pytest.mark.usefixtures("numbered", "postgresql")
async def test_a_role_that_may_not_silence_triggers_cleans_as_well(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await rows(database)
    monkeypatch.setattr("ctxdb_core.testing._postgres_tables._NO_TRIGGERS", "SET LOCAL nobody.may = no; SELECT 1/0")
    async with TableCleaner(db) as cleaner:
        await database.query("UPDATE numbered SET name = 'changed' WHERE id = 2")
        await run_in_new_ctx(insert, db, "one")
        await cleaner.clean()
        assert await rows(database) == before
        assert await database.query("SELECT numbered FROM note") == [(1,)]
        assert await database.names() == []


@pytest.mark.usefixtures("triggers")
async def test_rows_of_inheriting_tables_do_not_count_as_their_parents(
    db: DBConnect, database: Database, schema: Schema
) -> None:
    await schema(
        "CREATE TABLE own_base (id INT)",
        "CREATE TABLE own_heir (extra INT) INHERITS (own_base)",
        "INSERT INTO own_base VALUES (1)",
        "INSERT INTO own_heir VALUES (2, 20)",
    )
    both = "SELECT 'base', id, 0 FROM ONLY own_base UNION ALL SELECT 'heir', id, extra FROM own_heir ORDER BY 2"
    before = await database.query(both)
    async with TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []
        await schema("INSERT INTO own_base VALUES (3)")
        assert await cleaner.clean() == ["public.own_base"]
        assert await database.query(both) == before
        await schema("INSERT INTO own_heir VALUES (3, 30)")
        assert await cleaner.clean() == ["public.own_heir"]
        assert await database.query(both) == before
        assert await cleaner.clean() == []


@pytest.mark.usefixtures("triggers")
async def test_rows_of_partitions_are_put_back_behind_foreign_keys(
    db: DBConnect, database: Database, schema: Schema
) -> None:
    await schema(
        "CREATE TABLE own_order (day INT, id INT, PRIMARY KEY (day, id)) PARTITION BY LIST (day)",
        "CREATE TABLE own_order_1 PARTITION OF own_order FOR VALUES IN (1)",
        "CREATE TABLE own_order_2 PARTITION OF own_order FOR VALUES IN (2)",
        "CREATE TABLE own_line (day INT, id INT, FOREIGN KEY (day, id) REFERENCES own_order) PARTITION BY LIST (day)",
        "CREATE TABLE own_line_1 PARTITION OF own_line FOR VALUES IN (1)",
        "CREATE TABLE own_line_2 PARTITION OF own_line FOR VALUES IN (2)",
        "INSERT INTO own_order VALUES (1, 1), (2, 1)",
        "INSERT INTO own_line VALUES (1, 1), (2, 1)",
    )
    everything = "SELECT 'order', * FROM own_order UNION ALL SELECT 'line', * FROM own_line ORDER BY 1, 2, 3"
    before = await database.query(everything)
    async with TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []
        for _ in range(2):
            await schema("INSERT INTO own_order VALUES (1, 2)", "UPDATE own_line SET id = 2 WHERE day = 1")
            assert await cleaner.clean() == ["public.own_line_1", "public.own_order_1"]
            assert await database.query(everything) == before
            assert await cleaner.clean() == []


@pytest.mark.usefixtures("triggers")
@pytest.mark.parametrize("columns", ["", "one INT GENERATED ALWAYS AS (1) STORED"], ids=["none", "generated"])
async def test_tables_without_columns_that_can_be_written_keep_their_rows(
    db: DBConnect, database: Database, schema: Schema, columns: str
) -> None:
    await schema(f"CREATE TABLE own_rows ({columns})", *["INSERT INTO own_rows DEFAULT VALUES"] * 2)
    async with TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []
        for _ in range(2):
            await schema("INSERT INTO own_rows DEFAULT VALUES")
            assert await cleaner.clean() == ["public.own_rows"]
            assert await database.query("SELECT count(*) FROM own_rows") == [(2,)]
            assert await cleaner.clean() == []


@pytest.mark.usefixtures("triggers")
@pytest.mark.parametrize("kind", ["ALWAYS", "BY DEFAULT"])
@pytest.mark.parametrize("used", [True, False], ids=["used", "not used yet"])
async def test_identity_columns_go_on_where_they_were(
    db: DBConnect, database: Database, schema: Schema, kind: str, used: bool
) -> None:
    await schema(
        f"CREATE TABLE own_numbered (id INT GENERATED {kind} AS IDENTITY, half INT GENERATED ALWAYS AS (1) STORED)",
        "ALTER TABLE own_numbered ALTER id RESTART WITH 1000",
    )
    if used:
        await schema("INSERT INTO own_numbered DEFAULT VALUES")
    before = await database.query("SELECT * FROM own_numbered")
    async with TableCleaner(db) as cleaner:
        for _ in range(2):
            await schema("INSERT INTO own_numbered DEFAULT VALUES")
            assert await database.query("SELECT max(id) FROM own_numbered") == [(1000 + used,)]
            assert await cleaner.clean() == ["public.own_numbered"]
            assert await database.query("SELECT * FROM own_numbered") == before


async def test_a_sequence_that_stands_at_zero_goes_on_there(
    db: DBConnect, database: Database, postgresql: None
) -> None:
    await database.query("CREATE SEQUENCE own_sequence MINVALUE 0 START 0")
    try:
        await database.query("SELECT nextval('own_sequence')")
        async with TableCleaner(db) as cleaner:
            await database.query("SELECT nextval('own_sequence')")
            assert await cleaner.clean() == []
        assert await database.query("SELECT nextval('own_sequence')") == [(1,)]
    finally:
        await database.query("DROP SEQUENCE own_sequence")


async def test_the_cleaner_waits_for_transactions_that_are_about_to_end(
    db: DBConnect, database: Database, cleaner: TableCleaner, postgresql: None
) -> None:
    await run_in_new_ctx(insert, db, "one")
    async with new_db_ctx():
        await insert(db, "two")
        cleaning = asyncio.create_task(cleaner.clean())
        await eventually(lambda: bool(database.backends("query ~ 'pg_stat_activity'")), "the cleaner does not wait")
    assert await cleaning == ["public.item"]
    assert await database.names() == []


async def test_a_transaction_that_is_left_open_is_told(
    db: DBConnect, cleaner: TableCleaner, postgresql: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core.testing._postgres_tables.WRITER_SECONDS", 0.05)
    await run_in_new_ctx(insert, db, "one")
    async with new_db_ctx():
        await insert(db, "two")
        with pytest.raises(CleanUpError, match="left a transaction open"):
            await cleaner.clean()


async def test_sessions_of_the_testing_tools_are_no_writers(
    db: DBConnect, database: Database, postgresql: None
) -> None:
    async with TableCleaner(db) as cleaner, rollback_session(db) as session:
        await session.execute(text("INSERT INTO parent VALUES ('undone')"))
        await run_in_new_ctx(insert, db, "one")
        assert await cleaner.clean() == ["public.item"]
    assert await database.names("parent") == []


async def test_tables_that_stay_locked_are_told(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core.testing._postgres_tables.LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr("ctxdb_core.testing._postgres_tables.WRITER_SECONDS", 0.05)
    async with TableCleaner(db) as cleaner:
        if not database.is_postgresql:
            await cleaner._tables.driver.run("PRAGMA busy_timeout = 50")
        await run_in_new_ctx(insert, db, "one")
        async with new_db_ctx():
            session = await insert(db, "two")
            if database.is_postgresql:
                await session.execute(text("LOCK TABLE item"))
            with pytest.raises(CleanUpError, match="left a transaction open"):
                await cleaner.clean()
        await cleaner.clean()
        assert await database.names() == []


async def test_bloated_tables_are_made_small_again(database: Database, cleaner: TableCleaner, postgresql: None) -> None:
    await database.query("INSERT INTO item SELECT 'a rather long name of ' || n FROM generate_series(1, 30000) n")
    await cleaner.clean()
    assert await database.query("SELECT pg_relation_size('item')") == [(0,)]


async def test_a_database_in_memory_is_refused() -> None:
    async with DBConnect.from_url("sqlite+aiosqlite://") as db:
        with pytest.raises(CleanUpError, match="memory"):
            async with TableCleaner(db):
                pytest.fail("the block was entered")
