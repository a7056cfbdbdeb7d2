"""The kinds of responses and handlers that Litestar has, and what runs behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import MediaType, Request, Response, get, post
from litestar.background_tasks import BackgroundTask, BackgroundTasks
from litestar.config.compression import CompressionConfig
from litestar.response import File, Redirect, ServerSentEvent, Stream
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.litestar_app import Ask, answering, litestar_app

from ctxdb_core import ContextClosedError, DBConnect, db_session, new_db_ctx
from ctxdb_core.asgi import ASGIApp, Message, Receive, Scope, Send

# --- kinds of responses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "redirect", "empty", "plain", "custom"])
async def test_every_kind_of_response_is_committed_first(
    db: DBConnect, database: Database, ask: Ask, tmp_path: Path, kind: str
) -> None:
    class Custom(Response[Any]):
        def render(self, content: Any, media_type: str, *args: Any) -> bytes:
            return b"custom"

    path = tmp_path / "file.txt"
    path.write_text("content")
    kinds: dict[str, Callable[[], Response[Any]]] = {
        "file": lambda: File(path),
        "redirect": lambda: Redirect("/elsewhere"),
        "empty": lambda: Response(None, status_code=204),
        "plain": lambda: Response("text"),
        "custom": lambda: Custom("text"),
    }

    @post("/")
    async def write() -> Response[Any]:
        await insert(db, kind)
        return kinds[kind]()

    assert (await (await ask(litestar_app(write, db=db))).post("/")).status_code < 400
    assert await database.names() == [kind]


async def test_a_response_class_of_the_application_is_committed_first(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    class Shouting(Response[Any]):
        def render(self, content: Any, media_type: str, *args: Any) -> bytes:
            return str(content).upper().encode()

    @get("/", media_type=MediaType.TEXT)
    async def write() -> str:
        await insert(db, "one")
        return "done"

    response = await (await ask(litestar_app(write, db=db, response_class=Shouting))).get("/")
    assert (response.status_code, response.text) == (200, "DONE")
    assert await database.names() == ["one"]


async def test_a_success_whose_headers_cannot_be_sent_is_a_500_that_commits_nothing(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    @post("/")
    async def write() -> Response[str]:
        await insert(db, "undone")
        return Response("success", headers={"x-name": "a\r\nb"})

    assert (await (await ask(litestar_app(write, db=db))).post("/")).status_code == 500
    assert await database.names() == []


async def test_a_response_from_the_cache_touches_no_database(db: DBConnect, database: Database, ask: Ask) -> None:
    @get("/", cache=60)
    async def write() -> str:
        await insert(db, "one")
        return "done"

    client = await ask(litestar_app(write, db=db))
    for _ in range(3):
        assert (await client.get("/")).text == "done"
    assert database.checkouts == 1
    assert await database.names() == ["one"]


async def test_a_response_that_cannot_be_rendered_rolls_back(db: DBConnect, database: Database, ask: Ask) -> None:
    @get("/")
    async def write() -> Any:
        await insert(db, "one")
        return object()

    assert (await (await ask(litestar_app(write, db=db))).get("/")).status_code == 500
    assert await database.names() == []


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_server_sent_events_read_and_write(db: DBConnect, database: Database, ask: Ask) -> None:
    @get("/")
    async def events() -> ServerSentEvent:
        await insert(db, "response")

        async def chunks() -> AsyncGenerator[str, None]:
            assert database.checked_out == 0
            session = await insert(db, "stream")
            for name in await session.scalars(text("SELECT name FROM item ORDER BY name")):
                yield name

        return ServerSentEvent(chunks())

    response = await (await ask(litestar_app(events, db=db))).get("/")
    assert response.text == "data: response\r\n\r\ndata: stream\r\n\r\n"
    await eventually(lambda: not database.checked_out, "the stream's connection is not back")
    assert await database.names() == ["response", "stream"]


async def test_a_stream_of_a_plain_iterator_holds_no_connection(db: DBConnect, database: Database, ask: Ask) -> None:
    """Litestar takes its chunks in a thread."""
    held: list[int] = []

    def chunks() -> Iterator[str]:
        for chunk in ("a", "b"):
            held.append(database.checked_out)
            yield chunk

    @get("/")
    async def read() -> Stream:
        await insert(db, "one")
        return Stream(chunks())

    assert (await (await ask(litestar_app(read, db=db))).get("/")).text == "ab"
    assert held == [0, 0]
    assert await database.names() == ["one"]


class StartHeldBack:
    """Sends the start of a response together with the first of its body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def send_later(message: Message) -> None:
            if message["type"] == "http.response.start":
                held.append(message)
                return
            while held:
                await send(held.pop())
            await send(message)

        await self.app(scope, receive, send_later)


COMPRESSION = {"compression_config": CompressionConfig("gzip", minimum_size=1)}
MIDDLEWARE = {"middleware": [StartHeldBack]}


@pytest.mark.parametrize("options", [{}, COMPRESSION, MIDDLEWARE, {**COMPRESSION, **MIDDLEWARE}])
async def test_a_cursor_that_a_stream_keeps_open_outlives_the_start(
    db: DBConnect, database: Database, ask: Ask, options: dict[str, Any]
) -> None:
    @get("/")
    async def read() -> Stream:
        await insert(db, "response")

        async def chunks() -> AsyncGenerator[str, None]:
            session = await db_session(db)
            rows = await session.stream(text("SELECT generate_series(1, 100)"), execution_options={"yield_per": 5})
            async for row in rows:
                yield f"{row[0]},"

        return Stream(chunks())

    response = await (await ask(litestar_app(read, db=db, **options))).get("/", headers={"accept-encoding": "gzip"})
    assert response.text.endswith("99,100,")
    assert await database.names() == ["response"]


