"""`CommitGuard`: which commits are confirmed, and what a commit raises that is not confirmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import (
    Column,
    MetaData,
    Sequence,
    String,
    Table,
    bindparam,
    cast,
    exists,
    func,
    insert,
    literal_column,
    select,
    text,
    union_all,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tests.support.database import Database, Item
from tests.support.database import insert as insert_item
from tests.support.hosts import HOST, FakeSource, Hosts, RememberingSource, frozen

from ctxdb_core import (
    DBConnect,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
    on_commit,
    transactional,
)
from ctxdb_pgstatus import CommitUnconfirmedError, KnownMaster, MasterChangedError, SidecarError, follow_master
from ctxdb_pgstatus._following.statements import may_write
from ctxdb_starlette import DBSessionMiddleware

items = Table("item", MetaData(), Column("name", String))


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
async def db(database: Database, source: FakeSource) -> AsyncIterator[DBConnect]:
    async with DBConnect(Hosts(database), before_create_session_handler=follow_master(source)) as db:
        yield db
        await database.assert_quiet()


both_drivers = pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg"], indirect=True)


@both_drivers
async def test_a_commit_that_wrote_is_confirmed_before_it_returns(db: DBConnect, source: FakeSource) -> None:
    source.may_confirm = asyncio.Event()
    async with new_non_ctx_session(db) as session:
        await session.execute(insert(items).values(name="a"))
        assert source.confirmed == []
        commit = asyncio.create_task(session.commit())
        await source.confirming.wait()
        assert not commit.done()
        source.may_confirm.set()
        await commit
    assert source.confirmed == ["n1"]


@both_drivers
async def test_a_commit_on_a_host_that_is_not_the_master_is_an_error(
    db: DBConnect, source: FakeSource, database: Database
) -> None:
    source.confirms = False
    with pytest.raises(MasterChangedError, match="'n1'"):
        async with new_db_ctx():
            await insert_item(db, "a")
    # The row was stored on the host, which is not the master.
    assert await database.names() == ["a"]


async def test_a_commit_is_unconfirmed_if_the_source_raises_an_error(db: DBConnect, source: FakeSource) -> None:
    source.error = RuntimeError("no answer")
    with pytest.raises(CommitUnconfirmedError, match=r"could not be found out \(no answer\)") as raised:
        async with new_db_ctx():
            await insert_item(db, "a")
    assert raised.value.__cause__ is source.error
    assert (raised.value.host, raised.value.retryable) == ("n1", False)


async def test_a_commit_is_unconfirmed_after_the_confirm_timeout(database: Database, source: FakeSource) -> None:
    source.may_confirm = asyncio.Event()
    handler = follow_master(source, confirm_timeout=0.01)
    async with DBConnect(Hosts(database), before_create_session_handler=handler) as db:
        with pytest.raises(CommitUnconfirmedError) as raised:
            async with new_db_ctx():
                await insert_item(db, "a")
    assert isinstance(raised.value.__cause__, TimeoutError)


# --- while a sidecar is away ------------------------------------------------------------------------------------------


@pytest.fixture
def sidecar() -> RememberingSource:
    return RememberingSource(error=SidecarError("away"))


@pytest.fixture
async def led(database: Database, sidecar: RememberingSource) -> AsyncIterator[DBConnect]:
    """A `DBConnect` that follows a sidecar which is away."""
    async with DBConnect(Hosts(database), before_create_session_handler=follow_master(sidecar)) as db:
        yield db
        await database.assert_quiet()


@both_drivers
@pytest.mark.parametrize("timeline", [None, 1])
async def test_while_the_sidecar_is_away_the_host_of_a_commit_confirms_it(
    led: DBConnect, sidecar: RememberingSource, database: Database, timeline: int | None
) -> None:
    sidecar.known = KnownMaster("n1", timeline)
    for name in ("a", "b"):
        async with new_db_ctx():
            await insert_item(led, name)
    assert sidecar.confirmed == ["n1", "n1"]
    assert await database.names() == ["a", "b"]


@both_drivers
async def test_a_host_on_another_timeline_than_the_known_masters_does_not_confirm_a_commit(
    led: DBConnect, sidecar: RememberingSource
) -> None:
    sidecar.known = KnownMaster("n1", 2)
    with pytest.raises(MasterChangedError):
        async with new_db_ctx():
            await insert_item(led, "a")


async def test_a_host_that_is_not_the_known_master_does_not_confirm_a_commit(
    led: DBConnect, sidecar: RememberingSource
) -> None:
    sidecar.known = KnownMaster("n2", 1)
    with pytest.raises(MasterChangedError):
        async with new_db_ctx():
            await insert_item(led, "a")


async def test_a_commit_is_unconfirmed_if_the_sidecar_has_been_away_for_too_long(
    led: DBConnect, sidecar: RememberingSource, database: Database
) -> None:
    sidecar.known = None
    with pytest.raises(CommitUnconfirmedError, match="away") as raised:
        async with new_db_ctx():
            await insert_item(led, "a")
    assert raised.value.__cause__ is sidecar.error
    assert await database.names() == ["a"]


@both_drivers
async def test_a_commit_is_unconfirmed_in_time_if_its_host_hangs(
    database: Database, sidecar: RememberingSource
) -> None:
    hosts = Hosts(database)
    sidecar.error, sidecar.may_confirm = None, asyncio.Event()
    handler = follow_master(sidecar, confirm_timeout=0.6)
    async with DBConnect(hosts, before_create_session_handler=handler) as db:
        writing = asyncio.create_task(_write(db))
        await sidecar.confirming.wait()
        with frozen(hosts, "n1"), pytest.raises(CommitUnconfirmedError):
            await writing
    assert await database.names() == ["a"]


async def _write(db: DBConnect) -> None:
    async with new_db_ctx():
        await insert_item(db, "a")


async def test_commits_are_not_confirmed_with_confirm_commits_false(database: Database, source: FakeSource) -> None:
    handler = follow_master(source, confirm_commits=False)
    async with DBConnect(Hosts(database), before_create_session_handler=handler) as db, new_db_ctx():
        await insert_item(db, "a")
    assert source.confirmed == []


async def test_a_cancelled_confirmation_is_no_success(db: DBConnect, source: FakeSource) -> None:
    source.may_confirm = asyncio.Event()
    done: list[str] = []

    async def write() -> None:
        async with new_non_ctx_session(db) as session:
            await session.execute(insert(items).values(name="a"))
            await session.commit()
            done.append("committed")

    task = asyncio.create_task(write())
    await source.confirming.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == []


@pytest.mark.parametrize("confirms", [True, False])
async def test_a_cancelled_unit_of_work_waits_for_its_confirmation(
    db: DBConnect, source: FakeSource, confirms: bool
) -> None:
    source.may_confirm = asyncio.Event()
    source.confirms = confirms
    called: list[str] = []

    async def write() -> None:
        async with new_db_ctx():
            await insert_item(db, "a")
            on_commit(db, lambda: called.append("on_commit"))

    task = asyncio.create_task(write())
    await source.confirming.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    source.may_confirm.set()
    with pytest.raises(asyncio.CancelledError if confirms else MasterChangedError):
        await task
    assert called == (["on_commit"] if confirms else [])


async def test_on_commit_callbacks_do_not_run_without_a_confirmation(db: DBConnect, source: FakeSource) -> None:
    called: list[str] = []
    source.confirms = False
    with pytest.raises(MasterChangedError):
        async with new_db_ctx():
            await insert_item(db, "a")
            on_commit(db, lambda: called.append("on_commit"))
    assert called == []


# --- an application ---------------------------------------------------------------------------------------------------


def _client(db: DBConnect, handlers: dict[Any, Any] | None = None, *others: DBConnect) -> httpx.AsyncClient:
    async def write(request: Request) -> Response:
        for each in (db, *others):
            await insert_item(each, request.query_params["name"])
        return Response(status_code=201)

    app = Starlette(routes=[Route("/", write, methods=["POST"])], exception_handlers=handlers)
    app.add_middleware(DBSessionMiddleware)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_an_application_answers_an_unconfirmed_write_by_500(db: DBConnect, source: FakeSource) -> None:
    async with _client(db) as client:
        assert (await client.post("/?name=a")).status_code == 201
        source.confirms = False
        assert (await client.post("/?name=b")).status_code == 500
        source.confirms = True
        assert (await client.post("/?name=c")).status_code == 201


async def test_an_exception_handler_of_the_application_answers_masterchangederror(
    db: DBConnect, source: FakeSource
) -> None:
    def unavailable(request: Request, exc: Exception) -> Response:
        return JSONResponse({"error": type(exc).__name__}, status_code=503)

    async with _client(db, {MasterChangedError: unavailable}) as client:
        source.confirms = False
        response = await client.post("/?name=b")
    assert response.status_code == 503
    assert response.json() == {"error": "MasterChangedError"}


@pytest.mark.parametrize("order", ["followed first", "followed last"])
async def test_other_databases_are_rolled_back_and_named_if_a_commit_is_not_confirmed(
    db: DBConnect, source: FakeSource, database: Database, order: str
) -> None:
    source.confirms = False
    async with database.connect() as other:
        dbs = [db, other] if order == "followed first" else [other, db]
        with pytest.raises(MasterChangedError) as raised:
            async with new_db_ctx():
                for each in dbs:
                    await insert_item(each, "on n1" if each is db else "on 127.0.0.1")
        notes = getattr(raised.value, "__notes__", [])
        if order == "followed first":
            assert notes == []
            assert await database.names() == ["on n1"]
        else:
            assert [repr(other) in note and "rolled back" in note for note in notes] == [True]
            assert await database.names() == ["on 127.0.0.1", "on n1"]
        # Both databases can be used again.
        source.confirms = True
        async with new_db_ctx():
            for number, each in enumerate(dbs):
                await insert_item(each, f"again {number}")


# --- what is confirmed ------------------------------------------------------------------------------------------------


async def test_reading_is_not_confirmed(db: DBConnect, source: FakeSource, database: Database) -> None:
    source.confirms = False
    async with new_db_ctx():
        session = await db_session(db)
        assert (await session.scalars(select(Item))).all() == []
        await session.get(Item, "a")
        await session.scalar(select(func.count()).select_from(items))
        async with session.begin_nested():
            await session.execute(union_all(select(items), select(items)))
    assert source.confirmed == []


async def test_write_is_confirmed_although_the_transaction_reads_afterwards(db: DBConnect, source: FakeSource) -> None:
    async with new_db_ctx():
        session = await insert_item(db, "a")
        await session.execute(select(items))
    assert source.confirmed == ["n1"]


async def test_rolled_back_write_is_not_confirmed(db: DBConnect, source: FakeSource) -> None:
    async with new_db_ctx():
        session = await insert_item(db, "a")
        await session.rollback()
    async with new_db_ctx():
        await (await db_session(db)).execute(select(items))
    assert source.confirmed == []


async def test_each_transaction_is_confirmed(db: DBConnect, source: FakeSource) -> None:
    async with new_db_ctx():
        await insert_item(db, "a")
        await commit_db_session(db)
        async with atomic_db_session(db) as session:
            await session.execute(insert(items).values(name="b"))
        await insert_item(db, "c")
    assert source.confirmed == ["n1"] * 3


@both_drivers
async def test_a_read_only_transaction_is_not_confirmed(db: DBConnect, source: FakeSource) -> None:
    async with new_db_ctx(), atomic_db_session(db, read_only=True) as session:
        await session.execute(text("SELECT name FROM item"))
    async with new_db_ctx(statement_timeout=5):
        await (await db_session(db)).execute(select(items))
    assert source.confirmed == []


async def test_statements_in_autocommit_are_confirmed_one_by_one(db: DBConnect, source: FakeSource) -> None:
    with pytest.raises(MasterChangedError):
        async with new_db_ctx(), transactional(db, "not_supported"):
            session = await db_session(db)
            await session.execute(insert(items).values(name="a"))
            assert source.confirmed == ["n1"]
            await session.execute(select(items))
            assert source.confirmed == ["n1"]
            source.confirms = False
            await session.execute(insert(items).values(name="b"))


async def test_commits_of_connections_without_a_session_are_confirmed(db: DBConnect, source: FakeSource) -> None:
    await db.create_session()
    engine = await db.engine()
    async with engine.begin() as connection:
        await connection.execute(insert(items).values(name="a"))
    async with engine.execution_options(isolation_level="SERIALIZABLE").begin() as connection:
        await connection.execute(insert(items).values(name="b"))
    assert source.confirmed == ["n1", "n1"]


async def test_write_on_the_drivers_connection_is_confirmed(
    db: DBConnect, source: FakeSource, database: Database
) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        await session.execute(select(items))
        raw = await (await session.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        await driver.copy_records_to_table("item", records=[("a",)])
    assert source.confirmed == ["n1"]
    assert await database.names() == ["a"]
    async with new_db_ctx():
        await (await db_session(db)).execute(select(items))
    assert source.confirmed == ["n1"]


_QUERIES_THAT_READ = {
    "columns": select(items.c.name).where(items.c.name.in_(["a", "b"])).order_by(items.c.name).limit(3),
    "aggregates": select(func.count(), func.max(items.c.name), func.coalesce(func.min(items.c.name), "")),
    "a window": select(func.row_number().over(partition_by=items.c.name, order_by=items.c.name)),
    "a subquery": select(items).where(exists().where(items.c.name == "x")),
    "a CTE": select(select(items).where(items.c.name > "a").cte("chosen")),
    "a cast": select(cast(items.c.name, String(10)), cast("1", postgresql.NUMERIC(10, 2))),
    "a value with quotes": select(items).where(items.c.name == "'); DELETE FROM item; --"),
    "a literal with quotes": select(items).where(
        items.c.name == bindparam("n", "it's for update", literal_execute=True)
    ),
    "a union": union_all(select(items), select(items)),
    "a name in quotes": select(items.c.name.label("Insert Into")),
}
_QUERIES_THAT_MAY_WRITE = {
    "an unknown function": select(func.nextval("s")),
    "a sequence": select(Sequence("s").next_value()),
    "a function of a schema": select(func.mine.count(items.c.name)),
    "a function in quotes": select(getattr(func, "Count It")(items.c.name)),
    "a lock": select(items).with_for_update(),
    "a weaker lock": select(items).with_for_update(read=True, key_share=True),
    "a write in a CTE": select(insert(items).values(name="a").returning(items.c.name).cte()),
    "text": text("SELECT 1"),
    "text in columns": select(literal_column("pg_notify('a', 'b')")),
    "a text that hides": select(literal_column("'\\' || nextval('s') || '\\'")),
    "a prefix": select(items).prefix_with(text("/* */ mine(1),")),
    "a suffix": select(items).suffix_with(text("FOR UPDATE")),
    "a hint": select(items).with_statement_hint("FOR SHARE"),
    "an insert": insert(items).values(name="a"),
}


class _Context:
    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled


def _compiled(statement: Any) -> tuple[str, Any]:
    dialect = create_async_engine("postgresql+asyncpg://").dialect
    compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
    return str(compiled), _Context(compiled)


@pytest.mark.parametrize("query", _QUERIES_THAT_READ.values(), ids=_QUERIES_THAT_READ)
def test_a_compiled_query_without_unknown_functions_may_not_write(query: Any) -> None:
    assert not may_write(*_compiled(query))


@pytest.mark.parametrize("query", _QUERIES_THAT_MAY_WRITE.values(), ids=_QUERIES_THAT_MAY_WRITE)
def test_other_compiled_statements_may_write(query: Any) -> None:
    assert may_write(*_compiled(query))


@pytest.mark.parametrize(
    ("sql", "expected"),
    [("SET LOCAL statement_timeout = 5", False), ("SET LOCAL a = 1; DELETE FROM item", True), ("INSERT INTO t", True)],
)
def test_a_statement_as_text_may_write_unless_it_is_a_setting(sql: str, expected: bool) -> None:
    assert may_write(sql, _Context(None)) is expected  # type: ignore[arg-type]  # all that is asked of it


async def test_a_commit_is_confirmed_for_the_host_of_its_connection(db: DBConnect, source: FakeSource) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(insert(items).values(name="a"))
        # The transaction is under way on n1.
        source.master, source.replicas = "n2", ("n1", "n3")
        async with new_non_ctx_session(db) as other:
            assert await other.scalar(HOST) == "n2"
        with pytest.raises(MasterChangedError, match="'n1'"):
            await session.commit()
