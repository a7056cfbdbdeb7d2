"""What a later transaction reads again is fresh; what nobody reads again stays readable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from sqlalchemy import ForeignKey, event, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    attribute_keyed_dict,
    composite,
    load_only,
    mapped_column,
    relationship,
    selectinload,
    undefer,
)
from tests.support.database import Database

from ctxdb_core import DBConnect, commit_db_session, db_session, new_db_ctx, rollback_db_session


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    about: Mapped[str] = mapped_column(deferred=True)
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")
    copies: Mapped[dict[int, Copy]] = relationship(collection_class=attribute_keyed_dict("id"), back_populates="book")


@dataclass
class Place:
    shelf: int
    board: int


class Copy(Base):
    __tablename__ = "copy"
    id: Mapped[int] = mapped_column(primary_key=True)
    book_id: Mapped[int] = mapped_column(ForeignKey("book.id"))
    book: Mapped[Book] = relationship(lazy="joined", back_populates="copies")
    place: Mapped[Place] = composite(mapped_column("shelf"), mapped_column("board"))


class Medium(Base):
    __tablename__ = "medium"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "medium"}  # noqa: RUF012 - as SQLAlchemy has it


class Film(Medium):
    __tablename__ = "film"
    id: Mapped[int] = mapped_column(ForeignKey("medium.id"), primary_key=True)
    minutes: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "film"}  # noqa: RUF012 - as SQLAlchemy has it


class Shelf(Base):
    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    volumes: Mapped[list[Volume]] = relationship(back_populates="shelf")


class Volume(Base):
    __tablename__ = "volume"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelf.id"))
    shelf: Mapped[Shelf | None] = relationship(back_populates="volumes")


pytestmark = pytest.mark.parametrize("database_kind", ["asyncpg", "sqlite"], indirect=True)


@pytest.fixture
async def library(db: DBConnect, database: Database) -> AsyncIterator[DBConnect]:
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO author VALUES (1, 'Ada', 'long')"))
        await connection.execute(text("INSERT INTO book VALUES (1, 'Notes', 1)"))
    yield db
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


async def rename(database: Database, name: str) -> None:
    await database.query(f"UPDATE author SET name = '{name}'")


@pytest.mark.parametrize("loads", ["query", "refresh"])
async def test_what_a_later_transaction_loads_on_demand_stays_readable_behind_its_next_queries(
    library: DBConnect, loads: str
) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        await session.scalars(select(Author))
        books = (await session.scalars(select(Book))).all()
        await commit_db_session(library)
        if loads == "query":
            query = select(Author).options(selectinload(Author.books), undefer(Author.about))
            author = (await session.scalars(query)).one()
        else:
            author = await session.get_one(Author, 1)
            await session.refresh(author, ["books", "about"])
        for _ in range(2):
            await session.scalars(select(Author))
            await session.get(Author, 1)
            assert (author.books, author.about) == (books, "long")


async def test_what_is_loaded_on_demand_stays_readable_when_a_relationship_leads_to_the_object(
    library: DBConnect,
) -> None:
    async with new_db_ctx():
        (await db_session(library)).add(Copy(id=1, book_id=1, place=Place(2, 3)))
    async with new_db_ctx():
        session = await db_session(library)
        book = (await session.scalars(select(Book).options(selectinload(Book.author)))).one()
        await session.get_one(Copy, 1)
        await commit_db_session(library)
        await session.get_one(Copy, 1)
        assert book.author.name == "Ada"


async def test_what_a_flush_reads_does_not_overwrite_what_it_is_about_to_write(
    library: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        (await db_session(library)).add_all([Shelf(id=1), Volume(id=1, title="Notes", shelf_id=1)])
    async with new_db_ctx():
        session = await db_session(library)
        shelf, volume = await session.get_one(Shelf, 1), await session.get_one(Volume, 1)
        await commit_db_session(library)
        volume.title = "Letters"
        # The flush looks which volumes have to leave the shelf.
        await session.delete(shelf)
    assert await database.query("SELECT title, shelf_id FROM volume") == [("Letters", None)]


async def test_a_collection_that_is_a_dictionary_stays_readable_behind_the_next_queries(library: DBConnect) -> None:
    async with new_db_ctx():
        (await db_session(library)).add(Copy(id=1, book_id=1, place=Place(2, 3)))
    async with new_db_ctx():
        session = await db_session(library)
        book = (await session.scalars(select(Book).options(selectinload(Book.copies)))).one()
        copies = dict(book.copies)
        await commit_db_session(library)
        await session.scalars(select(Book))
        assert book.copies == copies
        assert list(copies) == [1]


async def test_what_is_appended_to_a_collection_that_was_at_hand_before_the_next_query_is_stored(
    library: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = (await session.scalars(select(Author).options(selectinload(Author.books)))).one()
        books = author.books
        await commit_db_session(library)
        await session.scalars(select(Author))
        books.append(Book(id=2, title="Letters"))
    assert await database.names("book", "title") == ["Letters", "Notes"]


async def test_an_update_by_the_orm_changes_objects_that_were_read_again(library: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = (await session.scalars(select(Author).options(selectinload(Author.books)))).one()
        await commit_db_session(library)
        await session.scalars(select(Author))
        await session.execute(update(Author).values(name="Grace"))
        assert (author.name, [book.title for book in author.books]) == ("Grace", ["Notes"])


async def test_a_composite_of_an_object_that_was_read_again_is_readable(library: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        session.add(Copy(id=1, book_id=1, place=Place(2, 3)))
        await commit_db_session(library)
        session.expunge_all()
        copy = (await session.scalars(select(Copy))).one()
        await commit_db_session(library)
        await session.scalars(select(Copy))
        session.add(another := Copy(id=2, book_id=1, shelf=4, board=5))
        assert (copy.place, copy.book.title, another.place) == (Place(2, 3), "Notes", Place(4, 5))


async def test_a_query_of_a_later_transaction_fills_its_objects_anew(library: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = (await session.scalars(select(Author))).one()
        await commit_db_session(library)
        await rename(database, "Grace")
        assert author.name == "Ada"
        assert (await session.scalars(select(Author))).one() is author
        assert author.name == "Grace"


async def test_get_asks_the_database_once_in_a_later_transaction(library: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = await session.get_one(Author, 1)
        await rollback_db_session(library)
        await rename(database, "Grace")
        statements: list[str] = []
        event.listen((await library.engine()).sync_engine, "before_execute", lambda *args: statements.append(""))
        assert await session.get(Author, 1) is author
        assert await session.get(Author, 1) is author
        assert (author.name, len(statements)) == ("Grace", 1)


async def test_get_returns_an_object_of_an_earlier_transaction_that_is_to_be_deleted(
    library: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        book = await session.get_one(Book, 1)
        await commit_db_session(library)
        await session.delete(book)
        assert await session.get(Book, 1) is book
    assert await database.query("SELECT id FROM book") == []


async def test_within_a_transaction_objects_are_left_alone(library: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = (await session.scalars(select(Author))).one()
        author.name = "changed"
        with session.no_autoflush:
            await session.scalars(select(Author))
        assert author.name == "changed"


async def test_an_unflushed_change_is_not_overwritten(library: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = await session.get_one(Author, 1)
        await commit_db_session(library)
        author.name = "changed"
        with session.no_autoflush:
            await session.scalars(select(Author))
            await session.get(Author, 1)
        assert author.name == "changed"
    assert await database.names("author") == ["changed"]


async def test_relationships_that_a_query_does_not_load_keep_what_they_have(
    library: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = (await session.scalars(select(Author).options(selectinload(Author.books)))).one()
        await commit_db_session(library)
        await rename(database, "Grace")
        await session.scalars(select(Author))
        assert (author.name, [book.title for book in author.books]) == ("Grace", ["Notes"])


async def test_deferred_columns_that_a_query_does_not_load_keep_what_they_have(library: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = await session.get_one(Author, 1, options=[undefer(Author.about)])
        await commit_db_session(library)
        await session.scalars(select(Author))
        assert author.about == "long"


async def test_columns_of_a_subclass_that_a_query_for_its_base_does_not_load_keep_what_they_have(
    library: DBConnect,
) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        film = Film(id=1, minutes=90)
        session.add(film)
        await commit_db_session(library)
        assert (await session.scalars(select(Medium))).all() == [film]
        assert film.minutes == 90


async def test_relationships_that_a_query_loads_are_fresh(library: DBConnect, database: Database) -> None:
    query = select(Author).options(selectinload(Author.books))
    async with new_db_ctx():
        session = await db_session(library)
        author = (await session.scalars(query)).one()
        await commit_db_session(library)
        await database.query("INSERT INTO book VALUES (2, 'More notes', 1)")
        await session.scalars(query)
        assert sorted(book.title for book in author.books) == ["More notes", "Notes"]


async def test_a_deleted_row_is_not_found_by_get_any_more(library: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        book = await session.get(Book, 1)
        await commit_db_session(library)
        await database.query("DELETE FROM book")
        assert await session.get(Book, 1) is None
        assert book is not None
        assert book.title == "Notes"


async def by_query(session: AsyncSession) -> Author:
    return (await session.scalars(select(Author))).one()


async def by_get(session: AsyncSession) -> Author:
    return await session.get_one(Author, 1)


async def by_query_with_books(session: AsyncSession) -> Author:
    return (await session.scalars(select(Author).options(selectinload(Author.books)))).one()


async def by_query_without_name(session: AsyncSession) -> Author:
    return (await session.scalars(select(Author).options(load_only(Author.id)))).one()


async def by_stream(session: AsyncSession) -> Author:
    return await (await session.stream_scalars(select(Author))).one()


@pytest.mark.parametrize("read", [by_query, by_get, by_query_with_books, by_query_without_name, by_stream])
async def test_a_change_by_another_task_while_an_object_is_read_again_is_stored(
    library: DBConnect, database: Database, read: Callable[[AsyncSession], Awaitable[Author]]
) -> None:
    async def change() -> None:
        author.name = "changed"

    def schedule(*args: object) -> None:
        changes.append(asyncio.get_running_loop().create_task(change()))

    changes: list[asyncio.Task[None]] = []
    async with new_db_ctx():
        session = await db_session(library)
        author = await session.get_one(Author, 1)
        await commit_db_session(library)
        engine = session.get_bind().engine
        event.listen(engine, "before_cursor_execute", schedule)
        try:
            assert await read(session) is author
        finally:
            event.remove(engine, "before_cursor_execute", schedule)
        await asyncio.gather(*changes)
        assert author.name == "changed"
    assert await database.names("author") == ["changed"]


@pytest.mark.parametrize("rows_at_once", [None, 1])
async def test_a_change_made_before_a_streamed_result_reaches_the_object_is_stored(
    library: DBConnect, database: Database, rows_at_once: int | None
) -> None:
    await database.query("INSERT INTO author VALUES (2, 'Bob', 'long')")
    statement = select(Author).order_by(Author.id)
    if rows_at_once:
        statement = statement.execution_options(yield_per=rows_at_once)
    async with new_db_ctx():
        session = await db_session(library)
        bob = await session.get_one(Author, 2)
        await commit_db_session(library)
        result = await session.stream_scalars(statement)
        bob.name = "Bo"
        async for author in result:
            bob.name += author.name[0]
    assert sorted(await database.names("author")) == ["Ada", "BoAB"]


async def test_a_streamed_result_of_a_later_transaction_fills_its_objects_anew(
    library: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(library)
        author = await session.get_one(Author, 1)
        await commit_db_session(library)
        await rename(database, "Lovelace")
        async for each in await session.stream_scalars(select(Author)):
            assert each is author
        assert author.name == "Lovelace"
