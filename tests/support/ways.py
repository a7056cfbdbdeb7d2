"""The ways in which a program writes a row: each writes ``a`` into `item`, in a unit of work of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from sqlalchemy import text
from tests.support.database import Database, insert
from tests.support.faulty_network import Fault, FaultyNetwork, Point

from ctxdb_core import (
    CommitOutcomeUnknownError,
    DBConnect,
    TransactionContext,
    atomic_db_session,
    commit_db_session,
    db_session,
    joining_session,
    new_db_ctx,
    retry_on_conflict,
    transactional,
)

__all__ = [
    "WAYS_TO_WRITE",
    "WayToWrite",
    "assert_told_is_stored",
    "in_a_savepoint",
    "in_a_transaction_context",
    "in_a_unit",
]


async def _select(db: DBConnect) -> None:
    await (await db_session(db)).execute(text("SELECT 1"))


async def in_a_unit(db: DBConnect) -> None:
    async with new_db_ctx():
        await insert(db, "a")


async def in_a_savepoint(db: DBConnect) -> None:
    async with new_db_ctx(), (await db_session(db)).begin_nested():
        await insert(db, "a")


async def in_an_atomic_savepoint(db: DBConnect) -> None:
    async with new_db_ctx():
        await _select(db)
        async with atomic_db_session(db, "savepoint"):
            await insert(db, "a")


async def beside_a_savepoint_that_is_rolled_back(db: DBConnect) -> None:
    async with new_db_ctx():
        session = await insert(db, "a")
        with suppress(Exception):
            async with session.begin_nested():
                await session.execute(text("SELECT 1"))
                raise ZeroDivisionError


async def after_a_swallowed_error(db: DBConnect) -> None:
    async with new_db_ctx():
        with suppress(Exception):
            await _select(db)
        await insert(db, "a")


async def in_a_transaction_context(db: DBConnect) -> None:
    async with TransactionContext(db).transaction() as session:
        await session.execute(text("INSERT INTO item VALUES ('a')"))


async def in_a_transaction_of_its_own(db: DBConnect) -> None:
    async with new_db_ctx():
        await _select(db)
        async with transactional(db, "requires_new"):
            await insert(db, "a")


async def in_an_attempt(db: DBConnect) -> None:
    attempts = 0

    @retry_on_conflict(wait=0)
    async def attempt() -> None:
        nonlocal attempts
        attempts += 1
        await insert(db, "a")

    try:
        await attempt()
    finally:
        # The loss of a connection is no conflict, and an unknown commit may be stored.
        assert attempts == 1


async def by_a_library_that_commits(db: DBConnect) -> None:
    async with new_db_ctx():
        await _select(db)
        async with joining_session(db) as session:
            await session.execute(text("INSERT INTO item VALUES ('a')"))
            await session.commit()


async def early(db: DBConnect) -> None:
    async with new_db_ctx():
        await insert(db, "a")
        await commit_db_session(db)


WayToWrite = Callable[[DBConnect], Awaitable[None]]

WAYS_TO_WRITE: tuple[WayToWrite, ...] = (
    in_a_unit,
    in_a_savepoint,
    in_an_atomic_savepoint,
    beside_a_savepoint_that_is_rolled_back,
    after_a_swallowed_error,
    in_a_transaction_context,
    in_a_transaction_of_its_own,
    in_an_attempt,
    by_a_library_that_commits,
    early,
)


async def assert_told_is_stored(
    write: WayToWrite, points: Iterable[Point], far: DBConnect, network: FaultyNetwork, database: Database
) -> None:
    """Check that a way to write raises nothing if its row is stored, and an error if it is not.

    Only a connection that is lost with COMMIT leaves the outcome unknown.

    Args:
        write: the way to write.
        points: where the connection is lost, one after the other.
        far: leads to the database through the network.
        network: loses the connection.
        database: where the row is stored.
    """
    for point in points:
        await database.query("DELETE FROM item")
        network.fail(point, Fault.DROP)
        told = "success"
        try:
            await write(far)
        except CommitOutcomeUnknownError:
            told = "unknown"
            assert point in (Point.COMMIT, Point.COMMITTED)
        except Exception:  # noqa: BLE001 - any of a driver's
            told = "failure"
            assert network.failed.is_set()
        network.heal()
        if told != "unknown":
            assert await database.names() == (["a"] if told == "success" else []), point
        await database.assert_quiet()
