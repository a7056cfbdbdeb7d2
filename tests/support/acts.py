"""What the requests of the ledger do on the server: one act for each way in which a request can end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import anyio
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Refusal, Reply, Stream, current_request
from tests.support.database import insert_row_that_fails_at_commit
from tests.support.desk import Desk

from ctxdb_core import (
    atomic_db_session,
    commit_db_session,
    db_session,
    gather_in_new_ctx,
    new_non_ctx_session,
    rollback_db_session,
)

T = TypeVar("T", bound=Reply | Stream)


@dataclass(frozen=True)
class Act:
    """What a handler does. It is given a key for its rows, and a number between 0 and 1 for what is up to chance."""

    run: Callable[[Desk, str, float], Awaitable[Reply | Stream]]
    statuses: frozenset[int]
    """The statuses that an act can be answered with."""
    in_background: bool
    """Whether an act goes on behind its response."""
    reads_request: bool
    """Whether an act waits for the request's body."""

    @property
    def name(self) -> str:
        return self.run.__name__


ACTS: list[Act] = []


def act(
    *statuses: int, in_background: bool = False, reads_request: bool = False
) -> Callable[[Callable[[Desk, str, float], Awaitable[T]]], Callable[[Desk, str, float], Awaitable[T]]]:
    def register(run: Callable[[Desk, str, float], Awaitable[T]]) -> Callable[[Desk, str, float], Awaitable[T]]:
        ACTS.append(Act(run, frozenset(statuses), in_background, reads_request))
        return run

    return register


def pick(choices: Sequence[int], luck: float) -> int:
    return choices[int(luck * len(choices))]


