"""Logs that name a request's user when the response is an error: what was loaded is readable after the roll-back."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import ForeignKey
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from tests.support.application import Refusal, Reply
from tests.support.world import World

from ctxdb_core import atomic_db_session, db_session, new_db_ctx


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    roles: Mapped[list[Role]] = relationship(lazy="selectin")


class Role(Base):
    __tablename__ = "role"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str]


@pytest.fixture(autouse=True)
async def users(world: World) -> AsyncIterator[None]:
    async with (await world.db.engine()).begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with new_db_ctx():
        (await db_session(world.db)).add(User(id=1, name="ada", roles=[Role(id=1, name="admin")]))
    yield
    await world.stop()
    await world.database.query("DROP TABLE role")
    await world.database.query("DROP TABLE users")


def line_of(user: User) -> str:
    return f"{user.name} ({', '.join(role.name for role in user.roles)})"


@pytest.mark.parametrize("ends", ["refusal", "status", "exception"])
async def test_a_log_behind_an_error_names_its_user_as_the_database_does(world: World, ends: str) -> None:
    seen: list[User] = []

    async def page() -> Reply:
        user = await (await db_session(world.db)).get_one(User, 1)
        seen.append(user)
        user.name = "changed"
        if ends == "refusal":
            raise Refusal(404)
        if ends == "exception":
            raise LookupError
        return Reply(status=404)

    assert (await world.get(page)).status_code == (500 if ends == "exception" else 404)
    assert [line_of(user) for user in seen] == ["ada (admin)"]


@pytest.mark.parametrize("fails_in", ["flush", "block", "commit"])
async def test_a_log_behind_a_conflict_names_its_user(world: World, fails_in: str) -> None:
    seen: list[User] = []

    async def page() -> Reply:
        session = await db_session(world.db)
        user = await session.get_one(User, 1)
        seen.append(user)
        user.name = "changed"
        session.add(Role(id=2, user_id=0, name="of nobody"))
        if fails_in == "flush":
            try:
                await session.flush()
            except IntegrityError:
                raise Refusal(409) from None
        if fails_in == "block":
            async with atomic_db_session(world.db, "append"):
                await session.flush()
        return Reply()

    assert (await world.get(page)).status_code == (409 if fails_in == "flush" else 500)
    assert [line_of(user) for user in seen] == ["ada (admin)"]


async def test_a_log_behind_a_success_names_the_committed_user(world: World) -> None:
    seen: list[User] = []

    async def page() -> Reply:
        user = await (await db_session(world.db)).get_one(User, 1)
        seen.append(user)
        user.name = "grace"
        return Reply(line_of(user))

    assert (await world.get(page)).text == "grace (admin)"
    assert [line_of(user) for user in seen] == ["grace (admin)"]
    assert await world.database.query("SELECT name FROM users") == [("grace",)]
