"""APScheduler 3: jobs of a scheduler whose timer was set in a request's context."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.support.application import Reply
from tests.support.database import eventually, insert
from tests.support.world import World

from ctxdb_core import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    TransactionContext,
    commit_db_session,
    db_session,
    on_commit,
    run_in_new_ctx,
    transactional,
)

pytest.importorskip("apscheduler")


@pytest.fixture
async def scheduler() -> AsyncIterator[Any]:
    from apscheduler.schedulers.asyncio import AsyncIOScheduler

    scheduler = AsyncIOScheduler(timezone=UTC)
    scheduler.start()
    yield scheduler
    scheduler.shutdown()
    # The scheduler stops its timer in a callback of the event loop, which runs in the next turn.
    await eventually(lambda: not scheduler.running, "the scheduler runs")


@pytest.mark.parametrize("job", ["context", "transactional", "run_in_new_ctx"])
async def test_a_job_that_is_due_at_once_has_a_transaction_of_its_own(world: World, scheduler: Any, job: str) -> None:
    done = asyncio.Event()

    async def in_a_context() -> None:
        async with TransactionContext(world.db).transaction():
            await insert(world.db, "report")
        done.set()

    @transactional(world.db)
    async def in_a_transaction() -> None:
        await insert(world.db, "report")

    async def by_transactional() -> None:
        await in_a_transaction()
        done.set()

    async def bare() -> None:
        await insert(world.db, "report")
        on_commit(world.db, done.set)

    jobs: dict[str, tuple[Any, list[Any]]] = {
        "context": (in_a_context, []),
        "transactional": (by_transactional, []),
        "run_in_new_ctx": (run_in_new_ctx, [bare]),
    }
    work, args = jobs[job]

    async def handler() -> Reply:
        await insert(world.db, "request")
        scheduler.add_job(work, "date", args=args, run_date=datetime.now(UTC))
        await done.wait()
        return Reply(status=409)

    assert (await world.get(handler)).status_code == 409
    assert await world.names() == ["report"]


async def _register(db: DBConnect) -> None:
    on_commit(db, asyncio.Event)


@pytest.mark.parametrize("ask", [db_session, commit_db_session, _register])
async def test_a_job_without_a_unit_of_its_own_is_refused_the_requests_session(
    world: World, scheduler: Any, ask: Callable[[DBConnect], Awaitable[object]]
) -> None:
    errors: list[ContextNotInitiatedError] = []
    done = asyncio.Event()

    async def work() -> None:
        try:
            await ask(world.db)
        except ContextNotInitiatedError as exc:
            errors.append(exc)
        finally:
            done.set()

    async def handler() -> Reply:
        await insert(world.db, "request")
        scheduler.add_job(work, "date", run_date=datetime.now(UTC))
        await done.wait()
        # A helper that the handler waits for takes part in its work.
        await asyncio.gather(insert(world.db, "helper"))
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert await world.names() == ["helper", "request"]
    (error,) = errors
    assert "a scheduler has started this job" in str(error)


async def test_later_jobs_have_transactions_of_their_own_although_a_request_has_set_the_timer(
    world: World, scheduler: Any
) -> None:
    runs: list[str] = []

    async def work() -> None:
        with pytest.raises(ContextClosedError):
            await db_session(world.db)
        async with TransactionContext(world.db).transaction():
            await insert(world.db, f"report {len(runs)}")
        runs.append("done")

    async def handler() -> Reply:
        await insert(world.db, "request")
        scheduler.add_job(work, "interval", seconds=0.1)
        return Reply()

    assert (await world.get(handler)).status_code == 200
    await world.stop()
    await eventually(lambda: len(runs) >= 2, "the job does not run")
    scheduler.remove_all_jobs()
    assert (await world.names())[:3] == ["report 0", "report 1", "request"]
