"""The phases of a request in the guide's adapter: each transition that Quart can reach, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from quart import Quart, websocket
from sqlalchemy.exc import IntegrityError
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.phases import ShownTransitions, Transition, noted_transitions
from tests.support.server import RawClient, serve
from websockets import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ctxdb_core import DBConnect
from ctxdb_core.adapters import Phase
from ctxdb_quart import setup

# Quart passes no messages on through middlewares of its own, and nothing in it answers in the place of a handler.
shows = ShownTransitions(
    skipped={Phase.AHEAD, Phase.OVERRULED, Phase.ABANDONED},
    # A response whose start was cancelled in the middle of its commit has no body yet in Quart.
    not_taken={(Phase.BODY, Phase.HANDLING)},
)


@pytest.fixture
def app() -> Quart:
    app = Quart(__name__, static_folder=None)
    setup(app)
    return app


@pytest.fixture
def transitions(monkeypatch: pytest.MonkeyPatch) -> list[Transition]:
    """Return the transitions of the requests of the test, in their order."""
    return noted_transitions(monkeypatch, "ctxdb_quart.check_transition")


async def close_code(app: Quart, database: Database) -> int:
    """Connect to the websocket of `app`, and return the code that it is closed with, once its handler has ended."""
    async with serve(app) as base_url:
        async with connect(base_url.replace("http", "ws"), proxy=None) as socket:
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
        await eventually(lambda: not database.checked_out, "the connection is not over")
    return 1006 if closed.value.rcvd is None else closed.value.rcvd.code


@shows(Phase.HANDLING, Phase.BODY)
@shows(Phase.BODY, Phase.AFTER)
async def test_a_response_passes_from_its_head_to_its_end(
    app: Quart, db: DBConnect, database: Database, transitions: list[Transition]
) -> None:
    @app.get("/")
    async def view() -> AsyncGenerator[str, None]:
        async def chunks() -> AsyncGenerator[str, None]:
            assert transitions == [(Phase.HANDLING, Phase.BODY)]
            assert await database.names() == ["response"]
            await insert(db, "body")
            yield "body"

        await insert(db, "response")
        return chunks()

    assert await (await app.test_client().get("/")).get_data() == b"body"
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.AFTER)]
    assert await database.names() == ["body", "response"]


@shows(Phase.HANDLING, Phase.REFUSED)
async def test_a_response_whose_commit_fails_is_refused(
    app: Quart, db: DBConnect, transitions: list[Transition]
) -> None:
    @app.get("/")
    async def view() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    @app.errorhandler(IntegrityError)
    async def look(error: IntegrityError) -> str:
        assert transitions == [(Phase.HANDLING, Phase.REFUSED)]
        raise error

    assert (await app.test_client().get("/")).status_code == 500


@shows(Phase.REFUSED, Phase.HANDLING)
async def test_the_answer_to_a_refused_response_is_handled_anew(
    app: Quart, db: DBConnect, database: Database, transitions: list[Transition]
) -> None:
    @app.get("/")
    async def view() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    @app.errorhandler(IntegrityError)
    async def handle(error: IntegrityError) -> tuple[str, int]:
        await insert(db, "handler")
        return "accepted", 202

    assert (await app.test_client().get("/")).status_code == 202
    assert transitions[:3] == [
        (Phase.HANDLING, Phase.REFUSED),
        (Phase.REFUSED, Phase.HANDLING),
        (Phase.HANDLING, Phase.BODY),
    ]
    assert await database.names() == ["handler"]


@shows(Phase.BODY, Phase.BROKEN)
async def test_a_body_whose_commit_fails_has_no_end(
    app: Quart, db: DBConnect, database: Database, transitions: list[Transition]
) -> None:
    @app.get("/")
    async def view() -> AsyncGenerator[str, None]:
        async def chunks() -> AsyncGenerator[str, None]:
            yield "body"
            await insert_row_that_fails_at_commit(db)

        return chunks()

    async with serve(app) as base_url, RawClient.connect(base_url) as raw:
        await raw.send("/")
        assert await raw.read_head() == 200
        with pytest.raises(asyncio.IncompleteReadError):
            await raw.read_body()
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.BROKEN)]


async def test_a_websocket_is_in_its_body_from_the_handshake_to_the_return_of_its_handler(
    app: Quart, db: DBConnect, database: Database, transitions: list[Transition]
) -> None:
    @app.websocket("/")
    async def view() -> None:
        await insert(db, "handshake")
        await websocket.accept()
        assert transitions == [(Phase.HANDLING, Phase.BODY)]
        assert await database.names() == ["handshake"]
        await insert(db, "body")

    assert await close_code(app, database) == 1000
    assert transitions == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.AFTER)]
    assert await database.names() == ["body", "handshake"]


async def test_a_handshake_whose_commit_fails_is_answered_by_an_error_handler(
    app: Quart, db: DBConnect, transitions: list[Transition]
) -> None:
    @app.websocket("/")
    async def view() -> None:
        await insert_row_that_fails_at_commit(db)
        await websocket.send("success")

    @app.errorhandler(IntegrityError)
    async def handle(error: IntegrityError) -> tuple[str, int]:
        return "there is one", 409

    async with serve(app) as base_url:
        with pytest.raises(InvalidStatus) as refused:
            async with connect(base_url.replace("http", "ws"), proxy=None):
                pass
    assert refused.value.response.status_code == 409
    assert transitions[:2] == [(Phase.HANDLING, Phase.REFUSED), (Phase.REFUSED, Phase.HANDLING)]


@shows(Phase.BODY, Phase.REFUSED)
@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("handled", [False, True])
async def test_a_websocket_whose_commit_fails_is_closed_with_an_error(
    app: Quart, db: DBConnect, database: Database, transitions: list[Transition], closes: bool, handled: bool
) -> None:
    @app.websocket("/")
    async def view() -> None:
        await websocket.accept()
        await insert_row_that_fails_at_commit(db)
        if closes:
            await websocket.close(1000)

    if handled:

        @app.errorhandler(IntegrityError)
        async def handle(error: IntegrityError) -> str:
            return "handled"

    code = await close_code(app, database)
    # Where nothing closes it, the server does.
    assert code in (1006, 1011)
    assert transitions[:2] == [(Phase.HANDLING, Phase.BODY), (Phase.BODY, Phase.REFUSED)]
    assert await database.names() == []


@shows(Phase.AFTER, Phase.BROKEN)
async def test_work_behind_the_handler_of_a_websocket_that_cannot_be_committed_is_no_normal_close(
    app: Quart, db: DBConnect, database: Database, transitions: list[Transition]
) -> None:
    @app.teardown_websocket
    async def teardown(exc: BaseException | None) -> None:
        await insert_row_that_fails_at_commit(db)

    @app.websocket("/")
    async def view() -> None:
        await websocket.accept()
        await insert(db, "body")

    assert await close_code(app, database) in (1006, 1011)
    assert transitions[1:] == [(Phase.BODY, Phase.AFTER), (Phase.AFTER, Phase.BROKEN)]
    assert await database.names() == ["body"]


async def test_an_error_that_debugging_answers_closes_a_websocket_with_an_error(
    app: Quart, db: DBConnect, database: Database, transitions: list[Transition]
) -> None:
    app.debug = True

    @app.websocket("/")
    async def view() -> None:
        await websocket.accept()
        await insert(db, "one")
        raise LookupError

    assert await close_code(app, database) == 1011
    assert transitions == [(Phase.HANDLING, Phase.BODY)]
    assert await database.names() == []


def test_each_row_that_quart_can_reach_has_a_test() -> None:
    shows.assert_complete()
