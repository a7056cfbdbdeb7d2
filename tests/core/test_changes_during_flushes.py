"""Objects that a task changes, or adds, while another task of the unit of work flushes: SQLAlchemy would forget it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import ForeignKey, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, WriteOnlyMapped, mapped_column, relationship
from tests.support.database import Database, Item

from ctxdb_core import DBConnect, db_session, new_db_ctx

pytestmark = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)


class Base(AsyncAttrs, DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="old")
    visits: Mapped[int] = mapped_column(default=0)
    mails: Mapped[list[Mail]] = relationship(back_populates="user", lazy="selectin")
    notes: Mapped[list[Draft]] = relationship(viewonly=True)
    drafts: WriteOnlyMapped[Draft] = relationship()


class Mail(Base):
    __tablename__ = "mail"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    user: Mapped[User | None] = relationship(back_populates="mails")


class Draft(Base):
    __tablename__ = "draft"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))


@pytest.fixture
async def users(db: DBConnect) -> AsyncIterator[DBConnect]:
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with new_db_ctx():
        (await db_session(db)).add_all([User(id=1), User(id=2), Mail(id=1)])
    yield db
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


async def change_during_flush(
    session: AsyncSession, change: Callable[[], object], flush: Callable[[], Awaitable[object]] | None = None
) -> None:
    """Flush `session`, and have another task call `change` while the first statement of the flush is under way."""
    loop = asyncio.get_running_loop()

    def schedule(*args: object) -> None:
        if not changes:
            changes.append(loop.create_task(call()))

    async def call() -> None:
        change()

    changes: list[asyncio.Task[None]] = []
    engine = session.get_bind().engine
    event.listen(engine, "before_cursor_execute", schedule)
    try:
        await (flush or session.flush)()
    finally:
        event.remove(engine, "before_cursor_execute", schedule)
    await changes[0]


async def stored(database: Database, query: str) -> list[object]:
    return [row[0] if len(row) == 1 else tuple(row) for row in await database.query(query)]


async def test_a_change_of_an_object_that_is_not_in_the_flush_is_stored(users: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        user = await session.get_one(User, 1)
        session.add(Item(name="one"))
        await change_during_flush(session, lambda: setattr(user, "name", "new"))
        assert list(session.dirty) == [user]
    assert await stored(database, "SELECT name FROM users ORDER BY id") == ["new", "old"]


@pytest.mark.parametrize(("attribute", "value"), [("name", "new"), ("visits", 7)])
async def test_a_change_of_an_object_that_is_being_updated_is_stored(
    users: DBConnect, database: Database, attribute: str, value: object
) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        user = await session.get_one(User, 1)
        user.visits = 1
        await change_during_flush(session, lambda: setattr(user, attribute, value))
    expected = {"name": [("new", 1)], "visits": [("old", 7)]}
    assert await stored(database, "SELECT name, visits FROM users WHERE id = 1") == expected[attribute]


async def test_a_change_of_an_object_that_is_being_inserted_is_stored(users: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        user = User(id=3, visits=1)
        session.add(user)
        await change_during_flush(session, lambda: setattr(user, "visits", 2))
    assert await stored(database, "SELECT visits FROM users WHERE id = 3") == [2]


async def test_an_object_that_is_added_is_stored_without_a_warning(users: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        session.add(Item(name="one"))
        await change_during_flush(session, lambda: session.add(Item(name="two")))
    assert await database.names() == ["one", "two"]


async def test_a_change_during_the_flush_before_a_lazy_load_is_stored(users: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        user = await session.get_one(User, 1)
        session.add(Item(name="one"))
        await change_during_flush(session, lambda: setattr(user, "name", "new"), lambda: user.awaitable_attrs.notes)
    assert await stored(database, "SELECT name FROM users ORDER BY id") == ["new", "old"]


@pytest.mark.parametrize("busy", [False, True], ids=["clean", "in_the_flush"])
async def test_changed_relationships_are_stored(users: DBConnect, database: Database, *, busy: bool) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        user, mail = await session.get_one(User, 1), await session.get_one(Mail, 1)
        user.visits = int(busy)
        session.add(Item(name="one"))

        def change() -> None:
            user.mails.append(mail)
            user.drafts.add(Draft(id=1))

        await change_during_flush(session, change)
    assert await stored(database, "SELECT user_id FROM mail") == [1]
    assert await stored(database, "SELECT user_id FROM draft") == [1]


async def test_plain_attributes_of_an_object_are_left_alone(users: DBConnect) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        user = await session.get_one(User, 1)
        user.visits = 1
        await change_during_flush(session, lambda: setattr(user, "rank", 1))
        assert not session.dirty


async def test_listeners_of_a_flush_work_as_ever(users: DBConnect, database: Database) -> None:
    """A listener's change of another object is reset with a warning, and is not written for ever."""
    async with new_db_ctx():
        session = await db_session(users)
        first, second = await session.get_one(User, 1), await session.get_one(User, 2)

        def change(session: Session, context: object) -> None:
            second.visits += 1

        event.listen(session.sync_session, "after_flush", change)
        first.visits = 1
        with pytest.warns(match="Attribute history events accumulated on 1 previously clean"):
            await session.flush()
        event.remove(session.sync_session, "after_flush", change)
    assert await stored(database, "SELECT visits FROM users ORDER BY id") == [1, 0]


async def test_objects_can_be_used_on_after_a_flush_that_has_failed(users: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session = await db_session(users)
        user, other = await session.get_one(User, 1), await session.get_one(User, 2)

        def change() -> None:
            user.name = other.name = "new"

        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                user.visits = 1
                await session.execute(text("INSERT INTO item VALUES ('one')"))
                session.add(Item(name="one"))
                await change_during_flush(session, change)
        await session.refresh(user)
        await session.refresh(other)
        user.visits = other.visits = 3
    assert await stored(database, "SELECT name, visits FROM users ORDER BY id") == [("old", 3), ("old", 3)]


async def test_a_flush_that_fails_leaves_its_own_error(users: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        await (await db_session(users)).execute(text("INSERT INTO item VALUES ('one')"))
    with pytest.raises(IntegrityError):
        async with new_db_ctx():
            session = await db_session(users)
            user = await session.get_one(User, 1)
            session.add(Item(name="one"))
            await change_during_flush(session, lambda: setattr(user, "name", "new"))
    assert await stored(database, "SELECT name FROM users ORDER BY id") == ["old", "old"]
