"""Imports that copy records by asyncpg's own connection, before any statement of the session."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError
from tests.support.application import Reply, current_request
from tests.support.database import insert
from tests.support.world import World

from ctxdb_core import db_session


async def copy(world: World, names: list[str]) -> None:
    session = await db_session(world.db)
    raw = await (await session.connection()).get_raw_connection()
    driver: Any = raw.driver_connection
    await driver.copy_records_to_table("item", records=[(name,) for name in names])


@pytest.mark.parametrize("status", [200, 422])
async def test_copied_records_are_stored_if_the_response_says_so(world: World, status: int) -> None:
    async def import_records() -> Reply:
        await copy(world, ["1", "2"])
        await insert(world.db, "import")
        return Reply(status=status)

    assert (await world.get(import_records)).status_code == status
    assert await world.names() == (["1", "2", "import"] if status == 200 else [])


@pytest.mark.exception_handlers
async def test_records_are_undone_with_the_import_that_fails_on_them(world: World) -> None:
    async def import_records() -> Reply:
        names = current_request.get().query.split(",")
        await copy(world, names)
        for name in names:
            await insert(world.db, f"log-of-{name}")
        return Reply()

    world.application.exception_statuses[IntegrityError] = 409
    client = await world.start(("/", import_records))
    assert [(await client.get(f"/?{names}")).status_code for names in ("1,2", "3,log-of-3", "4")] == [200, 409, 200]
    assert await world.names() == ["1", "2", "4", "log-of-1", "log-of-2", "log-of-4"]
