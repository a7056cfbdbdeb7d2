"""What is used of SQLAlchemy beyond its public names: these tests fail where a version has changed it beneath ctxdb."""

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import Connection, ForeignKey, create_engine, event, select, text
from sqlalchemy.engine import ChunkedIteratorResult
from sqlalchemy.exc import IntegrityError, SAWarning
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    AsyncSessionTransaction,
    async_object_session,
    async_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    PassiveFlag,
    Session,
    SessionTransaction,
    SessionTransactionOrigin,
    mapped_column,
    object_session,
    relationship,
)
from sqlalchemy.orm.attributes import flag_modified, instance_state
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool, StaticPool
from sqlalchemy.util import greenlet_spawn
from tests.support.database import Database, eventually

from ctxdb_core import DBConnect, db_session, new_db_ctx
from ctxdb_core._sqlalchemy import private
from ctxdb_core._sqlalchemy.cursors import follow_cursors
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.door_session import DoorSession, DoorTransaction
from ctxdb_core._sqlalchemy.guarded_session import GuardedSession
from ctxdb_core._sqlalchemy.session_factory import SessionFactory


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"

    id: Mapped[int] = mapped_column(primary_key=True)
    parts: Mapped[list[Part]] = relationship(back_populates="thing")


class Part(Base):
    __tablename__ = "parts"

    id: Mapped[int] = mapped_column(primary_key=True)
    thing_id: Mapped[int | None] = mapped_column(ForeignKey("things.id"))
    thing: Mapped[Thing | None] = relationship(back_populates="parts")


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


def test_a_query_tells_whether_a_flush_comes_before_it(session: Session) -> None:
    seen: list[bool] = []
    event.listen(session, "do_orm_execute", lambda query: seen.append(private.flushes_before(query)))
    session.scalars(select(Thing))
    session.scalars(select(Thing), execution_options={"autoflush": False})
    with session.no_autoflush:
        session.scalars(select(Thing))
    event.listen(session, "after_flush", lambda session, context: session.scalars(select(Thing)))
    session.add(Thing(id=1))
    session.flush()
    assert seen == [True, False, False, False]


def test_a_savepoint_says_which_objects_were_changed_behind_it(session: Session) -> None:
    thing = Thing(id=1)
    session.add(thing)
    session.flush()
    with session.begin_nested() as savepoint:
        assert not private.changed_in(savepoint)
        thing.id = 2
        session.flush()
        assert list(private.changed_in(savepoint)) == [instance_state(thing)]


def test_a_session_says_whether_it_has_to_flush(session: Session) -> None:
    assert not private.has_to_flush(session)
    session.add(Thing(id=1))
    assert private.has_to_flush(session)


def test_a_session_knows_that_it_has_committed_although_a_listener_has_failed(session: Session) -> None:
    event.listen(session, "after_commit", lambda session: 1 / 0)
    session.add(Thing())
    session.flush()
    assert not private.has_committed(session)
    with pytest.raises(ZeroDivisionError):
        session.commit()
    assert private.has_committed(session)
    session.close()
    assert not private.has_committed(session)


def test_a_session_says_that_it_is_committing(session: Session) -> None:
    seen: list[bool] = []
    event.listen(session, "before_commit", lambda session: seen.append(private.is_committing(session)))
    event.listen(
        session.get_bind(),
        "commit",
        lambda connection: seen.append(private.is_committing(session)),
    )
    session.add(Thing())
    session.commit()
    assert seen == [False, True]
    assert not private.is_committing(session)


@pytest.mark.parametrize("has_savepoint", [False, True])
def test_a_session_tells_of_a_roll_back_before_it_expires_its_objects(session: Session, has_savepoint: bool) -> None:
    loaded: list[bool] = []

    class Telling(Session):
        def _expunge_states(self, states: Any, to_transient: bool = False) -> None:
            loaded.append(to_transient and "id" in thing.__dict__)
            super()._expunge_states(states, to_transient)

    with Telling(session.get_bind()) as telling, telling.begin():
        telling.add(thing := Thing(id=1))
        telling.flush()
        with telling.begin_nested() if has_savepoint else nullcontext() as savepoint:
            if has_savepoint:
                flag_modified(thing, "id")
                telling.flush()
            (telling if savepoint is None else savepoint).rollback()
    assert loaded == [True]


def test_a_savepoint_knows_the_error_of_the_flush_that_has_undone_it(session: Session) -> None:
    with session.begin(), session.begin_nested() as savepoint:
        assert private.error_that_has_undone(savepoint) is None
        session.add_all([Thing(id=1), Thing(id=1)])
        with pytest.raises(IntegrityError) as caught:
            session.flush()
        assert private.error_that_has_undone(savepoint) is caught.value
    assert private.error_that_has_undone(savepoint) is None


