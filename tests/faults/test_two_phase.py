"""Two-phase commits that lose their connection: the error, the stored rows, and the transactions that stay prepared."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from tests.support.database import Database, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point

from ctxdb_core import CommitOutcomeUnknownError, DBConnect, new_db_ctx, on_commit, on_rollback


@pytest.fixture
async def prepared(database: Database, far: DBConnect) -> AsyncIterator[DBConnect]:
    """The database behind the network, with two-phase commits. Transactions that stay prepared are rolled back."""
    async with DBConnect(
        lambda host: database.watch_new(), lambda engine: async_sessionmaker(engine, twophase=True), host="far"
    ) as db:
        yield db
        for name in await _names_of_prepared(database):
            await database.query(f"ROLLBACK PREPARED '{name}'")


async def _names_of_prepared(database: Database) -> list[str]:
    rows = await database.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
    return [row[0] for row in rows]


async def _write(db: DBConnect, outcomes: list[str]) -> None:
    async with new_db_ctx():
        on_commit(db, lambda: outcomes.append("committed"))
        on_rollback(db, lambda: outcomes.append("rolled back"))
        await insert(db, "a")


async def test_a_commit_is_prepared_and_stored(prepared: DBConnect, database: Database) -> None:
    outcomes: list[str] = []
    await _write(prepared, outcomes)
    assert outcomes == ["committed"]
    assert await database.names() == ["a"]
    assert await _names_of_prepared(database) == []


@pytest.mark.parametrize("point", [Point.COMMIT_PREPARED, Point.COMMITTED_PREPARED])
async def test_a_lost_commit_of_a_prepared_transaction_is_an_unknown_outcome(
    prepared: DBConnect, network: FaultyNetwork, database: Database, point: Point
) -> None:
    outcomes: list[str] = []
    network.fail(point, Fault.DROP)
    with pytest.raises(CommitOutcomeUnknownError, match="It was prepared as '_sa_") as raised:
        await _write(prepared, outcomes)
    assert outcomes == []
    if point is Point.COMMITTED_PREPARED:
        assert await database.names() == ["a"]
    else:
        (name,) = await _names_of_prepared(database)
        assert name in str(raised.value)


@pytest.mark.parametrize("point", [Point.PREPARE, Point.PREPARED])
async def test_the_error_of_a_lost_preparation_says_what_may_stay_prepared(
    prepared: DBConnect, network: FaultyNetwork, database: Database, point: Point
) -> None:
    outcomes: list[str] = []
    network.fail(point, Fault.DROP)
    with pytest.raises(DBAPIError) as raised:
        await _write(prepared, outcomes)
    assert outcomes == ["rolled back"]
    notes = [*getattr(raised.value, "__notes__", []), *getattr(raised.value.__cause__, "__notes__", [])]
    assert any("ROLLBACK PREPARED" in note for note in notes)
    assert await database.names() == []
    assert len(await _names_of_prepared(database)) == (1 if point is Point.PREPARED else 0)


async def test_several_databases_store_nothing_if_one_cannot_be_prepared(
    prepared: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    assert database.server is not None
    near = database.watch(create_async_engine(make_url(database.url).set(port=database.server.port)))
    far = database.watch_new()
    async with async_sessionmaker(twophase=True)() as session:
        for bind, name in ((near, "near"), (far, "far")):
            connection_of = {"bind": bind.sync_engine}
            await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name}, bind_arguments=connection_of)
        network.fail(Point.PREPARE, Fault.DROP)
        with pytest.raises(DBAPIError):
            await session.commit()
    assert await database.names() == []
    assert await _names_of_prepared(database) == []
    for engine in (near, far):
        await engine.dispose()
