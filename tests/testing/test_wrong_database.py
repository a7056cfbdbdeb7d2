"""`TableCleaner` and databases that it may not touch: those without a mark of tests, and those that others write to."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import PIPE
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url
from tests.support.database import Database, eventually, insert

from ctxdb_core import DBConnect, new_db_ctx, run_in_new_ctx
from ctxdb_core.testing import TableCleaner, WrongDatabaseError, create_database, drop_database
from ctxdb_core.testing._marks import names_a_test


async def refused(cleaner: TableCleaner, match: str) -> None:
    with pytest.raises(WrongDatabaseError, match=match):
        async with cleaner:
            pytest.fail("the block was entered")


@pytest.mark.parametrize(
    "name", ["test", "shop_test", "test_gw0", "Shop-Test", "ShopTests", "testdb", "shop_TEST", "tests.db", "shop test"]
)
def test_a_name_with_a_word_that_begins_with_test_marks_a_database_of_tests(name: str) -> None:
    assert names_a_test(name)


@pytest.mark.parametrize("name", ["shop", "latest", "contest_entries", "LATEST", "attestations", "shop_gw0", ""])
def test_a_name_with_test_inside_of_a_word_marks_nothing(name: str) -> None:
    assert not names_a_test(name)


@pytest.fixture
async def shop(database: Database, postgresql: None) -> AsyncIterator[Database]:
    """A database with a row and without a mark of tests."""
    # The suite's own connection to this database ends with the database.
    name = f"shop_{uuid4().hex[:8]}"
    await database.query(f"CREATE DATABASE {name}")
    assert database.server is not None
    shop = Database(database.url.replace(database.name, name), name, database.server)
    await shop.query("CREATE TABLE item (name TEXT)")
    await shop.query("INSERT INTO item VALUES ('precious')")
    yield shop
    await database.query(f"DROP DATABASE {name} WITH (FORCE)")


async def test_a_database_without_a_mark_of_tests_is_refused(shop: Database) -> None:
    async with shop.connect() as db:
        await refused(TableCleaner(db), f"nothing says that the database '{shop.name}' is for tests")
        await refused(TableCleaner(db, test_databases=["other"]), f"test_databases=\\['{shop.name}'\\]")
    assert await shop.names() == ["precious"]


async def test_the_argument_test_databases_marks_a_database_of_tests(shop: Database) -> None:
    async with shop.connect() as db:
        for word in (shop.name, ["other", shop.name]):
            async with TableCleaner(db, test_databases=word) as cleaner:
                assert await cleaner.clean() == []


async def test_a_comment_marks_a_database_of_tests(shop: Database) -> None:
    await shop.query(f"COMMENT ON DATABASE {shop.name} IS 'ctxdb: test database'")
    async with shop.connect() as db, TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []


async def test_create_database_marks_a_database_of_tests(database: Database, postgresql: None) -> None:
    url = make_url(database.url).set(database="made")
    await create_database(url)
    async with DBConnect.from_url(url) as db, TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []
    await drop_database(url)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is none for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


async def test_a_file_without_a_mark_of_tests_is_refused(elsewhere: Path) -> None:
    file = elsewhere / "shop.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE item (name TEXT)")
    async with DBConnect.from_url(f"sqlite+aiosqlite:///{file}") as db:
        await refused(TableCleaner(db), "nothing says that the database 'shop.db' is for tests")
        for word in ("shop.db", [str(file)]):
            async with TableCleaner(db, test_databases=word) as cleaner:
                assert await cleaner.clean() == []


@pytest.mark.parametrize("path", ["shop_test.db", "temporary/shop.db"])
async def test_the_name_or_the_place_of_a_file_marks_a_database_of_tests(elsewhere: Path, path: str) -> None:
    (elsewhere / "temporary").mkdir()
    async with DBConnect.from_url(f"sqlite+aiosqlite:///{elsewhere / path}") as db, TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []


async def test_create_database_marks_a_file_of_tests(elsewhere: Path) -> None:
    url = f"sqlite+aiosqlite:///{elsewhere / 'shop.db'}"
    await create_database(url)
    async with DBConnect.from_url(url) as db, TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []


# Writers of others.


class Writer:
    """Writes rows into `item` from a thread of its own, one transaction after the other."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._end = threading.Event()
        self.acknowledged = 0

    @contextmanager
    def _connection(self) -> Iterator[Callable[[str], object]]:
        if self._database.server is None:
            file = sqlite3.connect(make_url(self._database.url).database or "", timeout=30, isolation_level=None)
            with closing(file):
                yield file.execute
        else:
            dsn = self._database.server.url("psycopg", self._database.name).replace("+psycopg", "")
            with psycopg.connect(dsn, autocommit=True, application_name="the shop") as connection:
                yield lambda sql: connection.execute(sql)  # noqa: PLW0108 - psycopg's type wants literals

    def run(self) -> None:
        with self._connection() as execute:
            while not self._end.wait(0.005):
                execute(f"INSERT INTO item VALUES ('{self.acknowledged}')")
                self.acknowledged += 1

    @contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()


