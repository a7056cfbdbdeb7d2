"""What is used of SQLAlchemy beyond its public names: these tests fail where a version has changed it beneath ctxdb."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    AsyncSessionTransaction,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, SessionTransactionOrigin, mapped_column
from sqlalchemy.pool import StaticPool
from tests.support.database import Database

from ctxdb_core._sqlalchemy import private
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.sessions import DoorSession, DoorTransaction, GuardedSession, SessionFactory


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def session() -> Any:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def test_the_innermost_block_of_a_session_is_known_and_can_be_forgotten(session: Session) -> None:
    assert private.innermost_block(session) is None
    with session.begin() as transaction:
        assert private.innermost_block(session) is transaction
        with session.begin_nested() as savepoint:
            assert private.innermost_block(session) is savepoint
        session.connection()
        session.get_transaction().rollback()  # type: ignore[union-attr]  # there is one
        private.forget_block(session)
        assert session.scalar(text("SELECT 1")) == 1


def test_a_block_whose_transaction_is_open_is_not_forgotten(session: Session) -> None:
    with session.begin() as transaction:
        private.forget_block(session)
        assert private.innermost_block(session) is transaction


def test_a_session_says_that_it_is_flushing(session: Session) -> None:
    seen: list[bool] = []
    event.listen(session, "after_flush", lambda session, context: seen.append(private.is_flushing(session)))
    session.add(Thing(id=1))
    session.flush()
    assert seen == [True]
    assert not private.is_flushing(session)


def test_a_transaction_begun_without_a_statement_is_like_one_of_a_statement(session: Session) -> None:
    private.begin_without_statement(session)
    transaction = session.get_transaction()
    assert transaction is not None
    assert transaction.origin is SessionTransactionOrigin.AUTOBEGIN
    assert private.connections_of(transaction) == set()
    assert private.connections_of(transaction) != {session.connection()}
    assert private.connections_of(transaction) == {session.connection()}


def test_a_seeded_session_has_its_listeners_and_those_that_come_later(session: Session) -> None:
    private.seed_dispatch(session)
    seen: list[str] = []

    def note(*args: object) -> None:
        seen.append("class")

    event.listen(Session, "after_begin", note)
    try:
        event.listen(session, "after_begin", lambda *args: seen.append("session"))
        session.connection()
    finally:
        event.remove(Session, "after_begin", note)
    assert sorted(seen) == ["class", "session"]


def test_a_seeded_session_misses_no_event(session: Session) -> None:
    private.seed_dispatch(session)
    dispatch: Any = session.dispatch
    missing = [name for name in dispatch._event_names if name not in vars(dispatch)]
    assert missing == []


async def test_the_isolation_level_that_an_engine_connects_with_is_known() -> None:
    for level in (None, "AUTOCOMMIT"):
        options: dict[str, Any] = {} if level is None else {"isolation_level": level}
        engine = create_async_engine("postgresql+asyncpg://h/d", **options)
        assert private.isolation_level_on_connect(engine.dialect) == level


def test_the_pool_that_a_connection_goes_back_to_is_known(session: Session) -> None:
    connection: Connection = session.connection()
    other = create_engine("sqlite://").pool
    assert private.pool_of(connection.connection, other) is connection.engine.pool


@pytest.mark.parametrize("name", ["connect", "do_terminate", "raw_connection"])
async def test_a_replaced_method_is_the_one_that_sqlalchemy_calls(database: Database, name: str) -> None:
    calls: list[str] = []

    def noting(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    engine = create_async_engine(database.url)
    if name == "connect":
        private.replace_connect(engine.dialect, noting)
    elif name == "do_terminate":
        private.replace_terminate(engine.dialect, noting)
    else:
        private.replace_raw_connection(engine.sync_engine, noting)
    async with engine.connect() as connection:
        await connection.invalidate()
    await engine.dispose()
    assert calls == [name]


# --- the classes of sessions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library_class", "own_class"), [(AsyncSession, DoorSession), (AsyncSessionTransaction, DoorTransaction)]
)
def test_each_method_that_calls_into_sqlalchemy_passes_the_door(library_class: type, own_class: type) -> None:
    calling = {
        name
        for name, method in vars(library_class).items()
        if inspect.isfunction(method) and "greenlet_spawn" in method.__code__.co_names
    }
    assert {"commit", "rollback"} <= calling
    assert calling <= set(vars(own_class))


def test_a_derived_method_has_the_signature_of_the_original() -> None:
    for name in ("execute", "scalar", "get", "refresh", "run_sync", "commit"):
        assert inspect.signature(getattr(DoorSession, name)) == inspect.signature(getattr(AsyncSession, name))


async def test_a_session_that_was_ended_takes_no_object(database: Database) -> None:
    engine = create_async_engine(database.url)
    session = SessionFactory(async_sessionmaker(engine))()
    assert isinstance(session.sync_session, GuardedSession)
    door = session.sync_session.door = Door()

    def refuse() -> Any:
        raise LookupError

    door.end(refuse)
    with pytest.raises(LookupError):
        session.add(Thing(id=1))
    with pytest.raises(LookupError):
        await session.scalar(text("SELECT 1"))
    await engine.dispose()


async def test_a_pool_tells_how_many_tasks_wait_for_it(database: Database) -> None:
    engine = create_async_engine(database.url, pool_size=1, max_overflow=0)
    assert private.pool_numbers(engine.pool) == (0, 0, 0, 1)
    async with engine.connect():
        waiting = asyncio.create_task(_connect(engine))
        while private.pool_numbers(engine.pool).waiting == 0:
            await asyncio.sleep(0)
        assert private.pool_numbers(engine.pool) == (1, 0, 1, 1)
    await waiting
    assert private.pool_numbers(engine.pool) == (0, 1, 0, 1)
    await engine.dispose()


async def _connect(engine: AsyncEngine) -> None:
    async with engine.connect():
        pass


async def test_the_statements_and_commits_of_a_dialect_can_be_followed(database: Database) -> None:
    engine = create_async_engine(database.url)
    told: list[str] = []

    def follow(name: str) -> None:
        def around(original: Any, *args: Any, **kwargs: Any) -> None:
            told.append(name)
            original(*args, **kwargs)

        private.follow_dialect(engine.sync_engine.dialect, name, around)

    async with engine.connect() as connection:
        await connection.rollback()
        for name in ("do_execute", "do_commit", "do_rollback"):
            follow(name)
        await connection.execute(text("SELECT 1"))
        await connection.commit()
        await connection.execute(text("SELECT 1"))
        await connection.rollback()
    assert told[:4] == ["do_execute", "do_commit", "do_execute", "do_rollback"]
    await engine.dispose()
