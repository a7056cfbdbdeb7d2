"""ctxdb behind PgBouncer: what is set for one client stays with it, and writes on a read-only database are refused."""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import URL, event, make_url, text
from sqlalchemy.exc import DBAPIError
from tests.support.database import Database, eventually, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point
from tests.support.pgbouncer import COMMAND, PgBouncer

from ctxdb_core import (
    CommitOutcomeUnknownError,
    DBConnect,
    atomic_db_session,
    db_session,
    new_db_ctx,
    new_non_ctx_session,
)

pytestmark = pytest.mark.skipif(COMMAND is None, reason="PgBouncer is not installed")

MODES = {
    "transaction": {},
    "parameter ignored": {"ignore_startup_parameters": "extra_float_digits, default_transaction_read_only, options"},
    "session": {"mode": "session"},
}


def _options(kind: str) -> dict[str, Any]:
    """Return what a driver needs behind a pooler of transactions."""
    if kind == "psycopg":
        return {"connect_args": {"prepare_threshold": None}}
    return {
        "connect_args": {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
        }
    }


@pytest.fixture(params=MODES)
async def pooled(request: pytest.FixtureRequest, database: Database, tmp_path: Path) -> AsyncIterator[URL]:
    """The database, behind PgBouncer."""
    assert database.server is not None
    async with PgBouncer(database.server, tmp_path, **MODES[request.param]) as pgbouncer:
        yield make_url(database.url).set(port=pgbouncer.port)


only_transactions = pytest.mark.parametrize("pooled", ["transaction"], indirect=True)


async def test_a_read_only_database_refuses_writes(pooled: URL, database: Database, database_kind: str) -> None:
    await database.query("INSERT INTO item VALUES ('there')")
    async with DBConnect.from_url(pooled, read_only=True, **_options(database_kind)) as replica:

        async def read() -> None:
            async with new_db_ctx():
                session = await db_session(replica)
                assert (await session.scalars(text("SELECT name FROM item"))).all() == ["there"]
                assert await session.scalar(text("SHOW transaction_read_only")) == "on"

        await asyncio.gather(*(read() for _ in range(5)))
        with pytest.raises(DBAPIError, match="read-only transaction"):
            async with new_db_ctx():
                await insert(replica, "written")
        async with new_db_ctx(), atomic_db_session(replica, read_only=True) as session:
            assert await session.scalar(text("SELECT count(*) FROM item")) == 1
    assert await database.names() == ["there"]


@only_transactions
async def test_a_read_only_database_leaves_other_clients_alone(
    pooled: URL, database: Database, database_kind: str
) -> None:
    options = _options(database_kind)
    async with (
        DBConnect.from_url(pooled, **options) as db,
        DBConnect.from_url(pooled, read_only=True, **options) as replica,
    ):

        async def read() -> None:
            async with new_db_ctx():
                await (await db_session(replica)).scalar(text("SELECT 1"))

        async def write(name: str) -> None:
            async with new_db_ctx():
                await insert(db, name)

        names = [f"{number:02}" for number in range(20)]
        await asyncio.gather(*(read() for _ in names), *map(write, names))
    assert await database.names() == names


@only_transactions
@pytest.mark.parametrize("read_only", [True, False])
async def test_a_statement_timeout_stays_with_its_unit(
    pooled: URL,
    database_kind: str,
    read_only: bool,
) -> None:
    if database_kind == "asyncpg" and not read_only:
        pytest.skip("asyncpg sends a statement in two parts, which the pooler divides in autocommit")
    options = _options(database_kind)
    limited_options = {"read_only": True} if read_only else {"isolation_level": "AUTOCOMMIT"}
    async with (
        DBConnect.from_url(pooled, **options) as db,
        DBConnect.from_url(pooled, **limited_options, **options) as limited,
    ):

        async def limit() -> str:
            async with new_db_ctx():
                session = await db_session(db)
                found: str = await session.scalar(text("SHOW statement_timeout"))
                await everybody.wait()
                return found

        async def use() -> None:
            async with new_db_ctx(statement_timeout=3):
                session = await db_session(limited)
                for _ in range(5):
                    await session.scalar(text("SELECT 1"))

        everybody = asyncio.Barrier(4)
        await asyncio.gather(*(use() for _ in range(4)))
        assert await asyncio.gather(*(limit() for _ in range(4))) == ["0"] * 4