def test_a_transaction_can_end_without_a_loss_of_what_was_not_flushed(session: Session) -> None:
    changed, deleted, added = Thing(id=1), Thing(id=2), Thing(id=3)
    session.add_all([changed, deleted])
    session.commit()
    assert (changed.id, deleted.id) == (1, 2)
    session.begin_nested()
    session.add(added)
    session.delete(deleted)
    changed.id = 4
    private.end_without_restoring(session)
    assert not session.in_transaction()
    assert changed in session.dirty
    assert deleted in session.deleted
    assert added in session.new
    session.commit()
    assert session.scalars(select(Thing.id).order_by(Thing.id)).all() == [3, 4]


def test_a_session_is_at_rest_until_an_object_is_added_changed_or_deleted_or_a_transaction_begins(
    session: Session,
) -> None:
    assert private.is_at_rest(session)
    thing = Thing(id=1)
    session.add(thing)
    assert not private.is_at_rest(session)
    session.commit()
    assert private.is_at_rest(session)
    session.begin()
    assert not private.is_at_rest(session)
    session.rollback()
    assert private.is_at_rest(session)
    # An object is marked as changed without a transaction, as by a change in the middle of a COMMIT.
    private.changed_states(session).add(instance_state(thing))
    assert not private.is_at_rest(session)
    assert private.has_to_flush(session)


def test_a_session_keeps_its_changed_and_its_pending_objects(session: Session) -> None:
    thing = Thing(id=1)
    session.add(thing)
    state = instance_state(thing)
    assert list(private.pending_states(session)) == [state]
    session.flush()
    assert private.changed_states(session) == set()
    thing.id = 2
    assert private.changed_states(session) == {state}
    private.changed_states(session).discard(state)
    assert not session.identity_map.check_modified()


def test_a_session_warns_of_objects_that_are_added_while_it_flushes(session: Session) -> None:
    session.add(Thing(id=1))
    assert private.set_warning_of_changes(session, enabled=True) is False
    with pytest.warns(SAWarning, match="within the execution stage of the flush"):
        session.add(Thing(id=2))
    assert private.set_warning_of_changes(session, enabled=False) is True
    session.add(Thing(id=3))


def test_each_way_to_begin_a_transaction_calls_one_method_of_the_session(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[SessionTransaction] = []

    class Begun(Session):
        def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
            begun.append(super()._autobegin_t(begin))
            return begun[-1]

    monkeypatch.setattr(session, "__class__", Begun)
    for begin in (session.connection, session.begin, session.begin_nested, lambda: session.add(Thing(id=1))):
        begun.clear()
        begin()
        assert begun, f"{begin} has not called it"
        session.rollback()


def test_a_transaction_begun_without_a_statement_is_like_a_transaction_begun_by_a_statement(session: Session) -> None:
    private.begin_without_statement(session)
    transaction = session.get_transaction()
    assert transaction is not None
    assert transaction.origin is SessionTransactionOrigin.AUTOBEGIN
    assert private.connections_of(transaction) == set()
    assert private.connections_of(transaction) != {session.connection()}
    assert private.connections_of(transaction) == {session.connection()}


def test_a_relationship_asks_its_session_for_the_object_before_it_is_loaded_or_set(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.add(Part(id=1, thing=Thing(id=1)))
    session.commit()
    thing, part = session.get_one(Thing, 1), session.get_one(Part, 1)
    asked: list[bool] = []

    class Asked(Session):
        def _identity_lookup(self, *args: Any, **options: Any) -> Any:
            assert options["lazy_loaded_from"] is instance_state(part)
            asked.append(bool(options["passive"] & PassiveFlag.SQL_OK))
            return super()._identity_lookup(*args, **options)

    monkeypatch.setattr(session, "__class__", Asked)
    assert part.thing is thing
    session.expire(part, ["thing"])
    part.thing = None
    assert asked == [True, False]


def test_a_seeded_session_has_its_listeners_and_later_listeners(session: Session) -> None:
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


def test_a_seeded_session_misses_no_frequent_event(session: Session) -> None:
    private.seed_dispatch(session)
    dispatch: Any = session.dispatch
    for name in private._FREQUENT_EVENTS:
        # SQLAlchemy looks for the listeners in this way, without the Python method that makes missing ones.
        object.__getattribute__(dispatch, name)


@pytest.mark.parametrize(
    "settings", [{}, {"expire_on_commit": False, "autoflush": False}, {"join_transaction_mode": "create_savepoint"}]
)
async def test_sessions_of_a_pattern_are_like_constructed_sessions(settings: dict[str, Any]) -> None:
    maker = async_sessionmaker(create_async_engine("sqlite+aiosqlite://"), **settings)
    pattern = private.SessionPattern.of(maker)
    assert pattern is not None
    copied, constructed = pattern(), maker()
    for one, other in ((copied, constructed), (copied.sync_session, constructed.sync_session)):
        values, others = vars(one), vars(other)
        assert type(one) is type(other)
        assert values.keys() - {"dispatch"} == others.keys()
        assert {name: type(value) for name, value in values.items() if name in others} == {
            name: type(value) for name, value in others.items()
        }


async def test_sessions_are_constructed_where_sqlalchemy_lacks_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_FREQUENT_EVENTS", (*private._FREQUENT_EVENTS, "after_something_new"))
    maker = async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))
    private.seed_dispatch(maker().sync_session)
    assert private.SessionPattern.of(maker) is None


