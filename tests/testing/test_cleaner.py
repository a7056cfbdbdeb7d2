"""`TableCleaner`: real commits, undone in the tables that they have changed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from tests.support.database import Database, insert

from ctxdb_core import DBConnect, new_db_ctx, new_non_ctx_session, run_in_new_ctx
from ctxdb_core.testing import CleanUpError, TableCleaner


@pytest.fixture
async def cleaner(db: DBConnect) -> AsyncIterator[TableCleaner]:
    async with TableCleaner(db) as cleaner:
        yield cleaner


@pytest.fixture
async def numbered(database: Database) -> AsyncIterator[None]:
    """A table whose rows are numbered by a sequence, with two rows in it, and one that refers to it."""
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


async def test_it_empties_what_has_changed_and_tells_the_names(
    db: DBConnect, database: Database, cleaner: TableCleaner
) -> None:
    await run_in_new_ctx(insert, db, "one")
    assert await cleaner.clean() == ["public.item" if database.is_postgresql else "item"]
    assert await database.names() == []
    assert await cleaner.clean() == []


async def test_it_sees_what_other_processes_have_changed(database: Database, cleaner: TableCleaner) -> None:
    await database.query("INSERT INTO item VALUES ('one')")
    assert len(await cleaner.clean()) == 1
    assert await database.names() == []


async def test_it_empties_tables_that_refer_to_each_other(database: Database, cleaner: TableCleaner) -> None:
    await database.query("INSERT INTO parent VALUES ('p')")
    await database.query("INSERT INTO child VALUES ('p')")
    assert len(await cleaner.clean()) == 2
    assert await database.names("parent") == []


async def test_what_was_rolled_back_is_no_change(db: DBConnect, database: Database, cleaner: TableCleaner) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(text("INSERT INTO item VALUES ('one')"))
        await session.rollback()
    assert await cleaner.clean() == []


async def test_it_empties_tables_that_are_newer_than_itself(database: Database, cleaner: TableCleaner) -> None:
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


async def test_tables_that_stay_locked_are_told(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core.testing._postgres_tables.LOCK_TIMEOUT", "50ms")
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
                pytest.fail("it was entered")
