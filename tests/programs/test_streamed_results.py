"""Results that the handler opens, so that a bad query is an error response, and that the body reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from tests.support.application import Reply, Stream
from tests.support.database import Item, insert
from tests.support.world import World

from ctxdb_core import OpenCursorError, commit_db_session, db_session

# More than a driver or SQLAlchemy fetches at once: asyncpg's cursors fetch 50 rows.
ROWS = text("SELECT i FROM generate_series(1, 300) i")


async def lines(rows: AsyncIterator[Any]) -> AsyncGenerator[str]:
    async for (number,) in rows:
        yield f"{number}\n"


async def of_session(session: AsyncSession) -> AsyncIterator[Any]:
    return await session.stream(ROWS)


async def of_scalars(session: AsyncSession) -> AsyncIterator[Any]:
    async def one_column(numbers: AsyncIterator[int]) -> AsyncIterator[tuple[int]]:
        async for number in numbers:
            yield (number,)

    return one_column(await session.stream_scalars(ROWS))


async def of_connection(session: AsyncSession) -> AsyncIterator[Any]:
    connection: AsyncConnection = await session.connection()
    return await connection.stream(ROWS).start()


@pytest.mark.parametrize("open_result", [of_session, of_scalars, of_connection])
async def test_an_export_is_whole_while_other_requests_write(world: World, open_result: Any) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def export() -> Stream:
        rows = await open_result(await db_session(world.db))

        async def body() -> AsyncGenerator[str]:
            async for line in lines(rows):
                if line == "10\n":
                    inside.set()
                    await go_on.wait()
                yield line

        return Stream(body())

    async def order() -> Reply:
        await insert(world.db, "ordered")
        return Reply()

    client = await world.start(("/export", export), ("/order", order))
    exporting = asyncio.create_task(client.get("/export"))
    await asyncio.wait_for(inside.wait(), 10)
    # None of them gets the connection of the export.
    assert await world.statuses(client, ["/order"]) == [200]
    go_on.set()
    assert len((await exporting).text.split()) == 300
    assert await world.names() == ["ordered"]


async def test_objects_are_streamed_out_of_a_result_that_the_handler_has_opened(world: World) -> None:
    await world.database.query("INSERT INTO item SELECT i::text FROM generate_series(1, 200) i RETURNING 1")

    async def export() -> Stream:
        items = await (await db_session(world.db)).stream_scalars(select(Item).execution_options(yield_per=10))
        return Stream(item.name async for item in _batches(items))

    assert len((await world.get(export)).text) == sum(len(str(number)) for number in range(1, 201))


async def _batches(items: Any) -> AsyncGenerator[Item]:
    async for item in items:
        yield item


@pytest.mark.exception_handlers
async def test_an_open_result_of_a_transaction_that_has_written_is_an_error_before_the_first_byte(world: World) -> None:
    async def export() -> Stream:
        await insert(world.db, "export was started")
        return Stream(lines(await (await db_session(world.db)).stream(ROWS)))

    world.application.exception_statuses[OpenCursorError] = 507
    assert (await world.get(export)).status_code == 507
    assert await world.names() == []


async def test_a_commit_before_the_result_is_opened_lets_the_body_read_it(world: World) -> None:
    async def export() -> Stream:
        await insert(world.db, "export was started")
        await commit_db_session(world.db)
        return Stream(lines(await (await db_session(world.db)).stream(ROWS)))

    assert len((await world.get(export)).text.split()) == 300
    assert await world.names() == ["export was started"]


async def test_a_body_may_write_beside_the_result_that_it_reads_in_part(world: World) -> None:
    async def export() -> Stream:
        rows = await (await db_session(world.db)).stream(ROWS)

        async def body() -> AsyncGenerator[str]:
            async for line in lines(rows):
                yield line
                if line == "40\n":
                    break
            await insert(world.db, "exported")
            yield "end"

        return Stream(body())

    assert (await world.get(export)).text.split()[-2:] == ["40", "end"]
    assert await world.names() == ["exported"]


async def test_a_refused_export_gives_its_connection_back(world: World) -> None:
    opened: list[Any] = []

    async def export() -> Reply:
        opened.append(await (await db_session(world.db)).stream(ROWS))
        return Reply(status=403)

    for _ in range(2):
        assert (await (await world.start(("/", export))).get("/")).status_code == 403
    await world.database.assert_quiet()
