"""The phases of a request: each transition of the table that an aiohttp application can reach, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import websockets
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler, Middleware
from sqlalchemy.exc import IntegrityError
from tests.aiohttp.conftest import Serve
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.phases import ShownTransitions, Transition, noted_transitions
from tests.support.wire import Wire, ask
from websockets.exceptions import ConnectionClosedError

from ctxdb_aiohttp import setup
from ctxdb_core import AbandonedWorkError, ContextClosedError, DBConnect
from ctxdb_core.adapters import Phase

# No middleware of aiohttp can hold the start of a response back while its body runs.
shows = ShownTransitions(
    skipped={Phase.AHEAD, Phase.OVERRULED},
    # A response whose start was cancelled in the middle of its commit has no body yet in aiohttp.
    not_taken={(Phase.BODY, Phase.HANDLING)},
)


@pytest.fixture
def transitions(monkeypatch: pytest.MonkeyPatch) -> list[Transition]:
    """Return the transitions of the requests of the test, in their order."""
    return noted_transitions(monkeypatch, "ctxdb_aiohttp.exchange.check_transition")


def application(handler: Handler, *middlewares: Middleware) -> web.Application:
    app = web.Application(middlewares=middlewares)
    app.router.add_get("/", handler)
    setup(app)
    return app


def whose_commit_fails(db: DBConnect, *, prepares: bool) -> Handler:
    """Return a handler whose commit fails in its own ``prepare()``, if it calls that, and else in aiohttp's."""

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        response = web.Response(text="success")
        if prepares:
            await response.prepare(request)
        return response

    return handler


@web.middleware
async def answer_409(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except IntegrityError:
        return web.Response(status=409, text="handled")


def giving_up(answer: Callable[[web.Request], Awaitable[web.StreamResponse]], at_work: asyncio.Event) -> Middleware:
    """Return a middleware that answers in the place of a handler, once that is at work."""
    calls: list[object] = []

    @web.middleware
    async def give_up(request: web.Request, handler: Handler) -> web.StreamResponse:
        calls.append(asyncio.ensure_future(handler(request)))
        await at_work.wait()
        return await answer(request)

    return give_up


# --- requests that stay in their first phase --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404])
async def test_a_response_with_a_whole_body_is_answered_without_a_transition(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition], status: int
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        return web.Response(status=status)

    assert (await ask(await serve(application(handler)))).status == status
    assert transitions == []
    assert await database.names() == (["one"] if status == 200 else [])


async def test_an_exception_in_the_first_phase_is_rolled_back(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "one")
        raise LookupError

    assert (await ask(await serve(application(handler)))).status == 500
    assert transitions == []
    assert await database.names() == []


# --- the rows of the table --------------------------------------------------------------------------------------------


@shows(Phase.HANDLING, Phase.BODY)
@shows(Phase.BODY, Phase.AFTER)
async def test_a_stream_passes_from_its_head_to_its_end(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "response")
        response = web.StreamResponse()
        await response.prepare(request)
        assert transitions == [(Phase.HANDLING, Phase.BODY)]
        assert await database.names() == ["response"]
        await insert(db, "body")
        await response.write_eof(b"body")
        assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.AFTER)]
        assert await database.names() == ["body", "response"]
        await insert(db, "after")
        return response

    async with Wire.connect(await serve(application(handler))) as wire:
        assert (await wire.ask("/")).summary == (200, "body")
    await eventually(lambda: database.checkouts >= 3 and not database.checked_out, "the handler goes on")
    assert await database.names() == ["after", "body", "response"]


async def test_a_body_that_aiohttp_sends_passes_from_its_head_to_its_end(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            assert transitions == [(Phase.HANDLING, Phase.BODY)]
            await insert(db, "body")
            yield b"body"

        return web.Response(body=body())

    assert (await ask(await serve(application(handler)))).summary == (200, "body")
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.AFTER)]
    assert await database.names() == ["body"]


@shows(Phase.HANDLING, Phase.REFUSED)
@pytest.mark.parametrize("prepares", [False, True])
async def test_a_response_whose_commit_fails_is_refused(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition], prepares: bool
) -> None:
    answer = await ask(await serve(application(whose_commit_fails(db, prepares=prepares))))
    assert answer.status == 500
    assert "success" not in answer.text
    assert transitions == [(Phase.HANDLING, Phase.REFUSED)]


@shows(Phase.REFUSED, Phase.HANDLING)
@pytest.mark.parametrize("prepares", [False, True])
async def test_the_answer_to_a_refused_response_is_handled_anew(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition], prepares: bool
) -> None:
    app = application(whose_commit_fails(db, prepares=prepares), answer_409)
    assert (await ask(await serve(app))).summary == (409, "handled")
    assert transitions == [(Phase.HANDLING, Phase.REFUSED), (Phase.REFUSED, Phase.HANDLING)]