async def test_sessions_of_a_pattern_have_all_that_changes_for_themselves() -> None:
    pattern = private.SessionPattern.of(async_sessionmaker(create_async_engine("sqlite+aiosqlite://")))
    assert pattern is not None
    first, second = pattern(), pattern()
    thing = Thing(id=1)
    first.add(thing)
    assert (list(first.new), list(second.new)) == ([thing], [])
    assert object_session(thing) is first.sync_session
    assert async_object_session(thing) is first
    assert async_session(second.sync_session) is second
    first.info["own"] = True
    assert second.info == {}
    assert first.identity_map is not second.identity_map
    first.expunge(thing)


async def test_a_listener_of_one_connection_is_not_called_for_another() -> None:
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=NullPool)
    private.replace_connection_class(engine.sync_engine)
    seen: list[str] = []
    async with engine.connect() as first, engine.connect() as second:
        event.listen(first.sync_connection, "before_cursor_execute", lambda *args: seen.append("first"))
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: seen.append("engine"))
        await second.execute(text("SELECT 1"))
        assert seen == ["engine"]
        await first.execute(text("SELECT 1"))
    assert sorted(seen) == ["engine", "engine", "first"]
    await engine.dispose()


async def test_a_listener_of_all_connections_is_called_for_connections_of_a_taught_engine_as_for_others() -> None:
    plain, taught = create_async_engine("sqlite+aiosqlite://"), create_async_engine("sqlite+aiosqlite://")
    private.replace_connection_class(taught.sync_engine)
    seen: list[str] = []

    def note(connection: Connection, *args: object) -> None:
        seen.append(str(args[1]))

    event.listen(Connection, "before_cursor_execute", note)
    try:
        for engine in (plain, taught):
            # SQLAlchemy 2.0 calls the listeners of the class where the engine has some.
            event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: None)
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
            await engine.dispose()
    finally:
        event.remove(Connection, "before_cursor_execute", note)
    assert seen == ["SELECT 1"] * 2


async def test_a_connection_whose_listener_fails_goes_back_to_the_pool() -> None:
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)
    failure = ValueError("of the listener")

    def fail(connection: Connection) -> None:
        raise failure

    event.listen(engine.sync_engine, "engine_connect", fail)
    private.replace_connection_class(engine.sync_engine)
    with pytest.raises(ValueError, match="of the listener") as caught:
        await engine.connect()
    # The traceback of the error keeps what the listener was given.
    assert caught.value is failure
    pool: Any = engine.pool
    assert pool.checkedout() == 0
    await engine.dispose()


def test_an_engine_with_an_isolation_level_has_a_listener_that_sets_it() -> None:
    engine = create_engine("sqlite://").execution_options(isolation_level="AUTOCOMMIT")
    private.replace_connection_class(engine)
    assert engine._connection_cls is private.ListenedConnection


async def test_an_engine_keeps_a_connection_class_of_its_own() -> None:
    class OwnConnection(Connection):
        pass

    engine = create_async_engine("sqlite+aiosqlite://")
    engine.sync_engine._connection_cls = OwnConnection
    private.replace_connection_class(engine.sync_engine)
    async with engine.connect() as connection:
        assert type(connection.sync_connection) is OwnConnection
    await engine.dispose()


async def test_an_engine_with_dictionaries_of_its_own_is_as_it_was() -> None:
    engine = create_async_engine("sqlite+aiosqlite://", logging_name="own")
    before, pool_before = dict(vars(engine.sync_engine)), dict(vars(engine.pool))
    private.give_own_dictionaries(engine.sync_engine)
    assert (vars(engine.sync_engine), vars(engine.pool)) == (before, pool_before)
    assert engine.sync_engine.logging_name == "own"
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
    await engine.dispose()


class Marked(AsyncSession):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mark = object()


