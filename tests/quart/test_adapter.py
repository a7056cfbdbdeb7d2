"""The example adapter for Quart, where Quart has ways of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from quart import Blueprint, Quart, Response, abort, request, websocket
from quart.signals import got_background_exception
from quart.typing import TestClientProtocol as Client
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.server import RawClient, serve
from websockets import connect
from websockets.exceptions import ConnectionClosedError

from ctxdb_core import ContextClosedError, DBConnect, db_session, run_in_new_ctx
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware, Message
from ctxdb_quart import setup


@pytest.fixture
def app() -> Quart:
    app = Quart(__name__, static_folder=None)
    setup(app)
    return app


@pytest.fixture
def client(app: Quart) -> Client:
    return app.test_client()


def answer(status: int) -> Any:
    async def handle(exc: Exception) -> tuple[str, int]:
        return f"handled {type(exc).__name__} of {request.path}", status

    return handle


# --- around the handler -----------------------------------------------------------------------------------------------


async def test_functions_before_and_after_the_request_belong_to_its_transaction(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    status = 200

    @app.before_request
    async def before() -> None:
        await insert(db, f"before {status}")

    @app.after_request
    async def after(response: Response) -> Response:
        await insert(db, f"after {status}")
        return response

    @app.get("/")
    async def view() -> tuple[str, int]:
        return "done", status

    assert (await client.get("/")).status_code == 200
    status = 404
    assert (await client.get("/")).status_code == 404
    assert await database.names() == ["after 200", "before 200"]


async def test_the_answer_to_a_failed_commit_passes_through_functions_after_the_request(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    @app.after_request
    async def after(response: Response) -> Response:
        response.headers["x-status"] = str(response.status_code)
        return response

    @app.get("/")
    async def view() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    app.register_error_handler(IntegrityError, answer(409))
    response = await client.get("/")
    assert (response.status_code, response.headers["x-status"]) == (409, "409")
    assert await response.get_data() == b"handled IntegrityError of /"


async def test_the_handlers_of_a_blueprint_come_first(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    blueprint = Blueprint("blueprint", __name__)

    @blueprint.get("/")
    async def view() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    blueprint.register_error_handler(IntegrityError, answer(422))
    app.register_error_handler(IntegrityError, answer(409))
    app.register_blueprint(blueprint)
    assert (await client.get("/")).status_code == 422


async def test_status_of_the_error_handler_decides_on_its_writes(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    @app.get("/")
    async def view() -> str:
        await insert(db, "view")
        await insert_row_that_fails_at_commit(db)
        return "success"

    @app.errorhandler(IntegrityError)
    async def handle(error: IntegrityError) -> tuple[str, int]:
        await insert(db, "handler")
        return "accepted", 202

    assert (await client.get("/")).status_code == 202
    assert await database.names() == ["handler"]


async def test_the_answer_to_a_policy_that_fails_commits_its_own_work_only(db: DBConnect, database: Database) -> None:
    def policy(status: int) -> bool:
        if status == 200:
            raise LookupError
        return True

    app = Quart(__name__, static_folder=None)
    setup(app, commit_policy=policy)

    @app.get("/")
    async def view() -> str:
        await insert(db, "view")
        return "success"

    @app.errorhandler(LookupError)
    async def handle(error: LookupError) -> tuple[str, int]:
        await insert(db, "handler")
        return "accepted", 202

    assert (await app.test_client().get("/")).status_code == 202
    assert await database.names() == ["handler"]


async def test_an_answer_that_cannot_be_committed_either_is_a_500(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    @app.get("/")
    async def view() -> str:
        await insert_row_that_fails_at_commit(db)
        return "success"

    @app.errorhandler(IntegrityError)
    async def handle(error: IntegrityError) -> tuple[str, int]:
        await insert(db, "handler")
        await insert_row_that_fails_at_commit(db)
        return "accepted", 202

    assert (await client.get("/")).status_code == 500
    assert await database.names() == []


async def test_a_teardown_function_holds_no_connection_while_the_response_travels(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    held: list[int] = []

    @app.teardown_request
    async def teardown(exc: BaseException | None) -> None:
        await insert(db, "teardown")

    @app.get("/")
    async def view() -> AsyncGenerator[str, None]:
        async def chunks() -> AsyncGenerator[str, None]:
            held.append(database.checked_out)
            assert await database.names() == ["teardown"]
            yield "body"

        return chunks()

    assert await (await client.get("/")).get_data() == b"body"
    assert held == [0]


async def test_the_traceback_that_debugging_answers_with_is_no_success(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    @app.get("/")
    async def view() -> str:
        await insert(db, "one")
        raise LookupError

    app.debug = app.config["PROPAGATE_EXCEPTIONS"] = True
    assert (await client.get("/")).status_code == 500
    assert await database.names() == []


async def test_a_returned_and_a_raised_response_count_alike(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    @app.get("/<int:status>/<way>")
    async def view(status: int, way: str) -> Response:
        await insert(db, f"{status} {way}")
        response = Response("done", status)
        return abort(response) if way == "raised" else response

    for status in (303, 404):
        for way in ("raised", "returned"):
            assert (await client.get(f"/{status}/{way}")).status_code == status
    assert await database.names() == ["303 raised", "303 returned"]


# --- behind the response ----------------------------------------------------------------------------------------------


async def test_a_stream_that_takes_too_long_is_rolled_back(app: Quart, db: DBConnect, database: Database) -> None:
    """Quart stops it without an error."""
    app.config["RESPONSE_TIMEOUT"] = 0.05

    @app.get("/")
    async def view() -> AsyncGenerator[str, None]:
        async def chunks() -> AsyncGenerator[str, None]:
            await insert(db, "stream")
            yield "body"
            await asyncio.Event().wait()

        await insert(db, "response")
        return chunks()

    async with serve(app) as base_url, RawClient.connect(base_url) as raw:
        await raw.send("/")
        assert await raw.read_head() == 200
        await eventually(lambda: database.checkouts == 2 and not database.checked_out, "the stream goes on")
    assert await database.names() == ["response"]


async def test_a_body_whose_work_cannot_be_committed_has_no_end(app: Quart, db: DBConnect, database: Database) -> None:
    @app.get("/")
    async def view() -> AsyncGenerator[str, None]:
        async def chunks() -> AsyncGenerator[str, None]:
            await insert(db, "stream")
            await insert_row_that_fails_at_commit(db)
            yield "body"

        return chunks()

    async with serve(app) as base_url, RawClient.connect(base_url) as raw:
        await raw.send("/")
        assert await raw.read_head() == 200
        with pytest.raises(asyncio.IncompleteReadError):
            await raw.read_body()
    assert await database.names() == []


async def test_a_background_task_needs_a_unit_of_work_of_its_own(
    app: Quart, client: Client, db: DBConnect, database: Database
) -> None:
    """Quart runs it beside the request, and beyond."""
    release = asyncio.Event()
    errors: list[Exception] = []

    async def note(app: Quart, exception: Exception, **kwargs: Any) -> None:
        errors.append(exception)

    got_background_exception.connect(note, app)

    async def work(name: str) -> None:
        await release.wait()
        await insert(db, name)

    @app.get("/")
    async def view() -> str:
        app.add_background_task(work, "orphaned")
        app.add_background_task(run_in_new_ctx, work, "own")
        return "done"

    assert (await client.get("/")).status_code == 200
    release.set()
    await eventually(lambda: not app.background_tasks, "the background tasks go on")
    assert [type(error) for error in errors] == [ContextClosedError]
    assert await database.names() == ["own"]


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_the_query_of_a_client_that_has_left_stops(app: Quart, db: DBConnect, database: Database) -> None:
    @app.get("/")
    async def view() -> str:
        session = await insert(db, "one")
        await session.execute(text("SELECT pg_sleep(300)"))
        return "done"

    async with serve(app) as base_url:
        async with RawClient.connect(base_url) as raw:
            await raw.send("/")
            await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
        await eventually(lambda: not database.backends("wait_event = 'PgSleep'"), "the query runs on")
    assert await database.names() == []


async def test_the_query_of_a_request_that_the_server_cancels_stops(
    app: Quart, db: DBConnect, database: Database
) -> None:
    @app.get("/")
    async def view() -> str:
        session = await insert(db, "one")
        await session.execute(text("SELECT pg_sleep(300)"))
        return "done"

    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError

    async with app.test_request_context("/") as context:
        scope: Any = context.request.scope
    serving: asyncio.Future[None] = asyncio.ensure_future(app(scope, receive, send))  # type: ignore[arg-type]  # untyped
    await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no query")
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert database.checked_out == 0
    await eventually(lambda: not database.backends("wait_event = 'PgSleep'"), "the query runs on")
    assert await database.names() == []
    gone.set()


# --- websockets -------------------------------------------------------------------------------------------------------


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def handshake(app: Quart) -> int:
    """Ask for a websocket, and return the status of the answer."""
    async with serve(app) as base_url, RawClient.connect(base_url) as raw:
        raw.writer.write(HANDSHAKE)
        return await raw.read_head()


async def test_a_close_whose_commit_fails_says_so_even_if_the_error_is_swallowed(
    app: Quart, db: DBConnect, database: Database
) -> None:
    errors: list[Exception] = []

    @app.websocket("/")
    async def view() -> None:
        await websocket.accept()
        await insert_row_that_fails_at_commit(db)
        try:
            await websocket.close(1000)
        except IntegrityError as exc:
            errors.append(exc)

    async with serve(app) as base_url, connect(base_url.replace("http", "ws"), proxy=None) as socket:
        with pytest.raises(ConnectionClosedError) as closed:
            await socket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    assert len(errors) == 1


@pytest.mark.parametrize(("status", "committed"), [(303, True), (403, False)])
async def test_a_refused_websocket_counts_by_its_status(
    app: Quart, db: DBConnect, database: Database, status: int, committed: bool
) -> None:
    @app.websocket("/")
    async def view() -> Response:
        await insert(db, "one")
        return Response("refused", status)

    assert await handshake(app) == status
    assert await database.names() == (["one"] if committed else [])


@pytest.mark.parametrize("refused", [False, True])
async def test_a_teardown_function_of_a_websocket_has_ended_before_its_answer(
    app: Quart, db: DBConnect, database: Database, refused: bool
) -> None:
    @app.teardown_websocket
    async def teardown(exc: BaseException | None) -> None:
        await insert(db, "teardown")

    @app.websocket("/")
    async def view() -> Response | None:
        if refused:
            return Response("refused", 303)
        await websocket.accept()
        return None

    async with serve(app) as base_url, RawClient.connect(base_url) as raw:
        with database.held_commits():
            raw.writer.write(HANDSHAKE)
            if not refused:
                assert await raw.read_head() == 101
            answer = asyncio.create_task(raw.reader.readexactly(1))
            await database.commit_is_held()
            for _ in range(20):
                # What was sent gets its turns to arrive.
                await asyncio.sleep(0)
                assert not answer.done()
        await answer
        assert await database.names() == ["teardown"]


async def test_a_websocket_closed_before_it_is_accepted_is_rolled_back(
    app: Quart, db: DBConnect, database: Database
) -> None:
    @app.websocket("/")
    async def view() -> None:
        await insert(db, "one")
        await websocket.close(1000)

    assert await handshake(app) == 403
    assert await database.names() == []


async def test_a_success_that_quart_cannot_send_for_a_handshake_is_rolled_back(
    app: Quart, db: DBConnect, database: Database
) -> None:
    """Without ASGI's extension for such responses, Quart closes the connection: the client gets a 403."""
    inner: Any = app.asgi_app

    async def without_extensions(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "extensions": {}}, receive, send)

    app.asgi_app = without_extensions  # type: ignore[method-assign]  # as Quart's documentation says

    @app.websocket("/")
    async def view() -> tuple[str, int]:
        await insert(db, "one")
        return "success", 200

    assert await handshake(app) == 403
    assert await database.names() == []


