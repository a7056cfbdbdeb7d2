from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest
from tests.support.database import Database
from tests.support.litestar_app import Ask, asker


@pytest.fixture(params=[False, True], ids=["in_process", "sockets"])
async def ask(request: pytest.FixtureRequest, database: Database) -> AsyncGenerator[Ask, None]:
    async with AsyncExitStack() as stack:
        yield asker(stack, over_sockets=request.param)
