"""Programs as people write them, each on every framework that has the situation, through real servers.

Programs that use another library are skipped where that is not installed: it comes with the group `ecosystem`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.adapters import ADAPTERS
from tests.support.database import Database
from tests.support.world import Setting, World, open_world


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" not in metafunc.fixturenames:
        return
    adapters = list(ADAPTERS)
    if metafunc.definition.get_closest_marker("background"):
        adapters = [adapter for adapter in adapters if adapter.has_background]
    if metafunc.definition.get_closest_marker("exception_handlers"):
        adapters = [adapter for adapter in adapters if adapter.has_exception_handlers]
    if metafunc.definition.get_closest_marker("middlewares"):
        adapters = [adapter for adapter in adapters if adapter.has_middlewares]
    settings = [Setting(adapter, "asyncpg", over_sockets=True) for adapter in adapters]
    metafunc.parametrize("setting", settings, ids=lambda setting: setting.adapter.name)


@pytest.fixture
async def world(setting: Setting, database: Database) -> AsyncIterator[World]:
    async with open_world(setting, database) as world:
        yield world
