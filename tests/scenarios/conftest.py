"""Every scenario runs for every adapter, in process and on a real server, on every database it is meant for."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
from tests.support.adapters import ADAPTERS
from tests.support.database import Database
from tests.support.world import Setting, World, open_world


def _settings() -> list[Setting]:
    by_name = {adapter.name: adapter for adapter in ADAPTERS}
    if os.environ.get("CTXDB_SCENARIOS") == "on-mariadb":
        return [
            Setting(by_name["starlette"], "asyncmy", over_sockets=True),
            Setting(by_name["asgi"], "aiomysql", over_sockets=False),
        ]
    flavours = (True,) if os.environ.get("CTXDB_SCENARIOS") == "on-sockets" else (False, True)
    settings = [Setting(adapter, "asyncpg", sockets) for adapter in ADAPTERS for sockets in flavours]
    # The other drivers differ below the adapters: once each is enough.
    settings.append(Setting(by_name["starlette"], "psycopg", over_sockets=True))
    settings.append(Setting(by_name["fastapi"], "sqlite", over_sockets=True))
    settings.append(Setting(by_name["asgi"], "sqlite", over_sockets=False))
    return settings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" not in metafunc.fixturenames:
        return
    settings = _settings()
    if metafunc.definition.get_closest_marker("postgresql"):
        settings = [setting for setting in settings if setting.database_kind in ("asyncpg", "psycopg")]
    if metafunc.definition.get_closest_marker("asyncpg"):
        settings = [setting for setting in settings if setting.database_kind == "asyncpg"]
    if metafunc.definition.get_closest_marker("sockets"):
        settings = [setting for setting in settings if setting.over_sockets]
    if metafunc.definition.get_closest_marker("cancelled_with_client"):
        settings = [setting for setting in settings if not setting.over_sockets]
    if metafunc.definition.get_closest_marker("exception_handlers"):
        settings = [setting for setting in settings if setting.adapter.has_exception_handlers]
    if metafunc.definition.get_closest_marker("background"):
        settings = [setting for setting in settings if setting.adapter.has_background]
    if metafunc.definition.get_closest_marker("middlewares"):
        settings = [setting for setting in settings if setting.adapter.has_middlewares]
    metafunc.parametrize("setting", settings, ids=str)


@pytest.fixture
def database_kind(setting: Setting) -> str:
    return setting.database_kind


@pytest.fixture
async def world(setting: Setting, database: Database) -> AsyncIterator[World]:
    async with open_world(setting, database) as world:
        yield world