async def test_a_refused_response_is_not_let_through_behind_its_answer(
    db: DBConnect, serve: Serve, transitions: list[Transition]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await insert_row_that_fails_at_commit(db)
        refused = web.StreamResponse()
        with pytest.raises(IntegrityError):
            await refused.prepare(request)
        instead = web.StreamResponse(status=409)
        await instead.prepare(request)
        with pytest.raises(IntegrityError):
            await refused.prepare(request)
        await instead.write(b"handled")
        return instead

    assert (await ask(await serve(application(handler)))).summary == (409, "handled")
    assert transitions[2:] == [(Phase.HANDLING, Phase.BODY)]


@shows(Phase.BODY, Phase.BROKEN)
@pytest.mark.parametrize("swallows", [False, True])
async def test_a_body_whose_commit_fails_has_no_end(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition], swallows: bool
) -> None:
    """Whether the handler lets the error through or takes it for nothing."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await insert_row_that_fails_at_commit(db)
        for _ in range(2):
            try:
                await response.write_eof(b"body")
            except IntegrityError:
                if not swallows:
                    raise
        with pytest.raises(IntegrityError):
            await web.StreamResponse(status=500).prepare(request)
        await insert(db, "after")
        return response

    async with Wire.connect(await serve(application(handler))) as wire:
        with pytest.raises(asyncio.IncompleteReadError):
            await wire.ask("/")
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.BROKEN)]
    await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == (["after"] if swallows else [])


async def test_a_body_that_aiohttp_sends_has_no_end_if_its_commit_fails(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncGenerator[bytes, None]:
            yield b"body"
            await insert_row_that_fails_at_commit(db)

        return web.Response(body=body())

    async with Wire.connect(await serve(application(handler))) as wire:
        with pytest.raises(asyncio.IncompleteReadError):
            await wire.ask("/")
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.BROKEN)]


@pytest.mark.skipif(
    not hasattr(AbstractStreamWriter, "send_headers"), reason="older versions of aiohttp have no buffer"
)
async def test_a_response_that_has_not_left_the_buffer_is_replaced_if_it_breaks_off(
    db: DBConnect, serve: Serve, transitions: list[Transition]
) -> None:
    """aiohttp sends the head of a plain response with its body."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.Response(text="success")
        response.enable_chunked_encoding()
        await response.prepare(request)
        await insert_row_that_fails_at_commit(db)
        return response

    answer = await ask(await serve(application(handler)))
    assert answer.status == 500
    assert "success" not in answer.text
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.BROKEN)]


@shows(Phase.AFTER, Phase.BROKEN)
async def test_work_behind_a_body_that_cannot_be_committed_closes_the_connection(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await insert(db, "body")
        await response.write_eof(b"body")
        await insert_row_that_fails_at_commit(db)
        return response

    async with Wire.connect(await serve(application(handler))) as wire:
        assert (await wire.ask("/")).summary == (200, "body")
        assert await wire.reader.read() == b""
    assert transitions[1:] == [(Phase.BODY, Phase.AFTER), (Phase.AFTER, Phase.BROKEN)]
    assert await database.names() == ["body"]


@shows(Phase.BODY, Phase.REFUSED)
async def test_a_websocket_whose_close_is_refused_undoes_what_comes_behind_it(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition]
) -> None:
    """Even if the handler takes the error for nothing."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await insert_row_that_fails_at_commit(db)
        with pytest.raises(IntegrityError):
            await socket.close()
        await insert(db, "after")
        return socket

    base_url = await serve(application(handler))
    async with websockets.connect(base_url.replace("http", "ws", 1), proxy=None) as client:
        with pytest.raises(ConnectionClosedError) as closed:
            await client.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.REFUSED)]
    await eventually(lambda: database.checkouts == 2 and not database.checked_out, "the handler goes on")
    assert await database.names() == []


@shows(Phase.HANDLING, Phase.ABANDONED)
@pytest.mark.parametrize("prepares", [False, True])
async def test_the_answer_in_the_place_of_a_handler_ends_its_unit_of_work(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition], prepares: bool
) -> None:
    at_work, answered, refused = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if not prepares:
            await insert(db, "handler")
        at_work.set()
        await answered.wait()
        with pytest.raises(ContextClosedError):
            await insert(db, "too late")
        refused.set()
        raise LookupError

    async def answer(request: web.Request) -> web.StreamResponse:
        if not prepares:
            return web.Response(text="instead")
        response = web.StreamResponse()
        await response.prepare(request)
        # Nothing was written in the unit of work, but the handler may be about to do so.
        answered.set()
        await refused.wait()
        await response.write(b"instead")
        return response

    app = application(handler, giving_up(answer, at_work))
    assert (await ask(await serve(app))).summary == (200, "instead")
    assert transitions == [(Phase.HANDLING, Phase.ABANDONED)]
    answered.set()
    await refused.wait()
    assert await database.names() == []


@shows(Phase.ABANDONED, Phase.REFUSED)
async def test_a_success_for_work_of_an_abandoned_handler_and_its_own_is_refused(
    db: DBConnect, database: Database, serve: Serve, transitions: list[Transition]
) -> None:
    at_work, answered, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        await insert(db, "handler")
        at_work.set()
        await answered.wait()
        ended.set()
        return web.Response()

    async def answer(request: web.Request) -> web.StreamResponse:
        await insert(db, "middleware")
        response = web.StreamResponse()
        with pytest.raises(AbandonedWorkError):
            await response.prepare(request)
        return web.Response(status=503, text="refused")

    app = application(handler, giving_up(answer, at_work))
    assert (await ask(await serve(app))).summary == (503, "refused")
    assert transitions == [
        (Phase.HANDLING, Phase.ABANDONED),
        (Phase.ABANDONED, Phase.REFUSED),
        (Phase.REFUSED, Phase.HANDLING),
        # The handler is still at work.
        (Phase.HANDLING, Phase.ABANDONED),
    ]
    answered.set()
    await ended.wait()
    assert await database.names() == []


def test_each_row_that_aiohttp_can_reach_has_a_test() -> None:
    shows.assert_complete()
