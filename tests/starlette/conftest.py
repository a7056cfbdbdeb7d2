from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from tests.support.database import Database
from tests.support.stacks import Ask


@pytest.fixture(params=[False, True], ids=["in_process", "sockets"])
async def ask(request: pytest.FixtureRequest, database: Database) -> AsyncGenerator[Ask, None]:
    async with AsyncExitStack() as stack:
        yield Ask(stack, request.param)


@pytest.fixture(params=[Starlette, FastAPI])
def framework(request: pytest.FixtureRequest) -> type[Starlette]:
    kind: type[Starlette] = request.param
    return kind
