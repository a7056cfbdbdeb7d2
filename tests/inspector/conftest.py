"""The frameworks, and the application that each test looks at."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import httpx
import pytest
from sqlalchemy import text
from tests.support.database import Database
from tests.support.server import http_client

from ctxdb_core import DBConnect, new_non_ctx_session

if TYPE_CHECKING:
    from tests.support.inspected import Desk, MakeApp

# The applications are imported where they are needed: some tests run without any framework.


@pytest.fixture(params=["starlette", "fastapi", "litestar", "aiohttp"])
def make_app(request: pytest.FixtureRequest) -> MakeApp:
    from tests.support.inspected import MAKERS

    return MAKERS[request.param]


@pytest.fixture
async def desk(database: Database) -> AsyncIterator[Desk]:
    from tests.support.inspected import Desk

    async with DBConnect.from_url(database.url, pool_size=2, max_overflow=1) as db:
        desk = Desk(db)
        # The tables are created before a client asks for the page.
        async with new_non_ctx_session(db) as session:
            await session.execute(text("SELECT 1"))
        yield desk
        for session in desk.stays:
            await session.close()


@pytest.fixture
async def client(desk: Desk, make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    from tests.support.inspected import serve_app

    async with serve_app(make_app(desk, None)) as url, http_client(url) as client:
        try:
            yield client
        finally:
            # A server waits for its handlers.
            desk.go_on.set()
