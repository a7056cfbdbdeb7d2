"""aiojobs: jobs that requests spawn, of which some wait until another request's job has ended."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.support.application import Reply
from tests.support.database import Database, insert
from tests.support.server import http_client
from tests.support.world import World

from ctxdb_core import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    TransactionContext,
    atomic_db_session,
    new_db_ctx,
    retry_on_conflict,
    run_in_new_ctx,
    transactional,
)

aiojobs: Any = pytest.importorskip("aiojobs")

Write = Callable[[str], Awaitable[None]]


def in_a_context(db: DBConnect) -> Write:
    async def write(name: str) -> None:
        async with TransactionContext(db).transaction():
            await insert(db, name)

    return write


def in_a_session(db: DBConnect) -> Write:
    async def write(name: str) -> None:
        async with TransactionContext(db).session() as session:
            await insert(db, name)
            await session.commit()

    return write


def by_transactional(db: DBConnect) -> Write:
    @transactional(db)
    async def write(name: str) -> None:
        await insert(db, name)

    return write


def by_nested(db: DBConnect) -> Write:
    @transactional(db, "nested")
    async def write(name: str) -> None:
        await insert(db, name)

    return write


def by_retry(db: DBConnect) -> Write:
    @retry_on_conflict()
    async def write(name: str) -> None:
        await insert(db, name)

    return write


def by_run_in_new_ctx(db: DBConnect) -> Write:
    async def write(name: str) -> None:
        await run_in_new_ctx(insert, db, name)

    return write


def in_a_unit_with_a_block(db: DBConnect) -> Write:
    """The block takes part in the unit of work that the job has opened."""
    joined = by_transactional(db)

    async def write(name: str) -> None:
        with pytest.raises(LookupError):
            async with new_db_ctx():
                await joined("undone")
                raise LookupError
        async with new_db_ctx():
            await joined(name)

    return write


jobs = pytest.mark.parametrize(
    "job",
    [in_a_context, in_a_session, by_transactional, by_nested, by_retry, by_run_in_new_ctx, in_a_unit_with_a_block],
)


class Office:
    """Orders by mail: one mail at a time is sent, and bob's request goes on until ada's mail has been."""

    def __init__(self, world: World, scheduler: Any, write: Write) -> None:
        self.ada_is_answered, self.ada_is_done = asyncio.Event(), asyncio.Event()
        self.errors: list[BaseException] = []
        self._world, self._scheduler, self._write = world, scheduler, write

    async def bob(self) -> Reply:
        await insert(self._world.db, "bob's order")
        await self._scheduler.spawn(self._send_to_bob())
        await self.ada_is_done.wait()
        return Reply(status=409)

    async def ada(self) -> Reply:
        await insert(self._world.db, "ada's order")
        await self._scheduler.spawn(self._send_to_ada())
        return Reply()

    async def _send_to_bob(self) -> None:
        await self.ada_is_answered.wait()

    async def _send_to_ada(self) -> None:
        try:
            await self._write("mail to ada")
        except Exception as exc:  # noqa: BLE001 - it is what the test looks at
            self.errors.append(exc)
        self.ada_is_done.set()

    async def open(self) -> tuple[int, int]:
        """Take both orders; return the statuses of the answers."""
        client = await self._world.start(("/bob", self.bob), ("/ada", self.ada))
        bob = asyncio.create_task(client.get("/bob"))
        while not self._scheduler.active_count:
            await asyncio.sleep(0.001)
        ada = (await client.get("/ada")).status_code
        assert self._scheduler.pending_count == 1
        self.ada_is_answered.set()
        return ada, (await bob).status_code


@jobs
async def test_a_job_that_starts_in_another_request_has_a_transaction_of_its_own(
    world: World, job: Callable[[DBConnect], Write]
) -> None:
    async with aiojobs.Scheduler(limit=1) as scheduler:
        office = Office(world, scheduler, job(world.db))
        assert await office.open() == (200, 409)
    assert office.errors == []
    assert await world.names() == ["ada's order", "mail to ada"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks cannot be started eagerly")
@pytest.mark.parametrize("job", [in_a_context, by_transactional])
async def test_a_job_that_is_started_eagerly_in_another_request_has_a_transaction_of_its_own(
    world: World, job: Callable[[DBConnect], Write]
) -> None:
    loop = asyncio.get_running_loop()
    factory: Any = vars(asyncio)["eager_task_factory"]
    async with aiojobs.Scheduler(limit=1) as scheduler:
        office = Office(world, scheduler, job(world.db))
        loop.set_task_factory(factory)
        assert await office.open() == (200, 409)
        loop.set_task_factory(None)
    assert office.errors == []
    assert await world.names() == ["ada's order", "mail to ada"]


async def test_a_job_whose_transaction_would_be_another_requests_is_told_so(world: World) -> None:
    async def write(name: str) -> None:
        async with atomic_db_session(world.db):
            pytest.fail("the block was entered")

    async with aiojobs.Scheduler(limit=1) as scheduler:
        office = Office(world, scheduler, write)
        assert await office.open() == (200, 409)
    (error,) = office.errors
    assert isinstance(error, ContextNotInitiatedError)
    assert "a scheduler has started this job" in str(error)
    assert await world.names() == ["ada's order"]


@jobs
async def test_a_job_behind_its_request_has_a_transaction_of_its_own(
    world: World, job: Callable[[DBConnect], Write]
) -> None:
    answered = asyncio.Event()

    async def behind() -> None:
        await answered.wait()
        with pytest.raises(ContextClosedError, match="run_in_new_ctx"):
            await insert(world.db, "bare")
        await job(world.db)("mail")

    async def handler() -> Reply:
        spawned.append(await scheduler.spawn(behind()))
        return Reply()

    spawned: list[Any] = []
    async with aiojobs.Scheduler() as scheduler:
        assert (await world.get(handler)).status_code == 200
        await world.stop()
        answered.set()
        await spawned[0].wait()
    assert await world.names() == ["mail"]


async def test_a_job_that_is_spawned_by_the_integration_of_aiohttp_has_a_unit_of_its_own(
    db: DBConnect, database: Database
) -> None:
    from aiohttp import web
    from aiohttp.test_utils import TestServer
    from aiojobs.aiohttp import setup as setup_jobs
    from aiojobs.aiohttp import spawn

    from ctxdb_aiohttp import setup

    async def order(request: web.Request) -> web.Response:
        await insert(db, "order")
        job = await spawn(request, run_in_new_ctx(insert, db, "mail"))
        await job.wait()
        return web.Response(status=409)

    app = web.Application()
    app.router.add_post("/", order)
    setup(app, db)
    setup_jobs(app)
    async with TestServer(app) as server, http_client(str(server.make_url("/"))) as client:
        assert (await client.post("/")).status_code == 409
    assert await database.names() == ["mail"]


async def test_a_handler_that_is_a_job_has_its_requests_session_and_blocks_of_its_own(
    db: DBConnect, database: Database
) -> None:
    from aiohttp import web
    from aiohttp.test_utils import TestServer
    from aiojobs.aiohttp import atomic
    from aiojobs.aiohttp import setup as setup_jobs

    from ctxdb_aiohttp import setup

    async def order(request: web.Request) -> web.Response:
        await insert(db, "order")
        await by_transactional(db)("audit")
        return web.Response(status=409)

    app = web.Application()
    app.router.add_post("/", atomic(order))
    setup(app, db)
    setup_jobs(app)
    async with TestServer(app) as server, http_client(str(server.make_url("/"))) as client:
        assert (await client.post("/")).status_code == 409
    assert await database.names() == ["audit"]
