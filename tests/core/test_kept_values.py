"""What objects show after a roll-back is never taken for what the database has."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import pytest
from sqlalchemy import JSON, ForeignKey, select, update
from sqlalchemy.exc import IntegrityError, MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    lazyload,
    make_transient,
    mapped_column,
    object_session,
    relationship,
)
from sqlalchemy.orm.exc import DetachedInstanceError, StaleDataError
from sqlalchemy.util import await_only
from tests.support.database import Database

from ctxdb_core import DBConnect, atomic_db_session, db_session, new_db_ctx, rollback_db_session, transactional
from ctxdb_core.adapters import begin, finalize


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Shop(Base):
    __tablename__ = "shop"
    id: Mapped[int] = mapped_column(primary_key=True)
    wares: Mapped[list[Ware]] = relationship(back_populates="shop", lazy="selectin", cascade="all, delete-orphan")


class Ware(Base):
    __tablename__ = "ware"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="tea")
    stock: Mapped[int] = mapped_column(default=10)
    tags: Mapped[dict[str, str]] = mapped_column(MutableDict.as_mutable(JSON), default=dict)
    shop_id: Mapped[int] = mapped_column(ForeignKey("shop.id"))
    shop: Mapped[Shop] = relationship(back_populates="wares", lazy="selectin")


class Till(Base):
    __tablename__ = "till"
    id: Mapped[int] = mapped_column(primary_key=True)
    money: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - as SQLAlchemy's documentation has it


@pytest.fixture
async def shop(db: DBConnect) -> AsyncIterator[DBConnect]:
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with new_db_ctx():
        wares = [Ware(id=1, tags={"colour": "green"}), Ware(id=2)]
        (await db_session(db)).add_all([Shop(id=1, wares=wares), Shop(id=2, wares=[]), Till(id=1, money=10)])
    yield db
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


async def _rolled_back_ware(db: DBConnect) -> tuple[AsyncSession, Ware]:
    session = await db_session(db)
    ware = await session.get_one(Ware, 1)
    await session.rollback()
    return session, ware


# --- reading ----------------------------------------------------------------------------------------------------------


async def _by_a_look_in_run_sync(session: AsyncSession, ware: Ware) -> int:
    return await session.run_sync(lambda session: ware.stock)


async def _by_get_in_run_sync(session: AsyncSession, ware: Ware) -> int:
    await session.run_sync(lambda session: session.get_one(Ware, 1))
    return ware.stock


async def _by_get_of_a_changed_object(session: AsyncSession, ware: Ware) -> int:
    ware.name = "coffee"
    await session.get_one(Ware, 1)
    return ware.stock


async def _by_awaitable_attrs(session: AsyncSession, ware: Ware) -> int:
    stock: int = await ware.awaitable_attrs.stock
    return stock


@pytest.mark.parametrize(
    "read", [_by_a_look_in_run_sync, _by_get_in_run_sync, _by_get_of_a_changed_object, _by_awaitable_attrs]
)
async def test_an_object_is_read_anew_after_a_roll_back_wherever_sqlalchemy_can_do_so(
    shop: DBConnect, database: Database, read: Callable[[AsyncSession, Ware], Awaitable[int]]
) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        await database.query("UPDATE ware SET stock = 99")
        assert await read(session, ware) == 99


async def test_a_collection_that_is_loaded_with_its_object_is_read_anew_with_it_after_a_roll_back(
    shop: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(shop)
        one = await session.get_one(Shop, 1)
        await session.rollback()
        await database.query("INSERT INTO ware VALUES (3, 'coffee', 1, '{}', 1)")
        assert await one.awaitable_attrs.id == 1
        assert len(one.wares) == 3


async def test_a_query_behind_a_roll_back_in_run_sync_reads_objects_anew(shop: DBConnect, database: Database) -> None:
    def sell(session: Session) -> None:
        assert session.scalars(select(Ware).where(Ware.id == 1)).one().stock == 10
        session.rollback()
        await_only(database.query("UPDATE ware SET stock = 99"))
        session.scalars(select(Ware).where(Ware.id == 1)).one().stock -= 1

    async with new_db_ctx():
        await (await db_session(shop)).run_sync(sell)
    assert await database.query("SELECT stock FROM ware WHERE id = 1") == [(98,)]


async def test_a_value_that_the_code_itself_has_overwritten_is_not_shown_after_a_roll_back(shop: DBConnect) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        await session.execute(update(Ware).values(stock=5))
        with pytest.raises(MissingGreenlet):
            ware.stock  # noqa: B018 - a look


async def test_an_object_is_found_when_an_update_by_the_orm_has_expired_what_was_kept_of_it(shop: DBConnect) -> None:
    async with new_db_ctx():
        session, _ = await _rolled_back_ware(shop)
        await session.execute(update(Ware).values(stock=5))
        ware = await session.run_sync(lambda session: session.get_one(Ware, 1))
        assert (ware.stock, ware.shop.id) == (5, 1)


async def test_what_an_update_by_the_orm_has_written_is_not_shown_after_its_roll_back_behind_another(
    shop: DBConnect,
) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        await session.execute(update(Ware).values(stock=5))
        await session.refresh(ware)
        assert ware.stock == 5
        await rollback_db_session(shop)
        assert ware.stock == 10


async def test_an_object_whose_row_is_gone_after_a_roll_back_is_not_found(shop: DBConnect, database: Database) -> None:
    async with new_db_ctx():
        session, _ = await _rolled_back_ware(shop)
        await database.query("DELETE FROM ware")
        assert await session.run_sync(lambda session: session.get(Ware, 1)) is None
        assert await session.get(Ware, 1) is None


async def test_an_object_that_was_written_without_a_transaction_does_not_show_what_it_was_before(
    shop: DBConnect,
) -> None:
    async with new_db_ctx():
        with pytest.raises(LookupError):
            async with transactional(shop, "not_supported"):
                written, other = [await (await db_session(shop)).get_one(Ware, number) for number in (1, 2)]
                written.name = "coffee"
                await (await db_session(shop)).flush()
                other.name = "lost"
                raise LookupError
    assert other.name == "tea"
    with pytest.raises(DetachedInstanceError):
        written.name  # noqa: B018 - a look


async def test_an_object_that_the_code_expires_after_a_roll_back_shows_nothing(shop: DBConnect) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        session.expire(ware)
        with pytest.raises(MissingGreenlet):
            ware.name  # noqa: B018 - a look


async def test_an_object_that_is_pickled_after_a_roll_back_is_readable(shop: DBConnect) -> None:
    async with new_db_ctx():
        _, ware = await _rolled_back_ware(shop)
        assert pickle.loads(pickle.dumps(ware)).name == "tea"


async def test_an_object_that_was_read_anew_after_a_roll_back_is_pickled_without_its_earlier_values(
    shop: DBConnect,
) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        await session.refresh(ware)
    assert b"ctxdb" not in pickle.dumps(ware)


def _expunge(ware: Ware) -> None:
    session = object_session(ware)
    assert session is not None
    session.expunge(ware)


@pytest.mark.parametrize("take_out", [make_transient, _expunge])
async def test_an_object_that_is_taken_out_of_its_session_after_a_roll_back_has_its_values(
    shop: DBConnect, take_out: Callable[[Ware], None]
) -> None:
    async with new_db_ctx():
        _, ware = await _rolled_back_ware(shop)
        take_out(ware)
        assert (ware.__dict__["name"], ware.__dict__["stock"]) == ("tea", 10)


async def test_objects_are_readable_after_one_roll_back_upon_another(shop: DBConnect) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        ware.name, ware.tags = "lost", {"lost": "yes"}
        session.add(Ware(id=2, shop_id=1))
        with pytest.raises(IntegrityError):
            await session.flush()
        await session.rollback()
        assert (ware.name, ware.stock, ware.tags, ware.shop.id) == ("tea", 10, {"colour": "green"}, 1)


async def test_objects_are_readable_where_one_is_changed_between_a_failed_flush_and_its_roll_back(
    shop: DBConnect,
) -> None:
    async with new_db_ctx():
        session = await db_session(shop)
        ware = await session.get_one(Ware, 1)
        session.add(Ware(id=2, shop_id=1))
        with pytest.raises(IntegrityError):
            await session.flush()
        ware.name = "lost"
        with pytest.warns(match="non-active"):
            await session.rollback()
        assert (ware.name, ware.stock) == ("tea", 10)


async def test_objects_are_readable_behind_their_unit_when_a_block_of_their_session_has_failed_to_roll_back(
    shop: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: object) -> NoReturn:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        async with new_db_ctx():
            session = await db_session(shop)
            async with session.begin():
                ware = await session.get_one(Ware, 1)
                dialect = (await session.connection()).sync_connection.dialect  # type: ignore[union-attr]
                monkeypatch.setattr(dialect, "do_rollback", fail)
                raise LookupError
    assert (ware.name, ware.stock) == ("tea", 10)


async def test_an_object_has_its_values_in_its_dict_once_the_unit_has_rolled_back(shop: DBConnect) -> None:
    unit = begin()
    assert unit is not None
    ware = await (await db_session(shop)).get_one(Ware, 1)
    await finalize(unit, commit=False, last=False)
    assert (ware.__dict__["name"], ware.__dict__["stock"]) == ("tea", 10)
    await finalize(unit, commit=False)


# --- writing ----------------------------------------------------------------------------------------------------------


async def _set(session: AsyncSession, ware: Ware) -> None:
    ware.name = "tea"


async def _merge(session: AsyncSession, ware: Ware) -> None:
    await session.merge(Ware(id=1, name="tea"))


@pytest.mark.parametrize("write", [_set, _merge])
@pytest.mark.parametrize("roll_back", [AsyncSession.rollback, None])
async def test_what_is_set_after_a_roll_back_is_written_also_if_it_is_what_had_been_loaded(
    shop: DBConnect,
    database: Database,
    write: Callable[[AsyncSession, Ware], Awaitable[None]],
    roll_back: Callable[[AsyncSession], Awaitable[None]] | None,
) -> None:
    async with new_db_ctx():
        session = await db_session(shop)
        ware = await session.get_one(Ware, 1)
        await (roll_back(session) if roll_back is not None else rollback_db_session(shop))
        await database.query("UPDATE ware SET name = 'coffee'")
        await write(session, ware)
    assert await database.query("SELECT name FROM ware WHERE id = 1") == [("tea",)]


async def _change_an_attribute(session: AsyncSession, ware: Ware) -> None:
    ware.stock -= 1


async def _change_a_container(session: AsyncSession, ware: Ware) -> None:
    ware.tags["size"] = "small"


async def _change_a_relationship(session: AsyncSession, ware: Ware) -> None:
    assert ware.shop.id == 1
    ware.shop = await session.get_one(Shop, 1)


_CHANGES = pytest.mark.parametrize("change", [_change_an_attribute, _change_a_container, _change_a_relationship])


@_CHANGES
@pytest.mark.parametrize("rolled_back_by", ["code", "response"])
async def test_a_change_of_what_was_seen_after_a_roll_back_is_refused_if_the_row_has_changed(
    shop: DBConnect,
    database: Database,
    change: Callable[[AsyncSession, Ware], Awaitable[None]],
    rolled_back_by: str,
) -> None:
    there = [(99, {"size": "large"}, 2)]
    unit = begin()
    assert unit is not None
    session = await db_session(shop)
    ware = await session.get_one(Ware, 1)
    await (session.rollback() if rolled_back_by == "code" else finalize(unit, commit=False, last=False))
    await database.query("""UPDATE ware SET stock = 99, tags = '{"size": "large"}', shop_id = 2 WHERE id = 1""")
    await change(session, ware)
    with pytest.raises(StaleDataError, match=r"Ware\.(stock|tags|shop_id): .*refresh"):
        await finalize(unit, commit=True)
    assert await _stored(shop) == there


@_CHANGES
async def test_a_change_of_what_was_seen_after_a_roll_back_is_written_if_the_row_has_that_still(
    shop: DBConnect, change: Callable[[AsyncSession, Ware], Awaitable[None]]
) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        await change(session, ware)
        seen = (ware.stock, dict(ware.tags), ware.shop.id)
    assert await _stored(shop) == [seen]


async def test_a_change_of_what_was_seen_after_a_roll_back_is_written_once_if_a_query_comes_before_the_commit(
    shop: DBConnect,
) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        ware.stock -= 1
        await session.scalars(select(Shop))
        assert not session.dirty
    assert [stock for stock, _, _ in await _stored(shop)] == [9]


async def _stored(db: DBConnect) -> list[tuple[Any, ...]]:
    async with new_db_ctx():
        columns = select(Ware.stock, Ware.tags, Ware.shop_id).where(Ware.id == 1)
        return [tuple(row) for row in await (await db_session(db)).execute(columns)]


async def test_what_is_written_behind_a_savepoint_that_was_rolled_back_heeds_other_transactions(
    shop: DBConnect, database: Database
) -> None:
    unit = begin()
    assert unit is not None
    session = await db_session(shop)
    wares = [await session.get_one(Ware, number) for number in (1, 2)]
    with pytest.raises(LookupError):
        async with session.begin_nested():
            for ware in wares:
                ware.stock = 5
            await session.flush()
            raise LookupError
    await database.query("UPDATE ware SET stock = 99")
    assert await wares[0].awaitable_attrs.stock == 99
    assert wares[1].stock == 10
    wares[1].stock = 9
    with pytest.raises(StaleDataError):
        await finalize(unit, commit=True)
    assert await database.query("SELECT stock FROM ware") == [(99,), (99,)]


async def test_a_change_in_place_that_was_rolled_back_is_not_written_with_a_later_one(shop: DBConnect) -> None:
    with pytest.raises(StaleDataError, match=r"Ware\.tags"):
        async with new_db_ctx():
            ware = await (await db_session(shop)).get_one(Ware, 1)
            with pytest.raises(LookupError):
                async with atomic_db_session(shop):
                    ware.tags["lost"] = "yes"
                    raise LookupError
            ware.tags["size"] = "small"
    assert await _stored(shop) == [(10, {"colour": "green"}, 1)]


async def test_a_roll_back_for_another_version_of_a_row_does_not_keep_the_version(
    shop: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(shop)
        till = await session.get_one(Till, 1)
        await database.query("UPDATE till SET version = 7")
        till.money = 5
        with pytest.raises(StaleDataError):
            await session.commit()
        await session.rollback()
        till.money = 5
    assert await database.query("SELECT money, version FROM till") == [(5, 8)]


async def test_a_deletion_after_a_roll_back_takes_children_along_that_others_have_added(
    shop: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(shop)
        one = await session.get_one(Shop, 1)
        await session.rollback()
        await database.query("INSERT INTO ware VALUES (3, 'coffee', 1, '{}', 1)")
        await session.delete(one)
    assert await database.query("SELECT id FROM ware") == []


async def test_a_child_that_is_taken_from_its_parent_after_a_roll_back_is_no_orphan_as_its_parent_is_not_loaded(
    shop: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(shop)
        one = await session.get_one(Shop, 1)
        await session.rollback()
        ware = (await session.scalars(select(Ware).where(Ware.id == 1).options(lazyload("*")))).one()
        assert one in session
        ware.shop = None  # type: ignore[assignment]  # what the database is to refuse
        with pytest.raises(IntegrityError):
            await session.flush()
        await session.rollback()
    assert await database.query("SELECT shop_id FROM ware WHERE id = 1") == [(1,)]


async def test_a_child_that_is_added_after_a_roll_back_is_seen_with_those_that_had_been_loaded(
    shop: DBConnect, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(shop)
        one = await session.get_one(Shop, 1)
        await session.rollback()
        session.add(Ware(id=3, shop=one))
        assert [ware.id for ware in one.wares] == [1, 2, 3]
    assert await database.query("SELECT shop_id FROM ware WHERE id = 3") == [(1,)]


@pytest.mark.parametrize("synchronize", ["auto", False])
async def test_a_value_that_was_seen_after_a_roll_back_gives_way_to_what_an_update_by_the_orm_writes(
    shop: DBConnect, *, synchronize: str | bool
) -> None:
    async with new_db_ctx():
        session, ware = await _rolled_back_ware(shop)
        # The other columns are still kept beside the object.
        assert ware.stock == 10
        await session.execute(update(Ware).values(stock=5).execution_options(synchronize_session=synchronize))
        found = await session.get_one(Ware, 1)
        assert found is ware
        assert ware.stock == 5
        await rollback_db_session(shop)
        assert ware.stock == 10