async def test_a_factory_makes_what_the_session_maker_says_now() -> None:
    engines = [create_async_engine("sqlite+aiosqlite://") for _ in range(2)]
    maker = async_sessionmaker(engines[0])
    factory = SessionFactory(maker)
    assert [factory().bind for _ in range(2)] == engines[:1] * 2
    maker.configure(bind=engines[1], expire_on_commit=False)
    assert [factory().bind for _ in range(2)] == engines[1:] * 2
    assert not factory().sync_session.expire_on_commit
    assert factory(expire_on_commit=True).sync_session.expire_on_commit


async def test_a_factory_sees_what_is_added_to_an_option_of_the_session_maker() -> None:
    info: dict[str, Any] = {}
    factory = SessionFactory(async_sessionmaker(create_async_engine("sqlite+aiosqlite://"), info=info))
    assert factory().info == {}
    info["added"] = True
    assert factory().info == {"added": True}


async def test_a_factory_calls_the_constructors_of_the_users_classes() -> None:
    factory = SessionFactory(async_sessionmaker(create_async_engine("sqlite+aiosqlite://"), class_=Marked))
    assert len({factory().mark for _ in range(3)}) == 3  # type: ignore[attr-defined]  # it is a `Marked`


async def test_sessions_of_a_factory_have_an_info_of_their_own() -> None:
    factory = SessionFactory(async_sessionmaker(create_async_engine("sqlite+aiosqlite://"), info={"given": 1}))
    first, second = factory(), factory()
    first.info["own"] = True
    assert (second.info, factory().info) == ({"given": 1}, {"given": 1})