async def test_a_websocket_that_is_never_accepted_is_rolled_back(app: Quart, db: DBConnect, database: Database) -> None:
    """Some versions of Quart leave its client waiting, others let the server answer."""

    @app.websocket("/")
    async def view() -> None:
        await insert(db, "one")

    connecting = asyncio.ensure_future(handshake(app))
    await eventually(lambda: database.checkouts == 1 and not database.checked_out, "the connection is not over")
    connecting.cancel()
    await asyncio.wait([connecting])
    assert await database.names() == []


async def test_a_websocket_cancelled_because_its_client_left_is_rolled_back(
    app: Quart, db: DBConnect, database: Database
) -> None:
    @app.websocket("/")
    async def view() -> None:
        while True:
            await insert(db, str(await websocket.receive()))
            await websocket.send("written")

    async with serve(app) as base_url:
        async with connect(base_url.replace("http", "ws"), proxy=None) as socket:
            await socket.send("one")
            assert await socket.recv() == "written"
        await eventually(lambda: not database.checked_out, "the connection is not over")
    assert await database.names() == []


# --- wiring -----------------------------------------------------------------------------------------------------------


async def test_set_up_twice_there_is_one_unit_of_work(db: DBConnect, database: Database) -> None:
    committed: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        committed.append(session)

    app = Quart(__name__, static_folder=None)
    setup(app, before_commit=before_commit)
    setup(app, commit_policy=lambda status: False)

    @app.get("/")
    async def view() -> str:
        await insert(db, "one")
        return "done"

    assert (await app.test_client().get("/")).status_code == 200
    assert len(committed) == 1
    assert await database.names() == ["one"]


async def test_an_adapter_around_the_application_ends_the_unit_of_work(
    app: Quart, db: DBConnect, database: Database
) -> None:
    @app.get("/")
    async def view() -> str:
        await insert(db, "one")
        return "done"

    inner: Any = app.asgi_app
    outer: Any = ASGIHTTPDBSessionMiddleware(inner, commit_policy=lambda status: False)
    app.asgi_app = outer  # type: ignore[method-assign]  # as Quart's documentation says
    assert (await app.test_client().get("/")).status_code == 200
    assert await database.names() == []


async def test_every_database_is_closed_although_shutting_down_fails(database: Database) -> None:
    dbs = [database.connect(), database.connect()]
    app = Quart(__name__, static_folder=None)
    setup(app, dbs[0])
    setup(app, dbs[1])

    @app.after_serving
    async def fail() -> None:
        raise LookupError

    @app.get("/")
    async def view() -> str:
        for db in dbs:
            await (await db_session(db)).execute(text("SELECT 1"))
        return "done"

    await app.startup()
    assert (await app.test_client().get("/")).status_code == 200
    with pytest.raises(LookupError):
        await app.shutdown()
    await eventually(lambda: not database.backends("true"), "connections outlived the application")
