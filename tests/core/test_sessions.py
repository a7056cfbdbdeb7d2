"""Sessions of the current unit of work, early ends of its transactions, and sessions outside of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import pytest
from sqlalchemy import JSON, ForeignKey, event, inspect, select, text, update
from sqlalchemy import insert as insert_into
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.ext.orderinglist import ordering_list
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    WriteOnlyMapped,
    attribute_keyed_dict,
    composite,
    mapped_column,
    object_session,
    relationship,
    selectinload,
)
from sqlalchemy.util import await_only
from tests.support.database import Database, Item, eventually, insert, insert_row_that_fails_at_commit

from ctxdb_core import (
    ContextClosedError,
    ContextNotInitiatedError,
    CtxDBError,
    DBConnect,
    SessionAlreadyActiveError,
    SessionClosedError,
    SessionOwnedError,
    StatementInterruptedError,
    TransactionAbortedError,
    TransactionAlreadyActiveError,
    TransactionContext,
    UnexpectedRollbackError,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    gather_in_new_ctx,
    joining_session,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_begin,
    on_commit,
    on_rollback,
    retry_on_conflict,
    rollback_db_session,
    run_in_new_ctx,
    set_rollback_only,
    transactional,
)
from ctxdb_core.adapters import CurrentTransaction, begin, finalize

KINDS = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


# --- db_session -------------------------------------------------------------------------------------------------------


async def test_outside_of_a_unit_of_work_there_is_no_session(db: DBConnect) -> None:
    for ask in (db_session, commit_db_session, rollback_db_session, close_db_session):
        with pytest.raises(ContextNotInitiatedError, match="new_db_ctx"):
            await ask(db)
    with pytest.raises(ContextNotInitiatedError):
        on_commit(db, lambda: None)


async def test_a_unit_of_work_has_one_session_for_each_database(db: DBConnect, second_db: DBConnect) -> None:
    async with new_db_ctx():
        assert await db_session(db) is await db_session(db)
        assert await db_session(second_db) is not await db_session(db)


async def test_tasks_of_a_unit_of_work_that_ask_at_once_get_one_session(database: Database) -> None:
    async def slow_start(db: DBConnect) -> None:
        await asyncio.sleep(0)

    db = DBConnect(lambda host: database.watch_new(), host="a", before_create_session_handler=slow_start)
    async with db, new_db_ctx():
        sessions = await asyncio.gather(*(db_session(db) for _ in range(5)))
    assert len(set(map(id, sessions))) == 1


async def test_a_session_takes_no_connection_before_its_first_statement(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await db_session(db)
    assert database.checkouts == 0


@KINDS
async def test_a_unit_of_work_is_committed_at_its_end(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        assert await database.names() == []
    assert await database.names() == ["one"]


@KINDS
async def test_an_exception_rolls_the_unit_of_work_back(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await insert(db, "one")
            raise LookupError
    assert await database.names() == []


@KINDS
async def test_objects_that_were_only_added_are_committed(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        (await db_session(db)).add(Item(name="one"))
    assert await database.names() == ["one"]


async def test_a_unit_of_work_inside_another_is_independent(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            outer = await insert(db, "outer")
            async with new_db_ctx():
                assert await insert(db, "inner") is not outer
            assert await db_session(db) is outer
            raise LookupError
    assert await database.names() == ["inner"]


# --- after the end ----------------------------------------------------------------------------------------------------


async def test_a_task_that_outlives_its_unit_of_work_gets_an_error_that_says_so(db: DBConnect) -> None:
    release = asyncio.Event()

    async def late() -> None:
        await release.wait()
        await db_session(db)

    async with new_db_ctx():
        await db_session(db)
        task = asyncio.create_task(late())
    release.set()
    with pytest.raises(ContextClosedError, match="run_in_new_ctx"):
        await task


async def test_ended_unit_refuses_commits_and_callbacks(db: DBConnect) -> None:
    release = asyncio.Event()

    async def late() -> None:
        await release.wait()
        for ask in (commit_db_session, rollback_db_session, close_db_session):
            with pytest.raises(ContextClosedError):
                await ask(db)
        with pytest.raises(ContextClosedError):
            on_commit(db, lambda: None)
        with pytest.raises(ContextClosedError):
            async with atomic_db_session(db):
                pytest.fail("the block was entered")

    async with new_db_ctx():
        await db_session(db)
        task = asyncio.create_task(late())
    release.set()
    await task


async def test_a_session_that_was_kept_refuses_to_begin_anew(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await insert(db, "one")
    for statement in ("INSERT INTO item VALUES ('late')", "SELECT 1"):
        with pytest.raises(ContextClosedError):
            await session.execute(text(statement))
    assert await database.names() == ["one"]


@KINDS
async def test_a_commit_waits_for_the_statement_of_another_task(db: DBConnect, database: Database) -> None:
    begun = asyncio.Event()

    async def write_on() -> None:
        session = await db_session(db)
        begun.set()
        for name in ("two", "three", "four"):
            await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})

    async with new_db_ctx():
        await insert(db, "one")
        task = asyncio.create_task(write_on())
        await begun.wait()
        await commit_db_session(db)
        await task
        await rollback_db_session(db)
    # What was under way belongs to the commit, what came later to the transaction after it.
    assert "one" in await database.names()


async def test_an_error_does_not_wait_for_the_statement_of_another_task(db: DBConnect, database: Database) -> None:
    async def long_query() -> None:
        await (await db_session(db)).execute(text("SELECT pg_sleep(300)"))

    with pytest.raises(LookupError):
        async with new_db_ctx():
            await insert(db, "one")
            task = asyncio.create_task(long_query())
            await eventually(lambda: bool(database.backends("query ~ 'pg_sleep'")), "the query does not run")
            raise LookupError
    with pytest.raises(ContextClosedError) as stopped:
        await task
    assert isinstance(stopped.value.__cause__, LookupError)
    assert await database.names() == []


async def test_a_task_left_in_the_middle_of_connecting_gives_its_connection_back(
    db: DBConnect, database: Database
) -> None:
    async def use() -> None:
        await (await db_session(db)).execute(text("SELECT 1"))

    with pytest.raises(LookupError):
        async with new_db_ctx():
            task = asyncio.create_task(use())
            while not (await db_session(db)).in_transaction():
                await asyncio.sleep(0)
            raise LookupError
    await asyncio.gather(task, return_exceptions=True)
    await database.assert_quiet()


async def test_a_unit_of_work_is_not_used_from_another_threads_loop(db: DBConnect) -> None:
    async def use() -> None:
        await db_session(db)

    async with new_db_ctx():
        with pytest.raises(ContextNotInitiatedError, match="thread"):
            await asyncio.to_thread(asyncio.run, use())


# --- commit, roll back and close early --------------------------------------------------------------------------------


@KINDS
async def test_an_early_commit_stands_whatever_follows(db: DBConnect, database: Database) -> None:
    with pytest.raises(LookupError):
        async with new_db_ctx():
            session = await insert(db, "early")
            await commit_db_session(db)
            assert await database.names() == ["early"]
            assert database.checked_out == 0
            assert await insert(db, "late") is session
            raise LookupError
    assert await database.names() == ["early"]


@KINDS
async def test_an_early_roll_back_leaves_what_follows(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "early")
        await rollback_db_session(db)
        assert database.checked_out == 0
        await insert(db, "late")
    assert await database.names() == ["late"]


@KINDS
async def test_an_early_close_gives_the_connection_back_and_rolls_back(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        closed = await insert(db, "early")
        await close_db_session(db)
        assert database.checked_out == 0
        assert await insert(db, "late") is not closed
        with pytest.raises(SessionClosedError, match="db_session"):
            await closed.execute(text("SELECT 1"))
    assert await database.names() == ["late"]


async def test_ending_early_without_a_session_does_nothing(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await commit_db_session(db)
        await rollback_db_session(db)
        await close_db_session(db)
    assert database.engines == []


@KINDS
async def test_an_early_commit_that_fails_raises_and_leaves_a_usable_session(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert_row_that_fails_at_commit(db)
        with pytest.raises(IntegrityError):
            await commit_db_session(db)
        assert database.checked_out == 0
        await insert(db, "after")
    assert await database.names() == ["after"]


async def test_an_early_commit_that_fails_leaves_other_databases_alone(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert(second_db, "elsewhere")
        await insert_row_that_fails_at_commit(db)
        with pytest.raises(IntegrityError):
            await commit_db_session(db)
    assert await database.names() == ["elsewhere"]


async def test_a_swallowed_error_cannot_turn_the_commit_into_a_roll_back(db: DBConnect, database: Database) -> None:
    with pytest.raises(TransactionAbortedError, match="begin_nested"):
        async with new_db_ctx():
            await insert(db, "one")
            with pytest.raises(IntegrityError):
                await insert(db, "one")
    assert await database.names() == []


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_session_whose_commit_was_refused_gives_its_connection_back_clean(db: DBConnect) -> None:
    async with new_non_ctx_session(db) as session:
        with pytest.raises(ProgrammingError):
            await session.execute(text("SELECT nothing"))
        with pytest.raises(TransactionAbortedError):
            await session.commit()
    async with new_non_ctx_session(db) as session:
        assert await session.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)
async def test_a_session_whose_savepoint_could_not_be_released_gives_its_connection_back_clean(
    database: Database,
) -> None:
    async with database.connect(pool_size=1) as db:
        with pytest.raises(TransactionAbortedError):
            async with new_non_ctx_atomic_session(db) as session:
                await session.execute(text("INSERT INTO item VALUES ('lost')"))
                with pytest.raises(DBAPIError):
                    async with session.begin_nested():
                        with suppress(ProgrammingError):
                            await session.execute(text("SELECT nothing"))
                        await session.commit()
        async with new_non_ctx_session(db) as session:
            assert await session.scalar(text("SELECT 1")) == 1
    assert await database.names() == []


@KINDS
async def test_an_error_inside_a_savepoint_does_not_hinder_the_commit(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await insert(db, "one")
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await insert(db, "one")
        await insert(db, "two")
    assert await database.names() == ["one", "two"]


async def try_to_add(session: AsyncSession, name: str) -> None:
    session.add(Item(name=name))
    with pytest.raises(IntegrityError):
        await session.flush()


BLOCKS: dict[str, Callable[[DBConnect, AsyncSession], AbstractAsyncContextManager[object]]] = {
    "begin": lambda db, session: session.begin(),
    "begin_nested": lambda db, session: session.begin_nested(),
    "nested": lambda db, session: transactional(db, "nested"),
    "savepoint": lambda db, session: atomic_db_session(db, "savepoint"),
    "commit": lambda db, session: atomic_db_session(db, "commit"),
    "context": lambda db, session: TransactionContext(db).transaction(),
}


@KINDS
@pytest.mark.parametrize("block", BLOCKS)
async def test_a_block_whose_work_a_caught_error_of_a_flush_has_undone_ends_by_an_error(
    db: DBConnect, database: Database, block: str
) -> None:
    await database.query("INSERT INTO item VALUES ('there') RETURNING 1")
    with pytest.raises((TransactionAbortedError, PendingRollbackError)):
        async with new_db_ctx():
            session = await db_session(db)
            if block == "savepoint":
                await session.execute(text("SELECT 1"))
            async with BLOCKS[block](db, session):
                session.add(Item(name="lost"))
                await session.flush()
                await try_to_add(session, "there")
    assert await database.names() == ["there"]


@KINDS
async def test_a_block_whose_other_changes_a_caught_error_of_their_flush_has_undone_ends_by_an_error(
    db: DBConnect, database: Database
) -> None:
    await database.query("INSERT INTO item VALUES ('there') RETURNING 1")
    with pytest.raises(TransactionAbortedError):
        async with new_db_ctx(), (await db_session(db)).begin_nested():
            session = await db_session(db)
            session.add(Item(name="lost"))
            await try_to_add(session, "there")
    assert await database.names() == ["there"]


@KINDS
@pytest.mark.parametrize("by_statement", [False, True])
async def test_a_block_outside_of_units_whose_work_a_caught_error_of_a_flush_has_undone_ends_by_an_error(
    db: DBConnect, database: Database, by_statement: bool
) -> None:
    await database.query("INSERT INTO item VALUES ('there') RETURNING 1")
    with pytest.raises(TransactionAbortedError):
        async with new_non_ctx_atomic_session(db) as session, session.begin_nested():
            if by_statement:
                await session.execute(text("INSERT INTO item VALUES ('lost')"))
            else:
                session.add(Item(name="lost"))
                await session.flush()
            await try_to_add(session, "there")
    assert await database.names() == ["there"]


@pytest.mark.parametrize("block", ["begin_nested", "nested"])
async def test_a_block_that_has_only_tried_to_write_does_not_hinder_the_commit(
    db: DBConnect, database: Database, block: str
) -> None:
    await database.query("INSERT INTO item VALUES ('there') RETURNING 1")
    async with new_db_ctx():
        session = await insert(db, "before")
        async with BLOCKS[block](db, session):
            await try_to_add(session, "there")
        await insert(db, "after")
    assert await database.names() == ["after", "before", "there"]


async def test_a_joining_session_whose_work_a_caught_error_of_a_flush_has_undone_ends_by_an_error(
    db: DBConnect, database: Database
) -> None:
    await database.query("INSERT INTO item VALUES ('there') RETURNING 1")
    with pytest.raises(PendingRollbackError):
        async with new_db_ctx(), joining_session(db) as session:
            session.add(Item(name="lost"))
            await session.flush()
            await try_to_add(session, "there")
    assert await database.names() == ["there"]


async def test_an_error_before_the_server_does_not_hinder_the_commit(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await insert(db, "one")
        with pytest.raises(Exception, match=r"invalid input|expected str"):
            await session.execute(text("SELECT :number + 1"), {"number": "not a number"})
    assert await database.names() == ["one"]


CLOSES = pytest.mark.parametrize("close", ["close", "reset", "async with"])


async def close_by(session: AsyncSession, close: str) -> None:
    if close == "async with":
        async with session:
            pass
    else:
        await getattr(session, close)()


@KINDS
@CLOSES
async def test_closing_the_units_session_is_refused_while_it_holds_work(
    db: DBConnect, database: Database, close: str
) -> None:
    async with new_db_ctx():
        session = await insert(db, "one")
        with pytest.raises(SessionOwnedError, match=r"flush\(\).*close_db_session"):
            await close_by(session, close)
        session.add(Item(name="two"))
        with pytest.raises(SessionOwnedError):
            await close_by(session, close)
    assert await database.names() == ["one", "two"]


@KINDS
@CLOSES
async def test_a_session_that_has_only_read_may_be_closed_and_used_again(
    db: DBConnect, database: Database, close: str
) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        await close_by(session, close)
        assert database.checked_out == 0
        await insert(db, "one")
    assert await database.names() == ["one"]


async def test_a_session_may_be_closed_after_a_commit_of_the_users(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await insert(db, "one")
        await session.commit()
        await session.close()
    assert await database.names() == ["one"]


async def test_closing_the_units_session_is_refused_where_a_select_has_written(
    db: DBConnect, database: Database
) -> None:
    added = insert_into(Item).values(name="one").returning(Item.name).cte()
    with suppress(SessionOwnedError):
        async with new_db_ctx(), await db_session(db) as session:
            await session.execute(select(added))
        assert await database.names() == ["one"]


async def test_closing_the_units_session_in_run_sync_is_refused_while_it_holds_work(
    db: DBConnect, database: Database
) -> None:
    def fill(session: Session) -> None:
        with session:
            session.add(Item(name="one"))
            session.flush()

    with pytest.raises(SessionOwnedError):
        async with new_db_ctx():
            await (await db_session(db)).run_sync(fill)
    assert await database.names() == []


async def test_an_exception_that_leaves_a_block_of_the_session_dooms_its_work(
    db: DBConnect, database: Database
) -> None:
    async def unit() -> None:
        async with new_db_ctx():
            with pytest.raises(LookupError):
                async with await db_session(db):
                    await insert(db, "half")
                    raise LookupError

    with pytest.raises(UnexpectedRollbackError) as refused:
        await unit()
    assert isinstance(refused.value.__cause__, LookupError)
    assert await database.names() == []


async def test_a_session_may_be_closed_again_after_its_unit_has_ended(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(db)
    await session.close()
    async with session:
        pass


# --- what was read stays readable -------------------------------------------------------------------------------------


class Shelf(DeclarativeBase):
    pass


class Author(Shelf):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list[Book]] = relationship(back_populates="author", lazy="selectin")


class Book(Shelf):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


@pytest.fixture
async def shelf(db: DBConnect) -> AsyncIterator[DBConnect]:
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Shelf.metadata.create_all)
    async with new_db_ctx():
        (await db_session(db)).add(Author(id=1, name="Ada", books=[Book(title="Notes"), Book(title="Letters")]))
    yield db
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Shelf.metadata.drop_all)


@KINDS
@pytest.mark.parametrize("ends", ["unit", "response"])
async def test_loaded_objects_are_readable_after_a_roll_back(shelf: DBConnect, ends: str) -> None:
    unit = begin()
    assert unit is not None
    author = await (await db_session(shelf)).get_one(Author, 1)
    await finalize(unit, commit=False, last=ends == "unit")
    assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])
    await finalize(unit, commit=False)
    assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])


@KINDS
async def test_changed_objects_show_what_was_loaded_after_a_roll_back(shelf: DBConnect) -> None:
    unit = begin()
    assert unit is not None
    session = await db_session(shelf)
    author = await session.get_one(Author, 1)
    author.name = "Grace"
    await session.flush()
    author.name = "Mary"
    author.books.append(Book(title="Undone"))
    removed = author.books[0]
    await session.delete(removed)
    await session.flush()
    await finalize(unit, commit=False)
    assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])
    assert removed.title == "Notes"


class Document(Shelf):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(lazy="selectin")
    edits: Mapped[int] = mapped_column(default=0, onupdate=1)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - as SQLAlchemy's documentation has it


@KINDS
async def test_what_a_flush_has_changed_is_taken_back_by_a_roll_back(shelf: DBConnect) -> None:
    async with new_db_ctx():
        author = Author(id=2, name="Grace", books=[])
        (await db_session(shelf)).add_all([Document(id=1, title="Draft", author_id=1), author])
    async with new_db_ctx():
        session = await db_session(shelf)
        document = await session.get_one(Document, 1)
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf):
                document.title, document.author = "Lost", await session.get_one(Author, 2)
                await session.flush()
                raise LookupError
        assert (document.title, document.author_id, document.author.name) == ("Draft", 1, "Ada")
        assert (document.edits, document.version) == (0, 1)
        # SQLAlchemy compares the version with that in the database.
        document.title = "Final"
        await session.flush()
        assert (document.edits, document.version) == (1, 2)


@KINDS
@pytest.mark.parametrize("fails", ["code", "flush"])
async def test_the_transaction_goes_on_with_what_was_loaded_before_a_savepoint_that_is_rolled_back(
    shelf: DBConnect, fails: str
) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Document(id=1, title="Draft", author_id=1))
    async with new_db_ctx():
        session = await db_session(shelf)
        document = await session.get_one(Document, 1)
        document.title = "Second draft"
        for _ in range(2):
            with pytest.raises((LookupError, IntegrityError)):
                async with session.begin_nested():
                    async with session.begin_nested():
                        document.title = "Lost"
                    document.author.name = "Lost"
                    document.author.books.append(Book(title=None if fails == "flush" else "Lost"))
                    await session.flush()
                    raise LookupError
            author = document.author
            assert (document.title, document.version) == ("Second draft", 2)
            assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])
        document.title, document.author.name = "Final", "Ada L."
        document.author.books.append(Book(title="Letters to Babbage"))
        await session.flush()
        assert document.version == 3
    assert (document.title, document.author.name, len(document.author.books)) == ("Final", "Ada L.", 3)


class Library(Shelf):
    __tablename__ = "library"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    visits: WriteOnlyMapped[Visit] = relationship(passive_deletes=True)


class Visit(Shelf):
    __tablename__ = "visit"
    id: Mapped[int] = mapped_column(primary_key=True)
    library_id: Mapped[int] = mapped_column(ForeignKey("library.id"))


@pytest.mark.parametrize("block", ["commit", "savepoint"])
@pytest.mark.parametrize("flushes", [False, True])
async def test_a_write_only_relationship_goes_on_after_a_roll_back(
    shelf: DBConnect, database: Database, block: CurrentTransaction, flushes: bool
) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Library(id=1, name="Bodleian"))
    async with new_db_ctx():
        session = await db_session(shelf)
        library = await session.get_one(Library, 1)
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf, block):
                library.name = "Lost"
                library.visits.add(Visit(id=1))
                if flushes:
                    await session.flush()
                raise LookupError
        assert library.name == "Bodleian"
        library.visits.add(Visit(id=2))
    assert await database.query("SELECT id FROM visit WHERE library_id = 1") == [(2,)]


async def test_an_object_that_was_changed_and_deleted_behind_a_savepoint_is_readable_when_that_is_rolled_back(
    shelf: DBConnect,
) -> None:
    async with new_db_ctx():
        session = await db_session(shelf)
        author = await session.get_one(Author, 1)
        book = author.books[0]
        with pytest.raises(LookupError):
            async with session.begin_nested():
                book.title = "Lost"
                await session.flush()
                await session.delete(book)
                await session.flush()
                raise LookupError
        assert (book.title, book.author.name) == ("Notes", "Ada")


async def test_an_object_is_readable_when_its_session_rolls_back_the_transaction_around_its_savepoint(
    shelf: DBConnect,
) -> None:
    async with new_db_ctx():
        session = await db_session(shelf)
        author = await session.get_one(Author, 1)
        await session.begin_nested()
        author.name = "Lost"
        await session.flush()
        await session.rollback()
        assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])


class Binder(Shelf):
    __tablename__ = "binder"
    id: Mapped[int] = mapped_column(primary_key=True)
    sheets: Mapped[list[Sheet]] = relationship(lazy="selectin")


class Sheet(Shelf):
    __tablename__ = "sheet"
    id: Mapped[int] = mapped_column(primary_key=True)
    binder_id: Mapped[int | None] = mapped_column(ForeignKey("binder.id"))


async def test_a_key_that_follows_a_collection_is_taken_back_by_a_roll_back(shelf: DBConnect) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add_all([Binder(id=1, sheets=[Sheet(id=1)]), Binder(id=2, sheets=[])])
    async with new_db_ctx():
        one, two = (await (await db_session(shelf)).scalars(select(Binder).order_by(Binder.id))).all()
        (sheet,) = one.sheets
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf) as session:
                one.sheets.remove(sheet)
                two.sheets.append(sheet)
                await session.flush()
                raise LookupError
        assert (sheet.binder_id, one.sheets, two.sheets) == (1, [sheet], [])


class Cover(Shelf):
    __tablename__ = "cover"
    id: Mapped[int] = mapped_column(primary_key=True)
    colour: Mapped[str] = mapped_column(default="red")
    jacket_id: Mapped[int | None] = mapped_column(ForeignKey("jacket.id"))
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - as SQLAlchemy's documentation has it


class Jacket(Shelf):
    __tablename__ = "jacket"
    id: Mapped[int] = mapped_column(primary_key=True)
    cover: Mapped[Cover | None] = relationship(lazy="selectin")


@pytest.mark.parametrize("block", ["commit", "savepoint"])
@pytest.mark.parametrize("change", ["give away", "delete the parent"])
async def test_a_key_that_follows_a_single_object_or_a_deletion_is_taken_back_by_a_roll_back(
    shelf: DBConnect, block: CurrentTransaction, change: str
) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add_all([Jacket(id=1, cover=Cover(id=1)), Jacket(id=2, cover=None)])
    async with new_db_ctx():
        one, two = (await (await db_session(shelf)).scalars(select(Jacket).order_by(Jacket.id))).all()
        cover = one.cover
        assert cover is not None
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf, block) as session:
                if change == "give away":
                    one.cover, two.cover = None, cover
                else:
                    await session.delete(one)
                await session.flush()
                assert cover.jacket_id != 1
                raise LookupError
        assert (cover.jacket_id, cover.version, one.cover, two.cover) == (1, 1, cover, None)


async def test_a_key_that_a_deletion_has_changed_unseen_is_not_shown_after_a_roll_back(shelf: DBConnect) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Jacket(id=1, cover=Cover(id=1)))
    async with new_db_ctx():
        session = await db_session(shelf)
        cover, jacket = await session.get_one(Cover, 1), await session.get_one(Jacket, 1)
        session.expire(jacket, ["cover"])
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf):
                await session.delete(jacket)
                await session.flush()
                assert cover.jacket_id is None
                raise LookupError
        assert (cover.id, cover.colour) == (1, "red")
        assert inspect(cover).unloaded == {"jacket_id", "version"}


@dataclass
class Size:
    width: int
    depth: int


class Cabinet(Shelf):
    __tablename__ = "cabinet"
    id: Mapped[int] = mapped_column(primary_key=True)
    drawers: Mapped[dict[str, Drawer]] = relationship(
        lazy="selectin", collection_class=attribute_keyed_dict("label"), cascade="all, delete-orphan"
    )


class Drawer(Shelf):
    __tablename__ = "drawer"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str]
    width: Mapped[int] = mapped_column(default=1)
    depth: Mapped[int] = mapped_column(default=2)
    cabinet_id: Mapped[int] = mapped_column(ForeignKey("cabinet.id"))
    size: Mapped[Size] = composite("width", "depth")


@pytest.mark.parametrize("block", ["commit", "savepoint"])
async def test_a_dictionary_of_objects_is_given_back_by_a_roll_back(
    shelf: DBConnect, block: CurrentTransaction
) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Cabinet(id=1, drawers={"a": Drawer(label="a"), "b": Drawer(label="b")}))
    async with new_db_ctx():
        cabinet = await (await db_session(shelf)).get_one(Cabinet, 1)
        drawers = dict(cabinet.drawers)
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf, block) as session:
                drawers["a"].label = "z"
                del cabinet.drawers["b"]
                cabinet.drawers["c"] = Drawer(label="c")
                await session.flush()
                raise LookupError
        assert cabinet.drawers == drawers


class Board(Shelf):
    __tablename__ = "board"
    id: Mapped[int] = mapped_column(primary_key=True)
    pins: Mapped[list[Pin]] = relationship(collection_class=ordering_list("position"), order_by="Pin.position")


class Pin(Shelf):
    __tablename__ = "pin"
    id: Mapped[int] = mapped_column(primary_key=True)
    board_id: Mapped[int] = mapped_column(ForeignKey("board.id"))
    position: Mapped[int]
    label: Mapped[str]


async def test_a_collection_whose_members_are_to_be_read_anew_is_so_itself_after_a_failed_flush(
    shelf: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Board(id=1, pins=[Pin(label="a")]))
    async with new_db_ctx():
        session = await db_session(shelf)
        board = await session.get_one(Board, 1, options=[selectinload(Board.pins)])
        session.expire(board.pins[0], ["position"])
        board.pins.append(Pin(label=None))
        with pytest.raises(IntegrityError):
            await session.flush()
        assert "pins" in inspect(board).unloaded
        await session.rollback()
    assert not caplog.records


@pytest.mark.parametrize("block", ["commit", "savepoint"])
async def test_a_composite_shows_what_was_loaded_after_a_roll_back(shelf: DBConnect, block: CurrentTransaction) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Cabinet(id=1, drawers={"a": Drawer(label="a")}))
    async with new_db_ctx():
        drawer = (await (await db_session(shelf)).get_one(Cabinet, 1)).drawers["a"]
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf, block) as session:
                drawer.width = 7
                await session.flush()
                assert drawer.size == Size(7, 2)
                raise LookupError
        assert drawer.size == Size(1, 2)


@KINDS
@pytest.mark.parametrize("block", ["commit", "savepoint"])
@pytest.mark.parametrize("by", ["criteria", "keys"])
async def test_what_an_update_by_the_orm_has_changed_is_taken_back_by_a_roll_back(
    shelf: DBConnect, block: CurrentTransaction, by: str
) -> None:
    async with new_db_ctx():
        session = await db_session(shelf)
        author = await session.get_one(Author, 1)
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf, block):
                if by == "criteria":
                    await session.execute(update(Author).where(Author.id == 1).values(name="Grace"))
                else:
                    await session.execute(update(Author), [{"id": 1, "name": "Grace"}])
                assert author.name == "Grace"
                raise LookupError
        assert author.name == "Ada"
        # A change to the value that the object has is none.
        author.name = "Grace"
    async with new_db_ctx():
        assert (await (await db_session(shelf)).get_one(Author, 1)).name == "Grace"


async def test_a_collection_can_be_changed_after_a_roll_back(shelf: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        author = await (await db_session(shelf)).get_one(Author, 1)
        with pytest.raises(LookupError):
            async with atomic_db_session(shelf):
                author.name = "Lost"
                raise LookupError
        author.books.append(Book(title="Letters to Babbage"))
    assert await database.query("SELECT count(*) FROM book WHERE author_id = 1") == [(3,)]


async def test_committed_changes_are_not_taken_back_by_a_later_roll_back(shelf: DBConnect) -> None:
    unit = begin()
    assert unit is not None
    author = await (await db_session(shelf)).get_one(Author, 1)
    author.name = "Grace"
    await commit_db_session(shelf)
    await (await db_session(shelf)).execute(text("SELECT 1"))
    await finalize(unit, commit=False)
    assert author.name == "Grace"


class Note(Shelf):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    tags: Mapped[dict[str, str]] = mapped_column(MutableDict.as_mutable(JSON))


async def test_a_value_that_was_changed_in_place_is_readable_after_a_roll_back(shelf: DBConnect) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Note(id=1, tags={"colour": "red"}))
    unit = begin()
    assert unit is not None
    note = await (await db_session(shelf)).get_one(Note, 1)
    note.tags["colour"] = "blue"
    await finalize(unit, commit=False)
    assert note.tags["colour"] in ("red", "blue")


async def test_a_change_in_place_behind_a_savepoint_that_is_rolled_back_is_not_stored_with_a_later_one(
    shelf: DBConnect,
) -> None:
    async with new_db_ctx():
        (await db_session(shelf)).add(Note(id=1, tags={"colour": "red"}))
    async with new_db_ctx():
        session = await db_session(shelf)
        note = await session.get_one(Note, 1)
        with pytest.raises(LookupError):
            async with session.begin_nested():
                note.tags["colour"] = "blue"
                raise LookupError
        assert "tags" in inspect(note).unloaded
        await session.refresh(note)
        note.tags["size"] = "small"
    async with new_db_ctx():
        note = await (await db_session(shelf)).get_one(Note, 1)
        assert note.tags == {"colour": "red", "size": "small"}


async def _roll_back_session(session: AsyncSession, db: DBConnect) -> None:
    await session.rollback()


async def _roll_back_in_run_sync(session: AsyncSession, db: DBConnect) -> None:
    await session.run_sync(lambda sync_session: sync_session.rollback())


async def _roll_back_transaction(session: AsyncSession, db: DBConnect) -> None:
    transaction = session.get_transaction()
    assert transaction is not None
    await transaction.rollback()


async def _roll_back_by_ctxdb(session: AsyncSession, db: DBConnect) -> None:
    await rollback_db_session(db)


@pytest.mark.parametrize("has_changed", [False, True])
@pytest.mark.parametrize(
    "roll_back", [_roll_back_session, _roll_back_in_run_sync, _roll_back_transaction, _roll_back_by_ctxdb]
)
async def test_objects_are_readable_after_a_roll_back_that_was_asked_for_and_fresh_when_they_are_read_again(
    shelf: DBConnect,
    database: Database,
    roll_back: Callable[[AsyncSession, DBConnect], Awaitable[None]],
    has_changed: bool,
) -> None:
    async with new_db_ctx():
        session = await db_session(shelf)
        author = await session.get_one(Author, 1)
        if has_changed:
            author.name = "Lost"
            await session.flush()
            author.name = "Lost again"
        await roll_back(session, shelf)
        assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])
        await database.query("UPDATE author SET name = 'Grace' WHERE id = 1")
        assert (await session.get_one(Author, 1)).name == "Grace"


async def test_objects_are_readable_behind_a_block_of_their_session_that_an_error_has_left(shelf: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(shelf)
        with pytest.raises(LookupError):
            async with session.begin():
                author = await session.get_one(Author, 1)
                author.name = "Lost"
                await session.flush()
                raise LookupError
        assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])


async def test_objects_are_readable_when_their_roll_back_has_failed(
    shelf: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with new_db_ctx():
        session = await db_session(shelf)
        author = await session.get_one(Author, 1)
        connection = await session.connection()

        def fail(connection: object) -> NoReturn:
            raise ConnectionResetError

        monkeypatch.setattr(connection.sync_connection.dialect, "do_rollback", fail)  # type: ignore[union-attr]
        with pytest.raises(ConnectionResetError):
            await session.rollback()
        monkeypatch.undo()
        assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])


@KINDS
async def test_changed_objects_show_what_was_loaded_when_a_flush_has_failed(shelf: DBConnect) -> None:
    with pytest.raises(IntegrityError):
        async with new_db_ctx():
            session = await db_session(shelf)
            author = await session.get_one(Author, 1)
            author.name = "Grace"
            await session.flush()
            author.name = "Mary"
            author.books.append(Book(title=None))
            removed = author.books[0]
            await session.delete(removed)
            try:
                await session.flush()
            finally:
                assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])
    assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])
    assert removed.title == "Notes"


async def test_objects_are_readable_after_a_roll_back_behind_a_failed_flush_and_fresh_when_they_are_read_again(
    shelf: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(shelf)
        author = await session.get_one(Author, 1)
        author.books.append(Book(title=None))
        with pytest.raises(IntegrityError):
            await session.flush()
        await session.rollback()
        assert (author.name, [book.title for book in author.books]) == ("Ada", ["Notes", "Letters"])
        await database.query("UPDATE author SET name = 'Grace' WHERE id = 1")
        assert (await session.get_one(Author, 1)).name == "Grace"


async def test_objects_of_a_session_that_expires_are_readable_after_the_units_commit(database: Database) -> None:
    db = DBConnect(lambda host: database.watch_new(), async_sessionmaker, host="a")
    async with db:
        async with new_db_ctx():
            session = await db_session(db)
            item = Item(name="one")
            session.add(item)
        assert item.name == "one"


# --- several databases ------------------------------------------------------------------------------------------------


async def test_sessions_on_several_databases_end_together(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert(db, "first")
        await insert(second_db, "second")
        assert await database.names() == []
    assert await database.names() == ["first", "second"]


async def test_a_failing_commit_rolls_the_later_databases_back_and_names_the_earlier_databases(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async with database.connect() as third_db:
        with pytest.raises(IntegrityError) as caught:
            async with new_db_ctx():
                await insert(db, "first")
                await insert_row_that_fails_at_commit(second_db)
                await insert(third_db, "third")
    assert await database.names() == ["first"]
    assert repr(db) in str(caught.value)
    assert any(repr(db) in note for note in caught.value.__notes__)


async def test_a_failing_flush_of_one_session_keeps_all_sessions_from_being_committed(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert(db, "there")
    with pytest.raises(IntegrityError):
        async with new_db_ctx():
            await insert(db, "first")
            (await db_session(second_db)).add(Item(name="there"))
    assert await database.names() == ["there"]


@pytest.mark.parametrize("failure", ["flush", "statement", "interruption"])
async def test_a_swallowed_failure_of_one_session_keeps_all_sessions_from_being_committed(
    db: DBConnect, second_db: DBConnect, database: Database, failure: str
) -> None:
    async def fail() -> None:
        session = await insert(second_db, "second")
        with suppress(IntegrityError, TimeoutError):
            if failure == "flush":
                session.add(Item(name="second"))
                await session.flush()
            elif failure == "statement":
                await insert(second_db, "second")
            else:
                async with asyncio.timeout(0):
                    await session.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises((PendingRollbackError, TransactionAbortedError, StatementInterruptedError)) as caught:
        async with new_db_ctx():
            await insert(db, "first")
            await fail()
    assert not hasattr(caught.value, "__notes__")
    assert await database.names() == []


async def test_a_failure_that_a_savepoint_has_contained_keeps_no_session_from_being_committed(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        await insert(db, "first")
        session = await insert(second_db, "second")
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await insert(second_db, "second")
    assert await database.names() == ["first", "second"]


# --- on_commit and before_commit --------------------------------------------------------------------------------------


async def test_callbacks_run_after_the_commit_in_order(db: DBConnect, database: Database) -> None:
    seen: list[tuple[str, list[str]]] = []

    async def look(name: str) -> None:
        seen.append((name, await database.names()))

    async with new_db_ctx():
        await insert(db, "one")
        on_commit(db, lambda: look("first"))
        on_commit(db, lambda: seen.append(("second", [])))
    assert seen == [("first", ["one"]), ("second", [])]


async def test_callbacks_do_not_run_after_a_roll_back(db: DBConnect) -> None:
    seen: list[str] = []
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await insert(db, "one")
            on_commit(db, lambda: seen.append("raised"))
            raise LookupError
    async with new_db_ctx():
        await insert(db, "two")
        on_commit(db, lambda: seen.append("rolled back"))
        await rollback_db_session(db)
    async with new_db_ctx():
        await insert(db, "three")
        on_commit(db, lambda: seen.append("closed"))
        await close_db_session(db)
    with pytest.raises(IntegrityError):
        async with new_db_ctx():
            await insert_row_that_fails_at_commit(db)
            on_commit(db, lambda: seen.append("failed"))
    assert seen == []


async def test_callbacks_run_once_and_at_an_early_commit(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        await insert(db, "one")
        on_commit(db, lambda: seen.append("early"))
        await commit_db_session(db)
        assert seen == ["early"]
    assert seen == ["early"]


async def test_a_callback_waits_for_its_own_database(db: DBConnect, second_db: DBConnect) -> None:
    seen: list[str] = []
    with pytest.raises(IntegrityError):
        async with new_db_ctx():
            await insert(db, "one")
            on_commit(db, lambda: seen.append("committed"))
            await insert_row_that_fails_at_commit(second_db)
            on_commit(second_db, lambda: seen.append("failed"))
    assert seen == ["committed"]


async def test_a_callback_has_a_unit_of_work_of_its_own(db: DBConnect, database: Database) -> None:
    async def write() -> None:
        await insert(db, "two")

    async with new_db_ctx():
        await insert(db, "one")
        on_commit(db, write)
    assert await database.names() == ["one", "two"]


async def test_a_failing_callback_is_logged_and_hinders_nothing(
    db: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    async def fail() -> None:
        await insert(db, "of the callback")
        raise LookupError("it failed")

    async with new_db_ctx():
        await insert(db, "one")
        on_commit(db, fail)
        on_commit(db, lambda: seen.append("next"))
    assert await database.names() == ["one"]
    assert seen == ["next"]
    assert "it failed" in caplog.text


async def test_a_callback_runs_although_the_task_was_cancelled_during_the_commit(
    db: DBConnect, database: Database
) -> None:
    seen: list[str] = []

    async def unit() -> None:
        async with new_db_ctx():
            await insert(db, "one")
            on_commit(db, lambda: seen.append("committed"))
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(unit())
    assert await database.names() == ["one"]
    assert seen == ["committed"]


async def test_before_commit_gets_each_session_that_is_about_to_be_committed(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    seen: list[tuple[AsyncSession, list[str]]] = []

    async def before_commit(session: AsyncSession) -> None:
        seen.append((session, await database.names()))

    async with database.connect() as unused_db, new_db_ctx(before_commit=before_commit):
        first = await insert(db, "one")
        await db_session(unused_db)
        second = await insert(second_db, "two")
    assert seen == [(first, []), (second, [])]


async def test_an_error_of_before_commit_rolls_everything_back(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async def before_commit(session: AsyncSession) -> None:
        if session is await db_session(second_db):
            raise LookupError("not this one")

    with pytest.raises(LookupError, match="not this one"):
        async with new_db_ctx(before_commit=before_commit):
            await insert(db, "one")
            await insert(second_db, "two")
    assert await database.names() == []


async def test_before_commit_is_asked_at_an_early_commit(db: DBConnect) -> None:
    seen: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        seen.append(session)

    async with new_db_ctx(before_commit=before_commit):
        session = await insert(db, "one")
        await commit_db_session(db)
        assert seen == [session]


async def _in_its_own_ctx(fn: Callable[[], Awaitable[object]], db: DBConnect) -> None:
    async with new_db_ctx():
        await fn()


async def _required_in_no_transaction(fn: Callable[[], Awaitable[object]], db: DBConnect) -> None:
    async with transactional(db, "not_supported"):
        await transactional(db)(fn)()


OPENERS = {
    "run_in_new_ctx": lambda fn, db: run_in_new_ctx(fn),
    "gather_in_new_ctx": lambda fn, db: gather_in_new_ctx(fn),
    "new_db_ctx": _in_its_own_ctx,
    "requires_new": lambda fn, db: transactional(db, "requires_new")(fn)(),
    "required in no transaction": _required_in_no_transaction,
    "retry_on_conflict": lambda fn, db: retry_on_conflict()(fn)(),
    "new_transaction": lambda fn, db: TransactionContext(db).new_transaction()(fn)(),
}


@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)
async def test_before_commit_is_asked_of_units_of_work_inside_as_well(
    db: DBConnect, database: Database, opener: Callable[..., Awaitable[object]]
) -> None:
    async def note(session: AsyncSession) -> None:
        seen.append([item.name for item in session.new if isinstance(item, Item)])

    async def work() -> None:
        (await db_session(db)).add(Item(name="inner"))

    seen: list[list[str]] = []
    async with new_db_ctx(before_commit=note):
        await opener(work, db)
        assert seen == [["inner"]]
        (await db_session(db)).add(Item(name="outer"))
    assert seen == [["inner"], ["outer"]]
    assert await database.names() == ["inner", "outer"]


async def test_the_before_commit_of_a_block_replaces_that_of_the_unit_around_it(db: DBConnect) -> None:
    async def outer(session: AsyncSession) -> None:
        seen.append("outer")

    async def inner(session: AsyncSession) -> None:
        seen.append("inner")

    seen: list[str] = []
    async with new_db_ctx(before_commit=outer), new_db_ctx(before_commit=inner):
        await insert(db, "one")
    assert seen == ["inner"]


async def test_before_commit_may_use_a_session_while_another_task_is_in_a_block_of_it(
    db: DBConnect, database: Database
) -> None:
    async def stay_in_block() -> None:
        async with (await db_session(db)).begin_nested():
            entered.set()
            await leave.wait()

    async def before_commit(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO item VALUES ('audit')"))

    entered, leave = asyncio.Event(), asyncio.Event()
    async with new_db_ctx(before_commit=before_commit):
        await insert(db, "one")
        staying = asyncio.create_task(stay_in_block())
        await entered.wait()
    leave.set()
    await asyncio.wait([staying])
    assert isinstance(staying.exception(), ContextClosedError)
    assert await database.names() == ["audit", "one"]


async def test_objects_stay_readable_behind_a_commit_that_before_commit_was_asked_about(database: Database) -> None:
    async def before_commit(session: AsyncSession) -> None: ...

    def expiring(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=True)

    async with DBConnect(lambda host: database.watch_new(), expiring, host="127.0.0.1") as db:
        item = Item(name="one")
        async with new_db_ctx(before_commit=before_commit):
            (await db_session(db)).add(item)
        assert item.name == "one"


async def test_a_session_expires_its_objects_as_it_is_told_to_after_a_commit_that_did_not(database: Database) -> None:
    def expiring(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=True)

    async with DBConnect(lambda host: database.watch_new(), expiring, host="127.0.0.1") as db:
        unit = begin({})
        assert unit is not None
        item = Item(name="one")
        session = await db_session(db)
        session.add(item)
        await finalize(unit, commit=True, last=False)
        assert item.name == "one"
        await session.execute(text("SELECT 1"))
        await commit_db_session(db)
        assert inspect(item).expired_attributes == {"name"}
        await finalize(unit, commit=True)


@pytest.mark.parametrize("failing", ["nothing", "before_commit", "commit"])
async def test_before_commit_is_asked_about_work_that_another_task_does_during_the_last_commit(
    db: DBConnect, database: Database, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    async def before_commit(session: AsyncSession) -> None:
        asked.append(await session.scalar(text("SELECT count(*) FROM item")))
        is_asked.set()
        if failing == "before_commit" and len(asked) > 1:
            raise LookupError

    async def write_late() -> None:
        await is_asked.wait()
        # It waits for the commit, and begins a transaction of its own.
        await insert(db, "late")
        on_commit(db, lambda: told.append("committed"))
        on_rollback(db, lambda: told.append("rolled back"))
        if failing == "commit":
            await insert_row_that_fails_at_commit(db)

    async def work() -> None:
        async with new_db_ctx(before_commit=before_commit):
            await insert(db, "one")
            writing.append(asyncio.create_task(write_late()))
            await asyncio.sleep(0)

    asked: list[int] = []
    told: list[str] = []
    writing: list[asyncio.Task[None]] = []
    is_asked = asyncio.Event()
    # The first commit stands, so the failure of the second one is logged.
    await work()
    assert [record.exc_info is not None for record in caplog.records] == ([] if failing == "nothing" else [True])
    assert told == ["committed" if failing == "nothing" else "rolled back"]
    assert asked == [1, 2]
    assert await database.names() == (["late", "one"] if failing == "nothing" else ["one"])
    await asyncio.gather(*writing)


async def test_before_commit_may_close_the_session_that_is_next(db: DBConnect, database: Database) -> None:
    async def close_other(session: AsyncSession) -> None:
        seen.append(session)
        await close_db_session(other)

    seen: list[AsyncSession] = []
    async with database.connect() as other, new_db_ctx(before_commit=close_other):
        session = await insert(db, "one")
        await insert(other, "other")
    assert seen == [session]
    assert await database.names() == ["one"]


async def test_before_commit_is_not_asked_about_its_own_units_of_work(db: DBConnect, database: Database) -> None:
    async def write_audit(session: AsyncSession) -> None:
        await run_in_new_ctx(insert, db, "audit")

    async with new_db_ctx(before_commit=write_audit):
        await insert(db, "one")
    assert await database.names() == ["audit", "one"]


async def test_a_block_that_before_commit_opens_has_the_before_commit_that_it_was_given(db: DBConnect) -> None:
    async def write_audit(session: AsyncSession) -> None:
        seen.append("outer")
        async with new_db_ctx(before_commit=inner):
            await insert(db, "audit")

    async def inner(session: AsyncSession) -> None:
        seen.append("inner")

    seen: list[str] = []
    async with new_db_ctx(before_commit=write_audit):
        await insert(db, "one")
    assert seen == ["outer", "inner"]


@pytest.mark.parametrize("commit", [lambda session, db: session.commit(), lambda session, db: commit_db_session(db)])
async def test_before_commit_may_commit(
    db: DBConnect, database: Database, commit: Callable[[AsyncSession, DBConnect], Awaitable[None]]
) -> None:
    calls: list[AsyncSession] = []

    async def write_audit(session: AsyncSession) -> None:
        calls.append(session)
        await insert(db, f"audit {len(calls)}")
        await commit(session, db)

    async with new_db_ctx(before_commit=write_audit):
        await insert(db, "one")
        await commit_db_session(db)
        await insert(db, "two")
    assert await database.names() == ["audit 1", "audit 2", "one", "two"]


# --- atomic_db_session ------------------------------------------------------------------------------------------------


@KINDS
async def test_a_block_is_a_transaction_of_its_own(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        async with atomic_db_session(db) as session:
            assert session is await insert(db, "one")
        assert await database.names() == ["one"]
        with pytest.raises(LookupError):
            async with atomic_db_session(db):
                await insert(db, "two")
                raise LookupError
        await insert(db, "three")
    assert await database.names() == ["one", "three"]


@KINDS
@pytest.mark.parametrize(
    ("mode", "after_success", "after_error"),
    [
        ("commit", ["block", "open"], ["open"]),
        ("rollback", ["block"], []),
        ("append", ["block", "open"], []),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
async def test_an_open_transaction_is_treated_as_asked(
    db: DBConnect, database: Database, mode: str, after_success: list[str], after_error: list[str], fails: bool
) -> None:
    async def block() -> None:
        async with atomic_db_session(db, mode):  # type: ignore[arg-type]  # parametrised
            await insert(db, "block")
            if fails:
                raise LookupError

    async with new_db_ctx():
        await insert(db, "open")
        if fails:
            with pytest.raises(LookupError):
                await block()
        else:
            await block()
        assert await database.names() == (after_error if fails else after_success)
        assert database.checked_out == 0
    assert await database.names() == (after_error if fails else after_success)


@KINDS
async def test_an_open_transaction_is_an_error_if_asked(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        async with atomic_db_session(db, "raise"):
            await insert(db, "first")
        await insert(db, "open")
        with pytest.raises(TransactionAlreadyActiveError, match="commit_db_session"):
            async with atomic_db_session(db, "raise"):
                pytest.fail("the block was entered")
        await insert(db, "still usable")
    assert await database.names() == ["first", "open", "still usable"]


@KINDS
async def test_a_savepoint_keeps_the_outer_transaction(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "outer")
        async with atomic_db_session(db, "savepoint"):
            await insert(db, "kept")
        with pytest.raises(LookupError):
            async with atomic_db_session(db, "savepoint"):
                await insert(db, "undone")
                raise LookupError
        assert await database.names() == []
    assert await database.names() == ["kept", "outer"]


async def _commit(db: DBConnect) -> None:
    await commit_db_session(db)


async def _atomic(db: DBConnect, mode: CurrentTransaction = "commit") -> None:
    async with atomic_db_session(db, mode):
        await insert(db, "inside")


@pytest.mark.parametrize(
    "commit",
    [_commit, _atomic, partial(_atomic, mode="append"), partial(_atomic, mode="rollback")],
    ids=["commit_db_session", "atomic", "append", "rollback"],
)
@pytest.mark.parametrize("block", ["begin_nested", "savepoint"])
async def test_the_block_of_a_savepoint_cannot_be_committed_from_within(
    db: DBConnect, database: Database, block: str, commit: Callable[[DBConnect], Awaitable[None]]
) -> None:
    async with new_db_ctx():
        session = await insert(db, "before")
        async with session.begin_nested() if block == "begin_nested" else atomic_db_session(db, "savepoint"):
            await insert(db, "in it")
            with pytest.raises(TransactionAlreadyActiveError, match="savepoint"):
                await commit(db)
            await insert(db, "also in it")
        assert await database.names() == []
    assert await database.names() == ["also in it", "before", "in it"]


@pytest.mark.parametrize("mode", ["commit", "rollback"])
async def test_a_block_cannot_end_the_transaction_of_a_block_around_it(
    db: DBConnect, database: Database, mode: CurrentTransaction
) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        async with session.begin():
            await insert(db, "before")
            with pytest.raises(TransactionAlreadyActiveError, match=r"session\.begin\(\)"):
                await _atomic(db, mode)
        assert await database.names() == ["before"]


async def test_a_savepoint_that_is_no_block_can_be_committed_with_its_transaction(
    db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await insert(db, "before")
        await session.begin_nested()
        await insert(db, "in it")
        await commit_db_session(db)
        assert await database.names() == ["before", "in it"]


@KINDS
@pytest.mark.parametrize("has_read", [True, False])
async def test_a_savepoint_is_committed_or_undone_with_the_unit_also_as_the_first_work_of_it(
    db: DBConnect, database: Database, has_read: bool
) -> None:
    for name, is_undone in (("undone", True), ("kept", False)):
        async with new_db_ctx():
            if has_read:
                await (await db_session(db)).execute(text("SELECT 1"))
            async with atomic_db_session(db, "savepoint"):
                await insert(db, name)
            assert await database.names() == []
            if is_undone:
                set_rollback_only()
    assert await database.names() == ["kept"]


@KINDS
@pytest.mark.parametrize("block", ["atomic", "transactional", "attempt", "joined"])
async def test_a_savepoint_is_undone_with_the_block_around_it_also_before_its_first_statement(
    db: DBConnect, database: Database, block: str
) -> None:
    async def work() -> None:
        async with atomic_db_session(db, "savepoint"):
            await insert(db, "one")
        raise LookupError

    async def atomic() -> None:
        async with new_db_ctx(), atomic_db_session(db):
            await work()

    async def joined() -> None:
        async with new_db_ctx(), transactional(db):
            await work()

    blocks = {
        "atomic": atomic,
        "transactional": transactional(db)(work),
        "attempt": retry_on_conflict()(work),
        "joined": joined,
    }
    with pytest.raises(LookupError):
        await blocks[block]()
    assert await database.names() == []


@KINDS
async def test_a_savepoint_in_the_block_of_another_database_is_committed_with_the_unit(
    db: DBConnect, second_db: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        async with atomic_db_session(second_db), atomic_db_session(db, "savepoint"):
            await insert(db, "one")
        assert await database.names() == []
    assert await database.names() == ["one"]


@KINDS
@pytest.mark.parametrize("mode", ["commit", "rollback", "append", "savepoint"])
async def test_blocks_of_two_tasks_do_not_share_the_transaction_of_a_unit(
    db: DBConnect, database: Database, mode: CurrentTransaction
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with atomic_db_session(db, mode):
            await insert(db, "half")
            entered.set()
            await leave.wait()
            raise LookupError

    async def second() -> None:
        await entered.wait()
        try:
            async with atomic_db_session(db, mode):
                await insert(db, "second")
        finally:
            leave.set()

    async with new_db_ctx():
        await db_session(db)
        results = await asyncio.gather(first(), second(), return_exceptions=True)
        assert [type(result) for result in results] == [LookupError, SessionAlreadyActiveError]
        assert "run_in_new_ctx" in str(results[1])
        # The second task may have its block when that of the first has ended.
        await asyncio.create_task(second())
    assert await database.names() == ["second"]


async def test_a_task_that_a_block_waits_for_takes_part_in_it(db: DBConnect, database: Database) -> None:
    async def part() -> None:
        async with atomic_db_session(db, "savepoint"):
            await insert(db, "part")

    async with new_db_ctx():
        with pytest.raises(LookupError):
            async with atomic_db_session(db):
                await insert(db, "whole")
                await asyncio.create_task(part())
                raise LookupError
    assert await database.names() == []


async def test_an_unknown_mode_is_refused(db: DBConnect) -> None:
    async with new_db_ctx():
        with pytest.raises(ValueError, match="'append'"):
            async with atomic_db_session(db, "sometimes"):  # type: ignore[arg-type]  # the mistake
                pytest.fail("the block was entered")


@KINDS
async def test_a_block_whose_commit_fails_raises(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        with pytest.raises(IntegrityError):
            async with atomic_db_session(db):
                await insert_row_that_fails_at_commit(db)
        await insert(db, "after")
    assert await database.names() == ["after"]


# --- sessions outside of the context ----------------------------------------------------------------------------------


@KINDS
async def test_a_session_outside_of_the_context_commits_nothing_by_itself(db: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(text("INSERT INTO item VALUES ('one')"))
        await session.commit()
        await session.execute(text("INSERT INTO item VALUES ('two')"))
    assert await database.names() == ["one"]


@KINDS
async def test_an_atomic_session_outside_of_the_context_commits_or_rolls_back(
    db: DBConnect, database: Database
) -> None:
    async with new_non_ctx_atomic_session(db) as session:
        await session.execute(text("INSERT INTO item VALUES ('one')"))
    with pytest.raises(LookupError):
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("INSERT INTO item VALUES ('two')"))
            raise LookupError
    with pytest.raises(IntegrityError):
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("INSERT INTO child VALUES ('nobody')"))
    assert await database.names() == ["one"]


# --- new contexts -----------------------------------------------------------------------------------------------------


async def test_a_function_runs_in_a_unit_of_work_of_its_own(db: DBConnect, database: Database) -> None:
    async def write(name: str, *, fail: bool = False) -> str:
        await insert(db, name)
        if fail:
            raise LookupError
        return name

    async with new_db_ctx():
        outer = await insert(db, "outer")
        assert await run_in_new_ctx(write, "inner") == "inner"
        with pytest.raises(LookupError):
            await run_in_new_ctx(write, "failed", fail=True)
        assert await db_session(db) is outer
        assert await database.names() == ["inner"]


async def test_gathered_functions_have_sessions_of_their_own(db: DBConnect, database: Database) -> None:
    async def write(name: str) -> AsyncSession:
        return await insert(db, name)

    results = await gather_in_new_ctx(*(lambda name=f"n{i}": write(name) for i in range(20)))
    assert len({id(session) for session in results}) == 20
    assert len(await database.names()) == 20


async def test_gathering_nothing_returns_nothing() -> None:
    assert await gather_in_new_ctx() == []


async def test_no_more_than_max_concurrent_run_at_a_time(db: DBConnect) -> None:
    running = most = 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await (await db_session(db)).execute(text("SELECT 1"))
        running -= 1

    await gather_in_new_ctx(*[work] * 12, max_concurrent=3)
    assert most == 3


async def test_the_first_error_ends_the_others_and_surfaces(db: DBConnect, database: Database) -> None:
    others_wrote = asyncio.Event()

    async def forever() -> None:
        await insert(db, "other")
        others_wrote.set()
        await asyncio.Event().wait()

    async def fail() -> None:
        await others_wrote.wait()
        raise LookupError("the first")

    with pytest.raises(LookupError, match="the first"):
        await gather_in_new_ctx(forever, fail)
    assert await database.names() == []


@pytest.mark.parametrize("max_concurrent", [0, -1])
async def test_a_limit_below_one_is_refused(max_concurrent: int) -> None:
    async def work() -> None:
        pass

    with pytest.raises(ValueError, match="max_concurrent"):
        await gather_in_new_ctx(work, max_concurrent=max_concurrent)


async def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(CtxDBError, match="a str is given as `max_concurrent`"):
        await gather_in_new_ctx(max_concurrent="2")  # type: ignore[arg-type]  # the mistake


async def test_a_coroutine_instead_of_a_function_is_refused() -> None:
    async def work() -> None:
        pass

    with pytest.raises(TypeError, match="partial"):
        await gather_in_new_ctx(work())  # type: ignore[arg-type]  # the mistake
    with pytest.raises(TypeError, match="run_in_new_ctx"):
        await run_in_new_ctx(work())  # type: ignore[arg-type]  # the mistake


# --- transactions that the user ends without asking the unit of work --------------------------------------------------


async def test_callbacks_do_not_run_for_what_the_user_undid(db: DBConnect, database: Database) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        on_commit(db, lambda: seen.append("undone"))
        await session.rollback()
    assert (await database.names(), seen) == ([], [])


async def test_callbacks_run_for_what_the_user_committed(db: DBConnect, database: Database) -> None:
    seen: list[str] = []

    async def unit() -> None:
        async with new_db_ctx():
            on_commit(db, lambda: seen.append("committed"))
            session = await insert(db, "one")
            await session.commit()
            await insert(db, "two")
            raise LookupError

    with pytest.raises(LookupError):
        await unit()
    assert (await database.names(), seen) == (["one"], ["committed"])


async def test_a_callback_of_an_open_savepoint_waits_for_the_commit(db: DBConnect) -> None:
    seen: list[str] = []
    async with new_db_ctx():
        session = await insert(db, "one")
        async with session.begin_nested():
            on_commit(db, lambda: seen.append("committed"))
            await insert(db, "two")
        assert seen == []
    assert seen == ["committed"]


async def test_a_cancelled_task_does_not_wait_for_a_callback(db: DBConnect) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def callback() -> None:
        entered.set()
        await release.wait()

    async def unit() -> None:
        async with new_db_ctx():
            await insert(db, "one")
            on_commit(db, callback)

    task = asyncio.create_task(unit())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()


async def test_a_callback_that_waited_for_a_cancelled_task_is_logged_and_hinders_nothing(
    db: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    async def fail() -> None:
        raise asyncio.CancelledError

    async with new_db_ctx():
        await insert(db, "one")
        on_commit(db, fail)
        on_commit(db, lambda: seen.append("next"))
    assert seen == ["next"]
    assert "on_commit callback" in caplog.text


async def test_before_commit_gets_a_session_that_the_hook_itself_has_written_on(
    db: DBConnect, second_db: DBConnect
) -> None:
    seen: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        seen.append(session)
        if len(seen) == 1:
            await insert(db, "outbox")

    async with new_db_ctx(before_commit=before_commit):
        first = await db_session(db)
        second = await insert(second_db, "one")
    assert seen == [second, first]


async def test_two_tasks_that_commit_at_once_take_turns(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        await asyncio.gather(commit_db_session(db), commit_db_session(db))
    assert await database.names() == ["one"]


async def test_a_block_that_outlives_its_unit_of_work_does_not_end_without_an_error(
    db: DBConnect, database: Database
) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def block() -> None:
        async with atomic_db_session(db):
            await insert(db, "void")
            entered.set()
            await release.wait()

    async def unit() -> None:
        async with new_db_ctx():
            tasks.append(asyncio.create_task(block()))
            await entered.wait()
            raise LookupError

    tasks: list[asyncio.Task[None]] = []
    with pytest.raises(LookupError):
        await unit()
    release.set()
    with pytest.raises(ContextClosedError):
        await tasks[0]
    assert await database.names() == []


async def test_a_closed_session_takes_no_more_objects(db: DBConnect) -> None:
    async with new_db_ctx():
        closed = await insert(db, "one")
        await close_db_session(db)
        with pytest.raises(SessionClosedError):
            closed.add(Item(name="void"))
    with pytest.raises(SessionClosedError):
        await closed.connection(bind_arguments={"bind": (await db.engine()).sync_engine})


def with_classes(database: Database, **classes: Any) -> DBConnect:
    return DBConnect(
        lambda host: database.watch_new(),
        lambda engine: async_sessionmaker(engine, expire_on_commit=False, **classes),
        host="127.0.0.1",
    )


@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_session_that_is_opened_after_a_mark_to_roll_back_refuses_to_commit(
    db: DBConnect, database: Database, everywhere: bool
) -> None:
    async with new_db_ctx():
        set_rollback_only(None if everywhere else db)
        session = await insert(db, "one")
        with pytest.raises(UnexpectedRollbackError):
            await session.commit()
    assert await database.names() == []


async def test_what_fails_beside_the_first_of_gathered_functions_is_attached_to_its_error(db: DBConnect) -> None:
    async def fail() -> None:
        await begun.wait()
        raise LookupError

    async def fail_too() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            raise ValueError("as well")

    begun = asyncio.Event()
    with pytest.raises(LookupError) as caught:
        await gather_in_new_ctx(fail, fail_too)
    assert caught.value.__notes__ == ["ctxdb: another of the callables failed as well: ValueError: as well"]


async def test_nothing_is_begun_if_one_of_the_gathered_is_no_function() -> None:
    async def begin_work() -> None:
        begun.append(True)

    begun: list[bool] = []
    with pytest.raises(TypeError, match="an object is no async function"):
        await gather_in_new_ctx(begin_work, object())  # type: ignore[arg-type]  # that is the mistake
    assert not begun


async def test_a_session_that_is_made_while_its_unit_ends_is_not_given_out(database: Database) -> None:
    async def prepare(db: DBConnect) -> None:
        entered.set()
        await leave.wait()

    entered, leave = asyncio.Event(), asyncio.Event()
    async with DBConnect(
        lambda host: database.watch_new(), host="127.0.0.1", before_create_session_handler=prepare
    ) as db:
        async with new_db_ctx():
            writing = asyncio.create_task(insert(db, "late"))
            await entered.wait()
        leave.set()
        with pytest.raises(ContextClosedError):
            await writing
        assert database.checkouts == 0
        assert not db.status().units


async def test_a_session_in_autocommit_may_be_closed_after_a_write(database: Database) -> None:
    async with database.connect(isolation_level="AUTOCOMMIT") as db:
        async with new_db_ctx():
            session = await insert(db, "one")
            await session.close()
            assert database.checked_out == 0
        assert await database.names() == ["one"]


@pytest.mark.parametrize("kind", ["class_", "sync_session_class"])
async def test_the_close_of_a_session_class_is_called_at_the_end_of_a_unit(database: Database, kind: str) -> None:
    closed: list[object] = []

    class Asynchronous(AsyncSession):
        async def close(self) -> None:
            closed.append(self)
            await super().close()

    class Synchronous(Session):
        def close(self) -> None:
            closed.append(self)
            super().close()

    async with with_classes(database, **{kind: Asynchronous if kind == "class_" else Synchronous}) as db:
        async with new_db_ctx():
            session = await insert(db, "one")
        assert closed == [session if kind == "class_" else session.sync_session]


@pytest.mark.parametrize("kind", ["class_", "sync_session_class"])
async def test_listeners_that_the_constructor_of_a_session_adds_are_called(database: Database, kind: str) -> None:
    flushed: list[object] = []

    def note(session: Session, *args: object) -> None:
        flushed.append(session)

    class Asynchronous(AsyncSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            event.listen(self.sync_session, "before_flush", note)

    class Synchronous(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            event.listen(self, "before_flush", note)

    async with with_classes(database, **{kind: Asynchronous if kind == "class_" else Synchronous}) as db:
        async with new_db_ctx():
            session = await db_session(db)
            session.add(Item(name="one"))
        assert flushed == [session.sync_session]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_session_whose_close_fails_is_invalidated_and_the_failure_is_told(
    database: Database, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(AsyncSession):
        async def close(self) -> None:
            raise ValueError("close")

        async def invalidate(self) -> None:
            await super().invalidate()
            raise ValueError("invalidate")

    async with with_classes(database, class_=Failing) as db:
        error = LookupError()

        async def unit() -> None:
            async with new_db_ctx():
                await insert(db, "one")
                if fails:
                    raise error

        with pytest.raises(LookupError) if fails else nullcontext():
            await unit()
        await database.assert_quiet()
    told = error.__notes__[0] if fails else caplog.text
    assert "closing the session on <DBConnect host='127.0.0.1'> failed, and its connection was thrown away" in told
    assert "A session could not be invalidated" in caplog.text
    assert await database.names() == ([] if fails else ["one"])


@pytest.mark.parametrize("ask", [on_commit, on_rollback, on_begin, lambda db, callback: set_rollback_only(db)])
async def test_nothing_is_asked_of_a_unit_on_another_event_loop_or_behind_its_end(
    db: DBConnect, ask: Callable[[DBConnect, Callable[..., object]], None]
) -> None:
    async def callback(*args: object) -> None: ...

    async def ask_elsewhere() -> None:
        ask(db, callback)

    async def ask_later() -> None:
        await ended.wait()
        ask(db, callback)

    ended = asyncio.Event()
    async with new_db_ctx():
        with pytest.raises(ContextNotInitiatedError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, ask_elsewhere())
        later = asyncio.create_task(ask_later())
    ended.set()
    with pytest.raises(ContextClosedError):
        await later


async def test_a_statement_that_does_not_end_when_it_is_interrupted_keeps_no_unit_open(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hold_out() -> None:
        started.set()
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await released.wait()

    async def hold() -> None:
        session = await insert(db, "one")
        await session.run_sync(lambda sync_session: await_only(hold_out()))

    monkeypatch.setattr("ctxdb_core._units.session_end.INTERRUPTION_SECONDS", 0.01)
    started, released = asyncio.Event(), asyncio.Event()
    with pytest.raises(LookupError):
        async with new_db_ctx():
            holding = asyncio.create_task(hold())
            await started.wait()
            raise LookupError
    assert database.checked_out == 1
    released.set()
    await asyncio.wait([holding])
    await eventually(lambda: not database.checked_out, "the connection is held")
    async with new_db_ctx():
        await insert(db, "two")
    # The connection of the call that has held out was thrown away.
    assert database.connections == 2
    assert await database.names() == ["two"]


async def end_by_block(db: DBConnect) -> None:
    with suppress(UnexpectedRollbackError):
        async with atomic_db_session(db, "append"):
            pass


@pytest.mark.parametrize("end", [commit_db_session, rollback_db_session, end_by_block])
@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_mark_to_roll_back_outlasts_the_ends_of_transactions_on_other_databases(
    db: DBConnect,
    second_db: DBConnect,
    database: Database,
    end: Callable[[DBConnect], Awaitable[None]],
    everywhere: bool,
) -> None:
    async with new_db_ctx():
        await insert(db, "one")
        await insert(second_db, "two")
        set_rollback_only(None if everywhere else second_db)
        with suppress(UnexpectedRollbackError):
            await end(db)
        await insert(second_db, "three")
    assert await database.names() == ([] if everywhere or end is rollback_db_session else ["one"])


async def test_a_unit_that_is_cancelled_while_its_commit_waits_for_a_statement_is_rolled_back(
    db: DBConnect, database: Database
) -> None:
    async def write() -> None:
        async with new_db_ctx():
            session = await insert(db, "undone")
            waiting.append(asyncio.create_task(session.execute(text("SELECT pg_advisory_xact_lock(7)"))))
            await eventually(lambda: bool(database.backends("wait_event = 'advisory'")), "no query")
            begun.set()

    waiting: list[asyncio.Task[object]] = []
    begun = asyncio.Event()
    await database.query("SELECT pg_advisory_lock(7)")
    writing = asyncio.create_task(write())
    await begun.wait()
    writing.cancel()
    await asyncio.sleep(0)
    await database.query("SELECT pg_advisory_unlock(7)")
    with pytest.raises(asyncio.CancelledError):
        await writing
    await asyncio.wait(waiting)
    assert await database.names() == []


async def test_a_savepoint_that_another_task_sets_while_a_commit_waits_does_not_keep_it_from_coming(
    db: DBConnect, database: Database
) -> None:
    async def set_savepoint(session: AsyncSession) -> None:
        async with session.begin_nested():
            await leave.wait()

    leave = asyncio.Event()
    unit = begin({})
    assert unit is not None
    session = await insert(db, "one")
    await database.query("SELECT pg_advisory_lock(7)")
    waiting = asyncio.create_task(session.execute(text("SELECT pg_advisory_xact_lock(7)")))
    await eventually(lambda: bool(database.backends("wait_event = 'advisory'")), "no query")
    # The two wait for the end of the statement in this order.
    ending = asyncio.create_task(finalize(unit, commit=True, last=False))
    await asyncio.sleep(0)
    setting = asyncio.create_task(set_savepoint(session))
    await asyncio.sleep(0)
    await database.query("SELECT pg_advisory_unlock(7)")
    await asyncio.gather(waiting, ending)
    assert await database.names() == ["one"]
    leave.set()
    await setting
    await finalize(unit, commit=True)


async def test_a_roll_back_on_a_server_that_does_not_answer_comes_to_an_end(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core._units.session_end.ROLL_BACK_SECONDS", 0.05)
    monkeypatch.setattr("ctxdb_core._sqlalchemy.cancelled_queries.STOP_QUERY_TIMEOUT_SECONDS", 0.05)
    frozen: list[int] = []

    async def unit() -> None:
        async with new_db_ctx():
            session = await insert(db, "one")
            frozen.append(await session.scalar(text("SELECT pg_backend_pid()")))
            os.kill(frozen[0], signal.SIGSTOP)
            raise LookupError

    try:
        with pytest.raises(LookupError) as caught:
            await unit()
        assert any("thrown away" in note for note in caught.value.__notes__)
        assert database.checked_out == 0
    finally:
        os.kill(frozen[0], signal.SIGCONT)


async def test_a_commit_on_a_server_that_does_not_answer_ends_once_it_is_cancelled(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdb_core._shield.GRACE_SECONDS", 0.05)
    monkeypatch.setattr("ctxdb_core._sqlalchemy.cancelled_queries.STOP_QUERY_TIMEOUT_SECONDS", 0.05)
    frozen: list[int] = []

    async def unit() -> None:
        async with new_db_ctx():
            session = await insert(db, "one")
            frozen.append(await session.scalar(text("SELECT pg_backend_pid()")))
            os.kill(frozen[0], signal.SIGSTOP)
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)

    try:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(unit())
        assert database.checked_out == 0
    finally:
        os.kill(frozen[0], signal.SIGCONT)


def test_the_testing_tools_are_named_in_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "set_test_context" in str(ContextNotInitiatedError())
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert "test" not in str(ContextNotInitiatedError())


async def test_objects_are_detached_when_their_unit_of_work_has_ended(db: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        session.add(Item(name="one"))
        await commit_db_session(db)
        item = (await session.scalars(select(Item))).one()
        assert object_session(item) is session.sync_session
    assert object_session(item) is None
    # Another session can take an object that is detached.
    async with new_db_ctx():
        (await db_session(db)).add(item)