@pytest.mark.parametrize("rows_at_once", [None, 1, 2])
def test_the_parts_of_a_result_can_be_followed(session: Session, rows_at_once: int | None) -> None:
    def follow(parts: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        for part in parts:
            sizes.append(len(part))
            yield part

    sizes: list[int] = []
    session.add_all([Thing(id=number) for number in range(3)])
    session.flush()
    options = {} if rows_at_once is None else {"yield_per": rows_at_once}
    result = session.execute(select(Thing).order_by(Thing.id), execution_options=options)
    assert isinstance(result, ChunkedIteratorResult)
    private.follow_parts(result, follow)
    assert [thing.id for thing in result.scalars()] == [0, 1, 2]
    assert sizes == {None: [3], 1: [1, 1, 1], 2: [2, 1]}[rows_at_once]


def test_savepoints_are_numbered(session: Session) -> None:
    seen: list[int] = []
    connection = session.connection()
    event.listen(
        connection, "rollback_savepoint", lambda conn, name, context: seen.append(private.number_of_savepoint(name))
    )
    assert private.savepoints_set_on(connection) == 0
    for _ in range(2):
        connection.begin_nested().rollback()
    assert (private.savepoints_set_on(connection), seen) == (2, [1, 2])


def test_each_pool_gets_a_listener_once_although_others_had_its_place_in_memory() -> None:
    heard: list[object] = []

    def listener(dbapi_connection: object, record: object) -> None:
        heard.append(dbapi_connection)

    pools = []
    for number in range(1, 301):
        pool: Pool = create_engine("sqlite://", poolclass=QueuePool).pool
        private.listen_once(pool, "checkin", listener)
        # What `Engine.dispose` does: the first pool goes, and another one may take its place in memory.
        pool = pool.recreate()
        private.listen_once(pool, "checkin", listener)
        pool.connect().close()
        pool.dispose()
        assert len(heard) == number
        pools.append(pool)


async def test_the_isolation_level_that_an_engine_connects_with_is_known() -> None:
    for level in (None, "AUTOCOMMIT"):
        options: dict[str, Any] = {} if level is None else {"isolation_level": level}
        engine = create_async_engine("postgresql+asyncpg://h/d", **options)
        assert private.isolation_level_on_connect(engine.dialect) == level


def test_the_pool_that_a_connection_goes_back_to_is_known(session: Session) -> None:
    connection: Connection = session.connection()
    other = create_engine("sqlite://").pool
    assert private.pool_of(connection.connection, other) is connection.engine.pool


@pytest.mark.parametrize("name", ["connect", "do_commit", "do_terminate", "raw_connection", "set_isolation_level"])
async def test_a_replaced_method_is_the_one_that_sqlalchemy_calls(database: Database, name: str) -> None:
    calls: list[str] = []

    def noting(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    level = {"isolation_level": "AUTOCOMMIT"} if name == "set_isolation_level" else {}
    engine = create_async_engine(database.url, **level)
    if name == "connect":
        private.replace_connect(engine.dialect, noting)
    elif name == "do_commit":
        private.replace_commit(engine.dialect, noting)
    elif name == "set_isolation_level":
        private.replace_isolation_level(engine.dialect, noting)
    elif name == "do_terminate":
        private.replace_terminate(engine.dialect, noting)
    else:
        private.replace_raw_connection(engine.sync_engine, noting)
    async with engine.connect() as connection:
        if name == "do_commit":
            # The first connection of an engine is asked for the server's version, in a transaction of its own.
            calls.clear()
            await connection.begin()
            await connection.commit()
        await connection.invalidate()
    await engine.dispose()
    assert calls == [name]


async def test_the_transport_of_a_connection_of_asyncpg_has_its_socket(connection: AsyncConnection) -> None:
    raw: Any = await connection.get_raw_connection()
    transport = private.transport_of(raw.driver_connection)
    assert transport is not None
    assert transport.get_extra_info("socket").fileno() > 0
    assert not transport.is_closing()


async def test_adapters_of_asyncpg_begin_as_they_are_told_and_can_change_their_connections(database: Database) -> None:
    begun: list[Any] = []

    async def begin(adapter: Any, start: Any) -> None:
        begun.append(adapter)
        await start()

    handed_out: list[Any] = []
    engine = create_async_engine(database.url)
    async with engine.connect() as first, engine.connect() as second:
        adapter: Any = (await first.get_raw_connection()).dbapi_connection
        other: Any = (await second.get_raw_connection()).dbapi_connection
        connections = adapter.driver_connection, other.driver_connection
        private.swap_asyncpg_connections(adapter, other)
        assert (other.driver_connection, adapter.driver_connection) == connections
        pid = adapter.driver_connection.get_server_pid()
        adapter.__class__ = private.asyncpg_adapter_that_begins(type(adapter), begin, handed_out.append)
        assert await first.scalar(text("SELECT pg_backend_pid()")) == pid
        assert begun == [adapter]
        assert not handed_out
        assert adapter.driver_connection.get_server_pid() == pid
        assert handed_out == [adapter]
    await engine.dispose()


async def test_the_pool_hands_out_another_object_at_each_check_out_and_its_record_refers_to_it(
    database: Database,
) -> None:
    engine = create_async_engine(database.url)
    handed_out: list[Any] = []
    for _ in range(2):
        async with engine.connect() as connection:
            fairy: Any = await connection.get_raw_connection()
            pooled = fairy._connection_record
            assert pooled.fairy_ref() is fairy
            handed_out.append(fairy)
    assert handed_out[0] is not handed_out[1]
    assert pooled.fairy_ref is None
    await engine.dispose()


async def test_a_row_of_asyncpg_is_fetched_without_a_cursor_and_its_errors_are_those_of_sqlalchemy(
    connection: AsyncConnection,
) -> None:
    adapted: Any = (await connection.get_raw_connection()).dbapi_connection
    assert (await greenlet_spawn(private.fetch_asyncpg_row, adapted, "SELECT 1"))[0] == 1
    assert await greenlet_spawn(private.fetch_asyncpg_row, adapted, "SELECT 1 WHERE false") is None
    with pytest.raises(connection.dialect.loaded_dbapi.ProgrammingError) as raised:
        await greenlet_spawn(private.fetch_asyncpg_row, adapted, "SELECT nothing")
    assert raised.value.sqlstate == "42703"


async def test_a_task_that_waits_for_a_pool_is_let_in_when_another_task_could_not_connect(database: Database) -> None:
    engine = create_async_engine(database.url, pool_size=1, max_overflow=0)
    async with engine.connect():
        waiting = asyncio.create_task(_use(engine))
        await eventually(lambda: bool(engine.pool._pool._queue._getters), "no task waits for a connection")  # type: ignore[attr-defined]  # what is tested
        private.pass_on_failed_connect(engine.pool)
        # The one connection is in use: there is no place.
        assert not waiting.done()
    await waiting
    private.pass_on_failed_connect(engine.pool)
    await engine.dispose()


async def test_connections_that_fail_at_once_while_more_tasks_wait_take_no_place_in_the_pool(
    database: Database,
) -> None:
    goes_on = asyncio.Event()

    async def fail(**arguments: Any) -> Any:
        await goes_on.wait()
        raise OSError

    connect_args = {"async_creator_fn": fail}
    engine = create_async_engine(database.url, connect_args=connect_args, pool_size=1, max_overflow=1)
    db = DBConnect.from_engine(engine)

    async def use() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))

    uses = [asyncio.create_task(use()) for _ in range(5)]
    await eventually(
        lambda: sum(each.waiting for each in db.status().pools) == 3, "the pool does not let three tasks wait"
    )
    goes_on.set()
    assert [type(each) for each in await asyncio.gather(*uses, return_exceptions=True)] == [OSError] * 5
    assert db.status().pools[0].in_use == 0
    await db.close()


