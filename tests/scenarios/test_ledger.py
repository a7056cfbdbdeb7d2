"""All promises at once: requests of every kind, by the thousand, and a database that holds what they were answered."""

from __future__ import annotations

import asyncio
import os
from random import SystemRandom

import pytest
from tests.support.desk import Desk
from tests.support.ledger import Ledger
from tests.support.world import World

from ctxdb_core import ContextClosedError

REQUESTS = int(os.environ.get("CTXDB_LEDGER_REQUESTS", "300"))
"""How many requests each adapter gets: by default, they take a second, and each act comes about a dozen times."""

SEED = os.environ.get("CTXDB_LEDGER_SEED") or str(SystemRandom().randrange(1_000_000))
"""What each request does is drawn by it; how they meet each other is up to the machine."""

CLIENTS = 40


@pytest.mark.sockets
@pytest.mark.asyncpg
async def test_the_database_holds_what_was_answered_and_nothing_else(world: World) -> None:
    async with world.database.connect() as other:
        desk = Desk(world.db, other)
        ledger = Ledger.draw(REQUESTS, SEED, world.setting.adapter, desk)
        await world.start(("/", ledger.handle))
        async with asyncio.timeout(75 + REQUESTS / 20):
            await ledger.make_all_requests(world.base_url, CLIENTS)
        await world.database.assert_quiet()
        await world.stop()
        desk.release.set()
        for left_over in await asyncio.gather(*desk.left_over, return_exceptions=True):
            assert isinstance(left_over, ContextClosedError)
    await ledger.compare(world.database)
    problems = "\n".join(ledger.problems[:20])
    assert not ledger.problems, f"{len(ledger.problems)} problems; CTXDB_LEDGER_SEED={SEED} repeats it:\n{problems}"
