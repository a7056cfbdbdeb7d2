"""taskiq: tasks of its broker in memory, which development and tests run beside the requests that send them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from taskiq import AsyncTaskiqTask, InMemoryBroker
from tests.support.application import Reply, current_request
from tests.support.database import Database, insert
from tests.support.world import World

from ctxdb_core import (
    ContextNotInitiatedError,
    DBConnect,
    TransactionContext,
    new_db_ctx,
    on_commit,
    retry_on_conflict,
    transactional,
)
from ctxdb_starlette import DBSessionMiddleware

Task = Callable[[bool], Awaitable[None]]


@pytest.fixture
async def broker() -> AsyncIterator[InMemoryBroker]:
    broker = InMemoryBroker()
    await broker.startup()
    yield broker
    await broker.shutdown()


async def write(db: DBConnect, *, fails: bool) -> None:
    await insert(db, "task")
    if fails:
        raise LookupError


def by_transactional(db: DBConnect) -> Task:
    @transactional(db)
    async def task(fails: bool) -> None:
        await write(db, fails=fails)

    return task


def in_a_context(db: DBConnect) -> Task:
    async def task(fails: bool) -> None:
        async with TransactionContext(db).transaction():
            await write(db, fails=fails)

    return task


def by_retry(db: DBConnect) -> Task:
    @retry_on_conflict()
    async def task(fails: bool) -> None:
        await write(db, fails=fails)

    return task


def in_a_unit_with_a_block(db: DBConnect) -> Task:
    """The block takes part in the unit of work that the task has opened, and is undone with it."""

    async def task(fails: bool) -> None:
        async with new_db_ctx():
            async with transactional(db):
                await write(db, fails=False)
            if fails:
                raise LookupError

    return task


@pytest.mark.parametrize("work", [by_transactional, in_a_context, by_retry, in_a_unit_with_a_block])
async def test_a_task_commits_and_rolls_back_its_own_work_as_in_a_worker(
    world: World, broker: InMemoryBroker, work: Callable[[DBConnect], Task]
) -> None:
    task = broker.task(task_name="work")(work(world.db))
    kicked: list[AsyncTaskiqTask[Any]] = []

    async def handler() -> Reply:
        query = current_request.get().query

        async def send() -> None:
            kicked.append(await task.kiq("fails" in query))

        await insert(world.db, "request")
        if "on_commit" in query:
            on_commit(world.db, send)
        else:
            await send()
            await kicked[-1].wait_result(check_interval=0.005, timeout=10)
        return Reply()

    client = await world.start(("/", handler))
    for query in ("", "on_commit", "fails", "on_commit&fails"):
        assert (await client.get(f"/?{query}")).status_code == 200
        result = await kicked[-1].wait_result(check_interval=0.005, timeout=10)
        assert isinstance(result.error, LookupError) is ("fails" in query)
        assert await world.names() == (["request"] if "fails" in query else ["request", "task"])
        await world.database.query("DELETE FROM item")


async def test_a_task_without_a_unit_of_its_own_is_refused_the_requests_session(
    world: World, broker: InMemoryBroker
) -> None:
    results: list[Any] = []

    @broker.task(task_name="bare")
    async def bare() -> None:
        await insert(world.db, "task")

    async def handler() -> Reply:
        await insert(world.db, "request")
        results.append(await (await bare.kiq()).wait_result(check_interval=0.005, timeout=10))
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert isinstance(results[0].error, ContextNotInitiatedError)
    assert await world.names() == ["request"]


async def test_a_task_that_calls_an_application_in_its_own_process_is_a_client_like_any_other(
    db: DBConnect, database: Database, broker: InMemoryBroker
) -> None:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware)
    join = by_transactional(db)

    @app.post("/", status_code=409)
    async def refuse() -> None:
        await join(False)

    @broker.task(task_name="call")
    async def call() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            return (await client.post("/")).status_code

    async with new_db_ctx():
        result = await (await call.kiq()).wait_result(check_interval=0.005, timeout=10)
    assert result.return_value == 409
    assert await database.names() == []