async def _use(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


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
    # Its own methods come before those, and call them.
    assert calling <= set(vars(own_class.__mro__[1]))


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


async def test_derived_classes_go_with_their_session_maker(database: Database) -> None:
    engine = create_async_engine(database.url)

    def make() -> weakref.ref[type]:
        class Own(AsyncSession):
            pass

        return weakref.ref(type(SessionFactory(async_sessionmaker(engine, class_=Own))()))

    known = make()
    gc.collect()
    assert known() is None
    await engine.dispose()


@pytest.fixture
async def connection(database: Database) -> Any:
    engine = create_async_engine(database.url)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


async def test_a_transaction_of_asyncpg_begins_before_its_first_statement(connection: AsyncConnection) -> None:
    await connection.begin()
    await connection.run_sync(private.begin_asyncpg_transaction)
    await connection.run_sync(private.begin_asyncpg_transaction)
    raw = await connection.get_raw_connection()
    assert raw.driver_connection is not None
    assert raw.driver_connection.is_in_transaction()
    await connection.rollback()
    assert not raw.driver_connection.is_in_transaction()


async def test_the_server_is_asked_to_stop_a_query_of_asyncpg(connection: AsyncConnection) -> None:
    driver_connection: Any = (await connection.get_raw_connection()).driver_connection
    running = asyncio.create_task(driver_connection.execute("SELECT pg_sleep(600)"))
    while not running.done():
        private.request_asyncpg_cancellation(driver_connection)
        await asyncio.wait([running], timeout=0.1)
    with pytest.raises(asyncpg.QueryCanceledError):
        await running


async def test_a_lent_connection_of_asyncpg_is_taken_back_with_what_it_has_made(connection: AsyncConnection) -> None:
    await connection.execute(text("SELECT 1"))
    raw = await connection.get_raw_connection()
    lent = private.lend_asyncpg_connection(raw.driver_connection)
    prepared = await lent.prepare("SELECT 1")
    assert await prepared.fetchval() == 1
    await connection.rollback()
    private.take_back_asyncpg_connection(lent)
    private.take_back_asyncpg_connection(lent)
    private.forget_prepared_statements(raw.dbapi_connection)
    for use in (prepared.fetchval, lambda: lent.execute("SELECT 1")):
        with pytest.raises(asyncpg.InterfaceError, match="released"):
            await use()
    assert await connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_stand_in_of_psycopgs_connection_shares_its_state_until_it_is_taken_back(
    connection: AsyncConnection,
) -> None:
    own: Any = (await connection.get_raw_connection()).driver_connection
    loan = private.lend_psycopg_connection(own)
    cursor = await loan.execute("SELECT 1")
    assert await cursor.fetchone() == (1,)
    assert own.info.transaction_status == loan.info.transaction_status
    private.take_back_psycopg_connection(loan)
    with pytest.raises(psycopg.InterfaceError):
        await loan.execute("SELECT 1")
    with pytest.raises(psycopg.InterfaceError):
        await cursor.execute("SELECT 1")
    assert not own.closed


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
@pytest.mark.parametrize("streams", [False, True])
async def test_the_first_statement_of_psycopgs_adapter_can_be_executed_on_the_connection_of_another(
    database: Database, streams: bool
) -> None:
    executed: list[Any] = []
    fresh: list[Any] = []

    def execute(first: private.FirstStatement) -> Any:
        sent_before = first.may_have_been_sent
        mine = first.connection
        first.swap_connections(fresh[0])
        assert fresh[0].driver_connection is mine
        executed.append(first)
        result = first.execute()
        assert (sent_before, first.may_have_been_sent) == (False, True)
        return result

    engine = create_async_engine(database.url, isolation_level="REPEATABLE READ")
    async with engine.connect() as first, engine.connect() as second:
        adapter = (await first.get_raw_connection()).dbapi_connection
        other = (await second.get_raw_connection()).dbapi_connection
        assert adapter is not None
        assert other is not None
        fresh.append(other)
        pid = other.driver_connection.info.backend_pid
        plain = type(adapter)
        adapter.__class__ = private.psycopg_adapter_that_executes(plain, execute)
        query = text("SELECT pg_backend_pid(), current_setting('transaction_isolation')")
        if streams:
            async with first.stream(query) as rows:
                assert await rows.all() == [(pid, "repeatable read")]
        else:
            assert (await first.execute(query)).all() == [(pid, "repeatable read")]
        assert type(adapter) is plain
        await first.execute(text("SELECT 1"))
        assert len(executed) == 1
    await engine.dispose()


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_connection_of_psycopg_stops_a_cancelled_query_as_it_is_told(
    connection: AsyncConnection, database: Database
) -> None:
    stopped: list[Any] = []

    async def stop(connection: Any) -> None:
        stopped.append(connection)
        connection.pgconn.finish()
        raise asyncio.CancelledError

    own: Any = (await connection.get_raw_connection()).driver_connection
    own.__class__ = private.psycopg_connection_that_stops(type(own), stop)
    assert isinstance(own, psycopg.AsyncConnection)
    waiting = asyncio.create_task(own.execute("SELECT pg_sleep(60)"))
    await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert stopped == [own]
    database.terminate_backends("query ~ 'pg_sleep'")


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_connection_of_psycopg_can_be_used_once_the_answer_to_its_cancelled_query_was_read(
    connection: AsyncConnection, database: Database
) -> None:
    async def stop(connection: Any) -> None:
        await connection.cancel_safe()
        await private.read_psycopg_answer(connection)

    own: Any = (await connection.get_raw_connection()).driver_connection
    own.__class__ = private.psycopg_connection_that_stops(type(own), stop)
    waiting = asyncio.create_task(own.execute("SELECT pg_sleep(60)"))
    await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await own.rollback()
    assert await (await own.execute("SELECT 1")).fetchone() == (1,)


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_pipeline_of_psycopg_that_is_interrupted_while_it_begins_raises_the_interruption(
    connection: AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(psycopg.waiting, "MAX_BUSY_TIME"):
        pytest.skip("this psycopg begins a pipeline without waiting")
    # Each operation of psycopg waits for the event loop.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", 0.0)

    async def stop(connection: Any) -> None:
        raise AssertionError

    own: Any = (await connection.get_raw_connection()).driver_connection
    own.__class__ = private.psycopg_connection_that_stops(type(own), stop)

    async def begin() -> None:
        async with own._pipeline_nolock():
            raise AssertionError

    task = asyncio.create_task(begin())
    # The task begins, and waits for the first time.
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # psycopg does not end this pipeline any more.
    await own.close()


@pytest.mark.parametrize("database_kind", ["psycopg"], indirect=True)
async def test_a_cursor_of_psycopg_is_closed_without_its_server(connection: AsyncConnection) -> None:
    result: Any = await connection.stream(text("SELECT 1"))
    cursor = result._real_result.cursor
    private.close_psycopg_cursor(cursor)
    assert cursor._cursor.closed


async def test_the_result_of_a_cursor_on_the_server_asks_its_execution_for_a_strategy(database: Database) -> None:
    engine = create_async_engine(database.url)
    follow_cursors(engine)
    async with engine.connect() as connection, connection.stream(text("SELECT generate_series(1, 9)")) as rows:
        assert isinstance(rows._real_result.cursor_strategy, private.BufferedRowCursorFetchStrategy)  # type: ignore[attr-defined]
        assert type(rows._real_result.cursor_strategy).__name__ == "ServerCursor"  # type: ignore[attr-defined]
        assert len(await rows.all()) == 9
    await engine.dispose()


async def test_a_pool_hands_out_the_class_that_a_lent_connection_is_derived_from(connection: AsyncConnection) -> None:
    assert type(await connection.get_raw_connection()) is private.ConnectionFairy


async def test_a_pool_tells_how_many_tasks_wait_for_it(database: Database) -> None:
    engine = create_async_engine(database.url, pool_size=1, max_overflow=0)
    assert private.pool_numbers(engine.pool) == (0, 0, 0, 1, 1)
    async with engine.connect():
        waiting = asyncio.create_task(_connect(engine))
        while private.pool_numbers(engine.pool).waiting == 0:
            await asyncio.sleep(0)
        assert private.pool_numbers(engine.pool) == (1, 0, 1, 1, 1)
    await waiting
    assert private.pool_numbers(engine.pool) == (0, 1, 0, 1, 1)
    await engine.dispose()


async def test_a_copied_engine_takes_connections_from_its_own_pool(database: Database) -> None:
    engine = create_async_engine(database.url)
    private.replace_raw_connection(engine.sync_engine, lambda take: take())
    copied = AsyncEngine(private.copy_engine(engine.sync_engine))
    async with copied.connect():
        assert [private.pool_numbers(each.pool).in_use for each in (copied, engine)] == [1, 0]
    await copied.dispose()
    await engine.dispose()


async def test_an_engine_has_several_followers_of_its_connections(database: Database) -> None:
    engine = create_async_engine(database.url)
    told: list[str] = []

    def follow(name: str) -> None:
        def around(original: Any) -> Any:
            told.append(name)
            return original()

        private.follow_raw_connection(engine.sync_engine, around)

    follow("inner")
    follow("outer")
    await _connect(engine)
    assert told == ["outer", "inner"]
    await engine.dispose()


async def test_a_listener_can_come_before_older_listeners(database: Database) -> None:
    engine = create_async_engine(database.url)
    told: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: told.append("older"))
    private.listen_first(engine.sync_engine, "before_cursor_execute", lambda *args: told.append("younger"))
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    assert told == ["younger", "older"]
    await engine.dispose()


async def _connect(engine: AsyncEngine) -> None:
    async with engine.connect():
        pass


async def test_a_method_of_a_dialect_can_be_wrapped_by_a_closure(database: Database) -> None:
    engine = database.watch_new()
    told: list[str] = []

    def wrap(original: Any) -> Any:
        def execute(cursor: Any, statement: str, *args: Any) -> None:
            told.append(statement)
            original(cursor, statement, *args)

        return execute

    async with engine.connect() as connection:
        private.wrap_in_dialect(engine.sync_engine.dialect, "do_execute", wrap)
        await connection.execute(text("SELECT 1"))
    await engine.dispose()
    assert told == ["SELECT 1"]


async def test_the_context_of_a_statement_leads_to_what_the_events_of_the_pool_call_the_connection(
    database: Database,
) -> None:
    engine = database.watch_new()
    taken: list[object] = []
    found: list[object] = []
    event.listen(engine.sync_engine, "checkout", lambda connection, entry, proxy: taken.append(connection))

    def around(original: Any, cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        found.append(private.connection_of_context(context))
        original(cursor, statement, parameters, context)

    async with engine.connect() as connection:
        private.follow_dialect(engine.sync_engine.dialect, "do_execute", around)
        await connection.execute(text("SELECT 1"))
        await connection.execute(select(1))
    await engine.dispose()
    assert len(taken) == 1
    assert found == taken * 2


async def test_the_return_of_a_connection_to_its_pool_is_told_once(database: Database) -> None:
    engine = database.watch_new()
    returned: list[object] = []
    taken: list[object] = []

    def note(connection: object, entry: object, proxy: object) -> None:
        taken.append(connection)
        private.calls_on_return(entry).append(returned.append)

    async with engine.connect():
        pass
    event.listen(engine.sync_engine, "checkout", note)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        assert returned == []
    assert returned == taken
    event.remove(engine.sync_engine, "checkout", note)
    async with engine.connect():
        pass
    assert returned == taken
    event.listen(engine.sync_engine, "checkout", note)
    async with engine.connect() as connection:
        await connection.invalidate()
    await engine.dispose()
    assert len(returned) == 1


async def test_a_connection_in_use_tells_of_its_return(database: Database) -> None:
    engine = database.watch_new()
    returned: list[object] = []
    async with engine.connect() as connection:
        sync_connection = connection.sync_connection
        assert sync_connection is not None
        private.call_on_return(sync_connection, returned.append)
        taken = sync_connection.connection.dbapi_connection
        assert returned == []
    assert returned == [taken]


def test_the_listeners_of_a_pool_are_known_also_where_the_pool_has_taken_them_over_from_another_pool() -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool)

    def listener(*args: object) -> None:
        pass

    event.listen(engine, "checkout", listener)
    assert listener in private.listeners_of(engine.pool, "checkout")
    assert listener in private.listeners_of(engine.pool.recreate(), "checkout")
    assert listener not in private.listeners_of(create_engine("sqlite://", poolclass=QueuePool).pool, "checkout")


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


async def test_a_connection_goes_on_with_another_driver_connection_of_the_pool(database: Database) -> None:
    engine = create_async_engine(database.url)

    def swap(connection: Connection) -> None:
        taken.append(connection.connection.dbapi_connection)
        private.swap_connection(connection, engine.sync_engine.raw_connection)
        taken.append(connection.connection.dbapi_connection)

    taken: list[Any] = []
    async with engine.connect() as connection:
        async with engine.connect() as other:
            # The pool has a second connection to hand out.
            await other.execute(text("SELECT 1"))
        await connection.run_sync(swap)
        assert (await connection.execute(text("SELECT 1"))).scalar() == 1
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a QueuePool
    await engine.dispose()
    assert taken[0] is not taken[1]


async def test_an_error_of_asyncpg_is_raised_as_that_of_the_dbapi(connection: AsyncConnection) -> None:
    adapted: Any = (await connection.get_raw_connection()).dbapi_connection
    with pytest.raises(adapted.dbapi.IntegrityError):
        private.raise_translated(adapted, asyncpg.UniqueViolationError("twice"))