@pytest.mark.parametrize("options", [{}, MIDDLEWARE])
@pytest.mark.parametrize("when", ["before_the_first_chunk", "after_it"])
async def test_a_stream_that_fails_does_not_undo_the_response(
    db: DBConnect, database: Database, ask: Ask, options: dict[str, Any], when: str
) -> None:
    @get("/")
    async def read() -> Stream:
        await insert(db, "response")

        async def chunks() -> AsyncGenerator[str, None]:
            await insert(db, "stream")
            if when == "after_it":
                yield "chunk"
            raise LookupError

        return Stream(chunks())

    client = await ask(litestar_app(read, db=db, **options))
    with suppress(httpx.RemoteProtocolError):
        # A body that was begun breaks off.
        await client.get("/")
    await eventually(lambda: database.checkouts == 2 and not database.checked_out, "not rolled back")
    assert await database.names() == ["response"]


@pytest.mark.parametrize("options", [{}, MIDDLEWARE])
async def test_a_failing_commit_is_answered_instead_of_a_stream(
    db: DBConnect, ask: Ask, options: dict[str, Any]
) -> None:
    begun: list[str] = []

    @get("/")
    async def read() -> Stream:
        await insert_row_that_fails_at_commit(db)

        async def chunks() -> AsyncGenerator[str, None]:
            begun.append("stream")
            yield "success"

        return Stream(chunks())

    app = litestar_app(read, db=db, exception_handlers={IntegrityError: answering(409)}, **options)
    response = await (await ask(app)).get("/")
    assert (response.status_code, response.text) == (409, "handled IntegrityError")
    assert begun == []


# --- background tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_task_group", [False, True])
async def test_background_tasks_share_the_unit_of_work(
    db: DBConnect, database: Database, ask: Ask, in_task_group: bool
) -> None:
    async def own(name: str) -> None:
        async with new_db_ctx():
            await insert(db, name)

    @post("/")
    async def write() -> Response[str]:
        await insert(db, "response")
        tasks = [BackgroundTask(insert, db, "shared"), BackgroundTask(own, "own")]
        return Response("done", background=BackgroundTasks(tasks, run_in_task_group=in_task_group))

    assert (await (await ask(litestar_app(write, db=db))).post("/")).status_code == 201
    await eventually(lambda: database.checkouts == 3 and not database.checked_out, "no background work")
    assert await database.names() == ["own", "response", "shared"]


async def test_a_background_task_that_fails_undoes_only_its_own_work(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    async def fail() -> None:
        await insert(db, "background")
        raise LookupError

    @post("/", background=BackgroundTask(fail))
    async def write() -> None:
        await insert(db, "response")

    assert (await (await ask(litestar_app(write, db=db))).post("/")).status_code == 201
    await eventually(lambda: database.checkouts == 2 and not database.checked_out, "no background work")
    assert await database.names() == ["response"]


async def test_a_task_that_outlives_its_request_gets_an_error(db: DBConnect, ask: Ask) -> None:
    release = asyncio.Event()
    left: list[asyncio.Task[object]] = []

    async def late() -> object:
        await release.wait()
        return await db_session(db)

    @post("/")
    async def write() -> None:
        left.append(asyncio.create_task(late()))

    assert (await (await ask(litestar_app(write, db=db))).post("/")).status_code == 201
    release.set()
    with pytest.raises(ContextClosedError, match="run_in_new_ctx"):
        await left[0]


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "names"), [(201, ["one"]), (409, [])])
async def test_a_sync_handler_reaches_the_session_through_the_loop(
    db: DBConnect, database: Database, ask: Ask, status: int, names: list[str]
) -> None:
    loop = asyncio.get_running_loop()

    @post("/", sync_to_thread=True)
    def write() -> Response[None]:
        asyncio.run_coroutine_threadsafe(insert(db, "one"), loop).result()
        return Response(None, status_code=status)

    assert (await (await ask(litestar_app(write, db=db))).post("/")).status_code == status
    assert await database.names() == names


async def test_a_sync_handler_with_a_loop_of_its_own_needs_a_unit_of_its_own(
    db: DBConnect, database: Database, ask: Ask
) -> None:
    async def in_new_ctx() -> None:
        async with new_db_ctx():
            await insert(db, "one")

    @post("/", sync_to_thread=True)
    def write() -> None:
        with pytest.raises(Exception, match="another thread"):
            asyncio.run(insert(db, "lost"))
        asyncio.run(in_new_ctx())

    assert (await (await ask(litestar_app(write, db=db))).post("/")).status_code == 201
    assert await database.names() == ["one"]


async def test_synchronous_hooks_do_not_disturb_the_unit_of_work(db: DBConnect, database: Database, ask: Ask) -> None:
    def hook(*args: Any) -> None: ...

    def after_request(response: Response[Any]) -> Response[Any]:
        return response

    @post("/", sync_to_thread=False, guards=[hook], after_response=hook, after_request=after_request)
    def note(request: Request[Any, Any, Any]) -> None: ...

    @post("/write", guards=[hook], after_response=hook, after_request=after_request)
    async def write() -> None:
        await insert(db, "one")

    client = await ask(litestar_app(note, write, db=db, before_send=[hook], after_exception=[hook]))
    assert (await client.post("/")).status_code == 201
    assert (await client.post("/write")).status_code == 201
    assert await database.names() == ["one"]