async def test_a_database_that_others_write_to_is_refused_and_loses_nothing(db: DBConnect, database: Database) -> None:
    writer = Writer(database)
    with writer.at_work():
        await eventually(lambda: writer.acknowledged > 3, "the writer does not write")
        who = "application 'the shop'" if database.is_postgresql else ""
        await refused(TableCleaner(db), f"(?s)Others are writing to the database.*{who}")
    assert len(await database.names()) == writer.acknowledged
    await database.query("DELETE FROM item")


async def test_a_writer_that_has_ended_prevents_no_clean_up(db: DBConnect, database: Database) -> None:
    writer = Writer(database)
    with writer.at_work():
        await eventually(lambda: writer.acknowledged > 3, "the writer does not write")
    async with TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []
    assert len(await database.names()) == writer.acknowledged
    await database.query("DELETE FROM item")


async def test_a_writer_that_comes_later_is_refused_and_loses_nothing(
    db: DBConnect, database: Database, postgresql: None
) -> None:
    writer = Writer(database)
    async with TableCleaner(db) as cleaner:
        with writer.at_work():
            await eventually(lambda: writer.acknowledged > 3, "the writer does not write")
            with pytest.raises(WrongDatabaseError, match="application 'the shop'"):
                await cleaner.clean()
    assert len(await database.names()) == writer.acknowledged
    await database.query("DELETE FROM item")


async def test_a_transaction_that_has_written_is_waited_for_before_the_first_clean_up(
    db: DBConnect, database: Database, postgresql: None
) -> None:
    async def enter() -> list[str]:
        async with TableCleaner(db) as cleaner:
            await run_in_new_ctx(insert, db, "of a test")
            return await cleaner.clean()

    async with new_db_ctx():
        await insert(db, "kept")
        entering = asyncio.create_task(enter())
        await eventually(lambda: bool(database.backends("query ~ 'pg_stat_activity'")), "the cleaner does not wait")
    assert await entering == ["public.item"]
    assert await database.names() == ["kept"]


async def test_a_transaction_that_has_written_and_stays_open_is_refused(
    db: DBConnect, postgresql: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core.testing._postgres_tables.WRITER_SECONDS", 0.05)
    async with new_db_ctx():
        await insert(db, "open")
        await refused(TableCleaner(db), "Others are writing")


async def test_a_role_that_may_not_see_what_others_do_is_careful(database: Database, postgresql: None) -> None:
    await database.query("CREATE ROLE careful LOGIN")
    await database.query("GRANT ALL ON ALL TABLES IN SCHEMA public TO careful")
    await database.query("GRANT CREATE ON SCHEMA public TO careful")
    try:
        url = make_url(database.url).set(username="careful")
        writer = Writer(database)
        async with DBConnect.from_url(url) as db:
            with writer.at_work():
                await eventually(lambda: writer.acknowledged > 3, "the writer does not write")
                await refused(TableCleaner(db), "Others are writing")
            before = await database.names()
            assert len(before) == writer.acknowledged
            async with TableCleaner(db) as cleaner:
                await run_in_new_ctx(insert, db, "of a test")
                assert await cleaner.clean() == ["public.item"]
                assert await database.names() == before
    finally:
        await database.query("DELETE FROM item")
        await database.query("DROP OWNED BY careful")
        await database.query("DROP ROLE careful")


async def test_two_runs_of_tests_do_not_clean_one_database(db: DBConnect, database: Database, postgresql: None) -> None:
    script = """if True:
        import asyncio, sys
        from ctxdb_core import DBConnect
        from ctxdb_core.testing import TableCleaner

        async def main():
            async with DBConnect.from_url(sys.argv[1]) as db, TableCleaner(db):
                print("entered", flush=True)
                sys.stdin.read()

        asyncio.run(main())
    """
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", script, database.url, stdin=PIPE, stdout=PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    assert await other.stdout.readline() == b"entered\n"
    await refused(TableCleaner(db), "Another run of tests")
    other.stdin.close()
    assert await other.wait() == 0
    async with TableCleaner(db) as cleaner:
        assert await cleaner.clean() == []


async def test_two_cleaners_of_one_process_clean_one_database(db: DBConnect, database: Database) -> None:
    async with TableCleaner(db), TableCleaner(db) as cleaner:
        await run_in_new_ctx(insert, db, "of a test")
        assert len(await cleaner.clean()) == 1