@only_transactions
async def test_a_read_only_unit_is_limited_by_the_server(pooled: URL, database_kind: str) -> None:
    async with DBConnect.from_url(pooled, read_only=True, **_options(database_kind)) as replica:
        with pytest.raises(DBAPIError, match="statement timeout"):
            async with new_db_ctx(statement_timeout=0.2):
                await (await db_session(replica)).execute(text("SELECT pg_sleep(60)"))


@only_transactions
async def test_settings_of_a_driver_that_are_made_for_a_server_are_told_once(
    pooled: URL, database_kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with DBConnect.from_url(pooled) as db:
        for _ in range(2):
            async with new_non_ctx_session(db) as session:
                await session.connection()
            await (await db.engine()).dispose()
    (told,) = [record for record in caplog.records if "pooler" in record.getMessage()]
    assert told.levelno == logging.WARNING
    wanted = "prepare_threshold=None" if database_kind == "psycopg" else "statement_cache_size=0"
    assert wanted in told.getMessage()


@only_transactions
async def test_right_settings_and_plain_servers_are_left_alone(
    pooled: URL, database: Database, database_kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for url, options in ((pooled, _options(database_kind)), (database.url, {})):
        async with DBConnect.from_url(url, **options) as db, new_non_ctx_session(db) as session:
            await session.scalar(text("SELECT 1"))
    assert [record for record in caplog.records if "pooler" in record.getMessage()] == []


@pytest.mark.parametrize("read_only", [False, True])
async def test_connections_that_the_pooler_ends_for_idling_are_replaced(
    database: Database, tmp_path: Path, database_kind: str, *, read_only: bool
) -> None:
    assert database.server is not None
    async with PgBouncer(database.server, tmp_path, client_idle_timeout="1") as pgbouncer:
        url = make_url(database.url).set(port=pgbouncer.port)
        async with DBConnect.from_url(url, read_only=read_only, **_options(database_kind)) as db:

            async def use() -> None:
                async with new_db_ctx():
                    assert await (await db_session(db)).scalar(text("SELECT 1")) == 1

            opened: list[Any] = []
            engine = await db.engine()
            event.listen(engine.sync_engine, "connect", lambda connection, _: opened.append(connection))
            await use()
            await eventually(
                lambda: _has_hung_up(opened[0].driver_connection), "the pooler does not close the connection"
            )
            await use()
            assert len(opened) == 2


def _has_hung_up(driver_connection: Any) -> bool:
    if hasattr(driver_connection, "is_closed"):
        return bool(driver_connection.is_closed())
    readable, _, _ = select.select([driver_connection.fileno()], [], [], 0)
    return bool(readable)


@only_transactions
async def test_a_commit_whose_server_connection_the_pooler_loses_is_unknown(
    pooled: URL, database: Database, database_kind: str
) -> None:
    async with DBConnect.from_url(pooled, **_options(database_kind)) as db:

        async def write() -> None:
            async with new_db_ctx():
                await insert(db, "a")

        with database.held_commits():
            writing = asyncio.create_task(write())
            await database.commit_is_held()
            database.terminate_backends("query ~ '^COMMIT'")
            with pytest.raises(CommitOutcomeUnknownError):
                await writing


@only_transactions
async def test_a_commit_is_resolved_through_the_pooler(pooled: URL, database: Database, database_kind: str) -> None:
    async with FaultyNetwork("127.0.0.1", pooled.port or 0) as network:
        url = pooled.set(port=network.port)
        async with DBConnect.from_url(url, resolve_commits=True, **_options(database_kind)) as db:
            network.fail(Point.COMMITTED, Fault.DROP)
            async with new_db_ctx():
                await insert(db, "a")
    assert await database.names() == ["a"]


@only_transactions
async def test_units_of_work_run_behind_a_pooler_of_transactions(
    pooled: URL, database: Database, database_kind: str
) -> None:
    async with DBConnect.from_url(pooled, **_options(database_kind)) as db:

        async def work(name: str) -> None:
            async with new_db_ctx():
                session = await insert(db, name)
                assert await session.scalar(text("SELECT name FROM item WHERE name = :name"), {"name": name}) == name

        names = [f"{number:03}" for number in range(60)]
        await asyncio.gather(*map(work, names))
    assert await database.names() == names
