"""Promises 1, 2 and 7: every way a handler can end, and what is in the database afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Refusal, Reply, Stream, current_request
from tests.support.database import Item, eventually, insert
from tests.support.server import RawClient
from tests.support.world import World

from ctxdb_core import commit_2xx, commit_policy, db_session


async def test_a_status_below_400_commits(world: World) -> None:
    async def handler() -> Reply:
        status = current_request.get().query
        await insert(world.db, status)
        return Reply(status=int(status))

    client = await world.start(("/", handler))
    answered: list[str] = []
    for status in ("200", "201", "202", "204", "301", "303", "307", "399"):
        answered.append(str((await client.get(f"/?{status}")).status_code))
        assert answered[-1] == status
        assert await world.names() == answered


async def test_a_status_from_400_on_rolls_back(world: World) -> None:
    async def handler() -> Reply:
        status = current_request.get().query
        await insert(world.db, status)
        return Reply(status=int(status))

    client = await world.start(("/", handler))
    for status in (400, 404, 409, 422, 500, 503):
        assert (await client.get(f"/?{status}")).status_code == status
        assert await world.names() == []


async def test_a_raised_http_exception_counts_by_its_status(world: World) -> None:
    async def handler() -> Reply:
        status = current_request.get().query
        await insert(world.db, status)
        raise Refusal(int(status))

    client = await world.start(("/", handler))
    for status in (400, 303, 404, 503):
        assert (await client.get(f"/?{status}")).status_code == status
        assert await world.names() == ([] if status == 400 else ["303"])


async def test_an_exception_rolls_back(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        raise LookupError

    assert (await world.get(handler)).status_code == 500
    assert await world.names() == []


class Stop(BaseException):
    pass


@pytest.mark.parametrize("exception", [Stop, GeneratorExit, asyncio.CancelledError])
async def test_base_exception_rolls_back(world: World, exception: type[BaseException]) -> None:
    """Servers answer the exception by 500 or by hanging up; without a server, the client gets to see it."""

    async def handler() -> Reply:
        await insert(world.db, "one")
        raised.set()
        raise exception

    raised = asyncio.Event()
    request = asyncio.create_task(world.get(handler))
    await raised.wait()
    await eventually(lambda: not world.database.checked_out, "a connection is not back")
    if exception is asyncio.CancelledError and not world.setting.adapter.answers_for_cancelled_handlers:
        request.cancel()
    try:
        status = (await request).status_code
    except (exception, httpx.TransportError):
        status = 500
    assert status == 500
    assert await world.names() == []


@pytest.mark.exception_handlers
@pytest.mark.parametrize(("status", "committed"), [(202, True), (418, False)])
async def test_a_handled_exception_counts_by_the_status_of_its_response(
    world: World, status: int, committed: bool
) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        raise LookupError

    world.application.exception_statuses[LookupError] = status
    response = await world.get(handler)
    assert (response.status_code, response.text) == (status, "handled LookupError")
    assert await world.names() == (["one"] if committed else [])


async def test_a_cancelled_handler_rolls_back(world: World) -> None:
    async def handler() -> Reply:
        await insert(world.db, "one")
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            return Reply(status=504)
        return Reply()

    assert (await world.get(handler)).status_code == 504
    assert await world.names() == []


async def test_objects_that_were_only_added_are_committed(world: World) -> None:
    async def handler() -> Reply:
        (await db_session(world.db)).add(Item(name="one"))
        return Reply(status=201)

    assert (await world.get(handler)).status_code == 201
    assert await world.names() == ["one"]


async def test_the_next_request_sees_the_write(world: World) -> None:
    count = 0

    async def write() -> Reply:
        nonlocal count
        count += 1
        await insert(world.db, f"{count:03}")
        return Reply(f"{count:03}")

    client = await world.start(("/", write))
    for _ in range(20):
        written = (await client.post("/")).text
        assert written in await world.names()


async def test_a_streamed_response_is_committed_before_its_first_byte(world: World) -> None:
    seen: list[list[str]] = []

    async def chunks() -> AsyncGenerator[str, None]:
        seen.append(await world.names())
        yield "body"

    async def handler() -> Stream:
        await insert(world.db, "one")
        return Stream(chunks())

    assert (await world.get(handler)).text == "body"
    assert seen == [["one"]]


@pytest.mark.sockets
@pytest.mark.postgresql
@pytest.mark.parametrize("streamed", [False, True])
async def test_no_byte_leaves_before_the_commit_is_over(world: World, streamed: bool) -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        yield "body"

    async def handler() -> Reply | Stream:
        await insert(world.db, "one")
        return Stream(chunks()) if streamed else Reply("body")

    await world.start(("/", handler))
    async with RawClient.connect(world.base_url) as client:
        with world.database.held_commits():
            await client.send("/")
            head = asyncio.create_task(client.read_head())
            await world.database.commit_is_held()
            for _ in range(20):
                # A byte that was sent would arrive in these turns of the event loop.
                await asyncio.sleep(0)
                assert not head.done()
        assert await head == 200
        assert await world.names() == ["one"]
        assert await client.read_body() == b"body"


async def test_a_commit_policy_decides_what_commits(world: World) -> None:
    count = 0

    async def handler() -> Reply:
        nonlocal count
        count += 1
        await insert(world.db, str(statuses[count - 1]))
        return Reply(status=statuses[count - 1])

    statuses = [200, 204, 303, 404, 409]
    world.application.commit_policy = commit_policy(commit_2xx, commit={404}, roll_back={204})
    client = await world.start(("/", handler))
    assert [(await client.post("/")).status_code for _ in statuses] == statuses
    assert await world.names() == ["200", "404"]


async def test_a_policy_that_fails_is_an_error_and_rolls_back(world: World) -> None:
    def policy(status: int) -> bool:
        if status == 200:
            raise LookupError
        return False

    async def handler() -> Reply:
        await insert(world.db, "one")
        return Reply()

    world.application.commit_policy = policy
    assert (await world.get(handler)).status_code == 500
    assert await world.names() == []


async def test_before_commit_gets_the_session_and_can_refuse(world: World) -> None:
    seen: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        seen.append(session)
        if len(seen) == 2:
            raise Refusal(409)

    async def handler() -> Reply:
        used.append(await insert(world.db, f"{len(seen)}"))
        return Reply()

    used: list[AsyncSession] = []
    world.application.before_commit = before_commit
    client = await world.start(("/", handler))
    assert (await client.post("/")).status_code == 200
    assert (await client.post("/")).status_code == 500
    assert seen == used
    assert await world.names() == ["0"]


async def test_a_request_that_asks_for_no_session_touches_no_database(world: World) -> None:
    async def handler() -> Reply:
        return Reply("hello")

    assert (await world.get(handler)).text == "hello"
    assert world.database.engines == []


async def test_a_session_without_a_statement_takes_no_connection(world: World) -> None:
    async def handler() -> Reply:
        await db_session(world.db)
        return Reply()

    assert (await world.get(handler)).status_code == 200
    assert world.database.checkouts == 0
