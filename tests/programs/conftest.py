"""Programs as people write them, each on every framework that has the situation, through real servers.

Programs that use another library are skipped where that is not installed: it comes with the group `ecosystem`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from tests.support.adapters import ADAPTERS, Adapter
from tests.support.database import Database
from tests.support.world import Setting, World


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.name)
def setting(request: pytest.FixtureRequest) -> Setting:
    adapter: Adapter = request.param
    return Setting(adapter, "asyncpg", over_sockets=True)


@pytest.fixture
async def world(setting: Setting, database: Database) -> AsyncIterator[World]:
    async with database.connect() as db, AsyncExitStack() as stack:
        yield World(setting, database, db, stack)
        # Stopping the server and closing the engines would hide what is still in use.
        await database.assert_quiet()
