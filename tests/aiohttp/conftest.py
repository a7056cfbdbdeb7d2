from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from aiohttp import web
from tests.support.database import Database
from tests.support.frameworks.aiohttp import serve_aiohttp

Serve = Callable[[web.Application], Awaitable[str]]


either_way = pytest.mark.parametrize(
    "handler_cancellation", [False, True], ids=["handlers_outlive_clients", "clients_cancel_handlers"]
)


@pytest.fixture
def handler_cancellation() -> bool:
    """Whether a handler is cancelled when its client leaves: not by default, but aiohttp's test server does so."""
    return False


@pytest.fixture
async def serve(database: Database, handler_cancellation: bool) -> AsyncIterator[Serve]:
    """Serve applications until the end of the test, and return their base URLs."""
    async with AsyncExitStack() as stack:

        async def start(app: web.Application) -> str:
            return await stack.enter_async_context(serve_aiohttp(app, handler_cancellation=handler_cancellation))

        yield start
        await database.assert_quiet()