@act(200, 201, 303)
async def succeeds(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(key)
    return Reply(key, status=pick((200, 201, 303), luck))


@act(400, 404, 409, 500, 503)
async def returns_an_error(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(key)
    return Reply(key, status=pick((400, 404, 409, 500, 503), luck))


@act(303, 400, 404, 409, 503)
async def raises_an_http_exception(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(key)
    raise Refusal(pick((303, 400, 404, 409, 503), luck))


@act(500)
async def raises_an_exception(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write_half(key, "item")
    if luck < 0.5:
        await desk.write_half(key, "parent")
    raise LookupError


@act(200)
async def sends_much(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(key)
    return Reply("x" * int(luck * 300_000))


@act(200, reads_request=True)
async def reads_its_request(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write_half(key, "item")
    body = await current_request.get().read()
    await desk.write_half(key, "parent")
    return Reply(body.decode())


# The commit fails, or the flush before it.


@act(409, 500)
async def fails_to_commit(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(key)
    await insert_row_that_fails_at_commit(desk.db)
    return Reply(key)


@act(500)
async def loses_its_connection(desk: Desk, key: str, luck: float) -> Reply:
    session = await desk.write_half(key, "item")
    if luck < 0.5:
        await desk.write_half(key, "parent")
    pid = await session.scalar(text("SELECT pg_backend_pid()"))
    async with new_non_ctx_session(desk.other) as killer:
        await killer.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    if luck >= 0.5:
        await desk.write_half(key, "parent")
    return Reply(key)


@act(500)
async def fails_to_serialize(desk: Desk, key: str, luck: float) -> Reply:
    """Each of two transactions reads what the other writes."""
    serializable = {"isolation_level": "SERIALIZABLE"}
    count = text("SELECT count(*) FROM item WHERE name = :name")
    session = await db_session(desk.db)
    await session.connection(execution_options=serializable)
    await session.scalar(count, {"name": f"{key} rival"})
    async with new_non_ctx_session(desk.other) as rival:
        await rival.connection(execution_options=serializable)
        await rival.scalar(count, {"name": key})
        desk.written.add(f"{key} rival")
        for table in ("item", "parent"):
            await rival.execute(text(f"INSERT INTO {table} VALUES (:key)"), {"key": f"{key} rival"})
        await desk.write(key)
        await rival.commit()
    return Reply(key)


@act(500)
async def runs_into_a_deadlock(desk: Desk, key: str, luck: float) -> Reply:
    """Each of two transactions waits for a row that the other has locked: the request fails, whichever one is ended."""

    async def lock(session: AsyncSession, half: int) -> None:
        await session.execute(text("SELECT pg_advisory_xact_lock(:key, :half)"), {"key": int(key), "half": half})

    await desk.write(key)
    session = await db_session(desk.db)
    await session.execute(text("SET LOCAL deadlock_timeout = 1"))
    await lock(session, 1)
    async with new_non_ctx_session(desk.other) as rival:
        await rival.execute(text("SET LOCAL deadlock_timeout = 20"))
        await lock(rival, 2)
        waiting = asyncio.create_task(lock(rival, 1))
        try:
            await lock(session, 2)
        finally:
            await rollback_db_session(desk.db)
            await waiting
    return Reply(key)


@act(500)
async def swallows_an_error(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(key)
    with suppress(IntegrityError):
        await desk.write_half(key, "item")
    return Reply(key)


# A time-out cancels the statement that is under way.


@act(200, 504)
async def times_out(desk: Desk, key: str, luck: float) -> Reply:
    try:
        async with asyncio.timeout(luck * 0.4):
            await desk.write(key)
    except TimeoutError:
        return Reply(status=504)
    return Reply(key)


@act(200, 500, 504)
async def fails_by_a_time_out(desk: Desk, key: str, luck: float) -> Reply:
    with anyio.fail_after(luck * 0.4):
        await desk.write(key)
    return Reply(key)


@act(200, 500)
async def ignores_a_time_out(desk: Desk, key: str, luck: float) -> Reply:
    """The transaction is lost together with the statement that is interrupted."""
    await desk.write_half(key, "item")
    with anyio.move_on_after(luck * 0.003):
        await desk.write_half(key, "parent")
    return Reply(key)


# Parts of the work have transactions of their own.


@act(200, 409, 500)
async def commits_early(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(f"{key} early")
    await commit_db_session(desk.db)
    desk.kept.add(f"{key} early")
    await desk.write(key)
    if luck < 0.5:
        raise LookupError
    return Reply(key, status=pick((200, 409), luck * 2 - 1))


@act(200)
async def rolls_a_savepoint_back(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write(key)
    desk.undone.add(f"{key} savepoint")
    with suppress(LookupError):
        async with atomic_db_session(desk.db, "savepoint"):
            for table in ("item", "parent"):
                await desk.write_half(f"{key} savepoint", table)
            raise LookupError
    return Reply(key)


@act(200, 404)
async def uses_several_sessions(desk: Desk, key: str, luck: float) -> Reply:
    async def write_part(part: int) -> None:
        await desk.write(f"{key} {part}")

    await gather_in_new_ctx(*(lambda part=part: write_part(part) for part in range(3)))
    desk.kept.update(f"{key} {part}" for part in range(3))
    await desk.write(key)
    return Reply(key, status=pick((200, 404), luck))


@act(200, 404)
async def uses_two_databases(desk: Desk, key: str, luck: float) -> Reply:
    await desk.write_half(key, "item")
    await desk.write_half(key, "parent", desk.other)
    return Reply(key, status=pick((200, 404), luck))


# The database is used behind the response.


@act(200)
async def streams(desk: Desk, key: str, luck: float) -> Stream:
    async def chunks() -> AsyncGenerator[str, None]:
        async with atomic_db_session(desk.db):
            await desk.write(f"{key} stream")
        desk.kept.add(f"{key} stream")
        for _ in range(int(luck * 4)):
            yield "x" * 65536
        await desk.write(f"{key} tail")
        yield "end"

    await desk.write(key)
    return Stream(chunks())


@act(200)
async def fails_in_its_stream(desk: Desk, key: str, luck: float) -> Stream:
    async def chunks() -> AsyncGenerator[str, None]:
        yield "begun"
        await desk.write(f"{key} tail")
        desk.undone.add(f"{key} tail")
        raise LookupError

    await desk.write(key)
    return Stream(chunks())


@act(200, 409, in_background=True)
async def writes_in_the_background(desk: Desk, key: str, luck: float) -> Reply:
    async def background() -> None:
        await desk.write(f"{key} background")
        desk.kept.add(f"{key} background")

    await desk.write(key)
    return Reply(key, status=pick((200, 409), luck), background=background)


@act(200, in_background=True)
async def fails_in_the_background(desk: Desk, key: str, luck: float) -> Reply:
    async def background() -> None:
        desk.undone.add(f"{key} background")
        await desk.write(f"{key} background")
        raise LookupError

    await desk.write(key)
    return Reply(key, background=background)


# A task is left behind.


@act(200, 404)
async def leaves_a_task_that_writes(desk: Desk, key: str, luck: float) -> Reply:
    async def late() -> None:
        await desk.release.wait()
        await desk.write(f"{key} late")

    await desk.write(key)
    desk.undone.add(f"{key} late")
    desk.left_over.append(asyncio.create_task(late()))
    return Reply(key, status=pick((200, 404), luck))


@act(200)
async def leaves_a_task_in_the_middle_of_a_statement(desk: Desk, key: str, luck: float) -> Reply:
    async def read() -> None:
        await session.execute(text("SELECT pg_sleep(0.001)"))

    session = await desk.write_half(key, "item")
    await desk.write_half(key, "parent")
    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda task: task.exception())
    for _ in range(int(luck * 5)):
        await asyncio.sleep(0)
    return Reply(key)
