"""What is FastAPI's own: dependencies, sync endpoints, background tasks, websockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, suppress

import anyio.from_thread
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.server import serve
from websockets.asyncio.client import connect

from ctxdb_core import DBConnect, close_db_session, db_session, new_db_ctx
from ctxdb_core.asgi import Receive, Scope, Send
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown, provide_session


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


@pytest.fixture
def app(db: DBConnect) -> FastAPI:
    app = FastAPI(lifespan=close_on_shutdown(db))
    app.add_middleware(DBSessionMiddleware)
    return app


async def test_the_session_is_a_dependency(app: FastAPI, db: DBConnect, database: Database) -> None:
    depends = Depends(provide_session(db))

    @app.post("/")
    async def write(session: AsyncSession = depends) -> bool:
        await insert(db, "one")
        return session is await db_session(db)

    async with client_of(app) as client:
        assert (await client.post("/")).json() is True
    assert await database.names() == ["one"]


@pytest.mark.parametrize("closes", ["in finally", "in except", "by an exit stack"])
async def test_a_dependency_that_closes_the_session_leaves_the_error_of_the_handler(
    app: FastAPI, db: DBConnect, database: Database, closes: str
) -> None:
    async def own_session() -> AsyncGenerator[AsyncSession, None]:
        session = await db_session(db)
        if closes == "in finally":
            try:
                yield session
            finally:
                await session.close()
        elif closes == "in except":
            try:
                yield session
            except HTTPException:
                await session.close()
                raise
        else:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(session.close)
                yield session

    depends = Depends(own_session)

    @app.post("/")
    async def write(session: AsyncSession = depends) -> None:
        await insert(db, "one")
        raise HTTPException(404)

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 404
    assert await database.names() == []


async def test_the_dependency_can_be_overridden(app: FastAPI, db: DBConnect) -> None:
    depends = Depends(provide_session(db))

    @app.get("/")
    async def read(session: AsyncSession = depends) -> str:
        return str(session)

    app.dependency_overrides[provide_session(db)] = lambda: "overridden"
    async with client_of(app) as client:
        assert (await client.get("/")).json() == "overridden"


@pytest.mark.parametrize("scope", ["function", "request"])
async def test_yield_dependencies_share_the_unit_of_work(
    app: FastAPI, db: DBConnect, database: Database, scope: str
) -> None:
    seen: list[AsyncSession] = []

    async def dependency() -> AsyncGenerator[None, None]:
        seen.append(await insert(db, "before"))
        yield
        seen.append(await insert(db, "after"))

    @app.post("/", dependencies=[Depends(dependency, scope=scope)])  # type: ignore[arg-type]  # parametrised
    async def write() -> None:
        seen.append(await insert(db, "endpoint"))

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert all(session is seen[0] for session in seen)
    assert await database.names() == ["after", "before", "endpoint"]


async def test_a_yield_dependency_that_fails_late_undoes_only_its_own_work(
    app: FastAPI, db: DBConnect, database: Database
) -> None:
    async def dependency() -> AsyncGenerator[None, None]:
        yield
        await insert(db, "after")
        raise LookupError

    @app.post("/", dependencies=[Depends(dependency, scope="request")])
    async def write() -> None:
        await insert(db, "endpoint")

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await database.names() == ["endpoint"]


async def test_yield_dependencies_see_a_failing_commit(app: FastAPI, db: DBConnect) -> None:
    seen: list[BaseException] = []

    async def dependency() -> AsyncGenerator[None, None]:
        try:
            yield
        except IntegrityError as exc:
            seen.append(exc)
            raise

    @app.post("/", dependencies=[Depends(dependency, scope="request")])
    async def write() -> None:
        await insert_row_that_fails_at_commit(db)

    @app.exception_handler(IntegrityError)
    async def handle(request: object, exc: IntegrityError) -> JSONResponse:
        return JSONResponse({"detail": "conflict"}, 409)

    async with client_of(app) as client:
        response = await client.post("/")
    assert (response.status_code, response.json()) == (409, {"detail": "conflict"})
    assert len(seen) == 1


async def test_a_yield_dependency_that_swallows_the_error_changes_nothing(app: FastAPI, db: DBConnect) -> None:
    async def dependency() -> AsyncGenerator[None, None]:
        with suppress(IntegrityError):
            yield

    @app.post("/", dependencies=[Depends(dependency, scope="request")])
    async def write() -> None:
        await insert_row_that_fails_at_commit(db)

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 500


async def test_background_tasks_write_in_the_same_unit_of_work(app: FastAPI, db: DBConnect, database: Database) -> None:
    @app.post("/")
    async def write(background: BackgroundTasks) -> None:
        await insert(db, "response")
        background.add_task(insert, db, "first")
        background.add_task(insert, db, "second")

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await database.names() == ["first", "response", "second"]


async def test_sync_endpoints_reach_the_session_through_the_loop(
    app: FastAPI, db: DBConnect, database: Database
) -> None:
    def sync_dependency() -> Generator[None, None, None]:
        anyio.from_thread.run(insert, db, "dependency")
        yield

    @app.post("/", dependencies=[Depends(sync_dependency)])
    def write(status: int) -> JSONResponse:
        anyio.from_thread.run(insert, db, "endpoint")
        return JSONResponse({}, status)

    async with client_of(app) as client:
        assert (await client.post("/?status=400")).status_code == 400
        assert await database.names() == []
        assert (await client.post("/?status=200")).status_code == 200
    assert await database.names() == ["dependency", "endpoint"]


async def test_a_sync_endpoint_with_a_loop_of_its_own_needs_a_unit_of_its_own(
    app: FastAPI, db: DBConnect, database: Database
) -> None:
    async def in_new_ctx() -> None:
        async with new_db_ctx():
            await insert(db, "one")

    @app.post("/")
    def write() -> None:
        with pytest.raises(Exception, match="another thread"):
            asyncio.run(insert(db, "lost"))
        asyncio.run(in_new_ctx())

    async with client_of(app) as client:
        assert (await client.post("/")).status_code == 200
    assert await database.names() == ["one"]


async def test_http_exceptions_roll_back(app: FastAPI, db: DBConnect, database: Database) -> None:
    @app.post("/")
    async def write() -> None:
        await insert(db, "one")
        raise HTTPException(400, "no")

    async with client_of(app) as client:
        response = await client.post("/")
    assert (response.status_code, response.json()) == (400, {"detail": "no"})
    assert await database.names() == []


async def test_a_request_that_is_not_valid_is_answered_as_ever(app: FastAPI, db: DBConnect) -> None:
    @app.post("/")
    async def write(number: int) -> None:
        pytest.fail("the endpoint was called")

    async with client_of(app) as client:
        assert (await client.post("/?number=x")).status_code == 422


def test_the_sync_test_client_works_on_a_loop_of_its_own(db_url: str) -> None:
    db = DBConnect.from_url(db_url)
    app = FastAPI(lifespan=close_on_shutdown(db))
    app.add_middleware(DBSessionMiddleware)

    @app.post("/{name}")
    async def write(name: str) -> None:
        await insert(db, name)

    @app.get("/")
    async def read() -> list[str]:
        return list(await (await db_session(db)).scalars(text("SELECT name FROM item ORDER BY name")))

    for name in ("one", "two"):
        with TestClient(app) as client:
            assert client.post(f"/{name}").status_code == 200
    # Without the context manager, each request runs on a loop of its own.
    client = TestClient(app)
    assert client.post("/three").status_code == 200
    assert client.get("/").json() == ["one", "three", "two"]


@pytest.fixture
async def db_url(database: Database) -> str:
    return database.url


async def test_the_lifespan_closes_the_databases(db: DBConnect, database: Database) -> None:
    async with database.connect() as second:
        app = Starlette(lifespan=close_on_shutdown(db, second))
        async with serve(app):
            for each in (db, second):
                async with new_db_ctx():
                    await (await db_session(each)).execute(text("SELECT 1"))
            assert len(database.backends("true")) == 2
        await eventually(lambda: not database.backends("true"), "connections outlived the application")


async def test_the_lifespan_can_be_part_of_another(db: DBConnect, database: Database) -> None:
    async with close_on_shutdown(db), new_db_ctx():
        await (await db_session(db)).execute(text("SELECT 1"))
        await close_db_session(db)
    await eventually(lambda: not database.backends("true"), "a connection outlived the lifespan")


async def test_every_database_is_closed_before_an_error_surfaces() -> None:
    closed: list[int] = []

    class Database(DBConnect):
        def __init__(self, number: int, error: Exception | None) -> None:
            super().__init__(lambda host: None, host="a")  # type: ignore[arg-type]  # never called
            self.number, self.error = number, error

        async def close(self) -> None:
            closed.append(self.number)
            if self.error:
                raise self.error

    with pytest.raises(OSError, match="the second"):
        async with close_on_shutdown(Database(1, None), Database(2, OSError("the second")), Database(3, None)):
            pass
    with pytest.raises(ExceptionGroup) as caught:
        async with close_on_shutdown(Database(4, OSError("4")), Database(5, OSError("5"))):
            pass
    assert len(caught.value.exceptions) == 2
    assert closed == [1, 2, 3, 4, 5]


# --- websockets -------------------------------------------------------------------------------------------------------


async def test_a_websocket_is_one_unit_of_work(app: FastAPI, db: DBConnect, database: Database) -> None:
    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        sessions = []
        for _ in range(2):
            sessions.append(await insert(db, await websocket.receive_text()))
            await websocket.send_text(str(sessions[0] is sessions[-1]))
        await websocket.close()

    async with serve(app) as base_url, connect(base_url.replace("http", "ws") + "/") as client:
        for name in ("one", "two"):
            if name == "two":
                # The first message's row is still waiting for the end of the connection.
                assert await database.names() == []
            await client.send(name)
            assert await client.recv() == "True"
        await client.wait_closed()
        assert client.close_code == 1000
        assert await database.names() == ["one", "two"]


async def test_each_message_can_have_a_unit_of_work_of_its_own(app: FastAPI, db: DBConnect, database: Database) -> None:
    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        async for name in websocket.iter_text():
            try:
                async with new_db_ctx():
                    await insert(db, name)
                await websocket.send_text("stored")
            except IntegrityError:
                await websocket.send_text("refused")

    async with serve(app) as base_url, connect(base_url.replace("http", "ws") + "/") as client:
        answers = []
        for name in ("one", "one", "two"):
            await client.send(name)
            answers.append(await client.recv())
            assert database.checked_out == 0
        assert answers == ["stored", "refused", "stored"]
        assert await database.names() == ["one", "two"]


async def test_a_websocket_whose_commit_fails_closes_with_1011(app: FastAPI, db: DBConnect) -> None:
    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await insert_row_that_fails_at_commit(db)
        await websocket.close()

    async with serve(app) as base_url, connect(base_url.replace("http", "ws") + "/") as client:
        await client.wait_closed()
        assert client.close_code == 1011


async def test_a_client_that_leaves_a_websocket_leaves_nothing_behind(
    app: FastAPI, db: DBConnect, database: Database
) -> None:
    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await insert(db, "one")
        await websocket.send_text("ready")
        await websocket.receive_text()

    async with serve(app) as base_url:
        async with connect(base_url.replace("http", "ws") + "/") as client:
            await client.recv()
            client.transport.abort()
        await eventually(lambda: not database.checked_out, "a connection is not back")
    assert await database.names() == []


@pytest.mark.parametrize("is_caught", [True, False])
async def test_a_client_that_closes_normally_rolls_back_if_that_leaves_the_endpoint(
    app: FastAPI, db: DBConnect, database: Database, is_caught: bool
) -> None:
    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await insert(db, "one")
        await websocket.send_text("ready")
        try:
            await websocket.receive_text()
        except WebSocketDisconnect as exc:
            codes.append(exc.code)
            if not is_caught:
                raise

    codes: list[int] = []
    async with serve(app) as base_url:
        async with connect(base_url.replace("http", "ws") + "/") as client:
            await client.recv()
        await eventually(lambda: codes == [1000] and not database.checked_out, "a connection is not back")
    assert await database.names() == (["one"] if is_caught else [])


async def test_a_websockets_error_surfaces_although_there_is_a_handler_for_it(app: FastAPI, db: DBConnect) -> None:
    @app.exception_handler(IntegrityError)
    async def handle(request: object, exc: IntegrityError) -> JSONResponse:
        return JSONResponse({}, 409)

    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await insert_row_that_fails_at_commit(db)
        await websocket.close()

    surfaced: list[BaseException] = []

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as exc:
            surfaced.append(exc)
            raise

    async with serve(recording) as base_url, connect(base_url.replace("http", "ws") + "/") as client:
        await client.wait_closed()
        assert client.close_code == 1011
    assert [type(exc) for exc in surfaced] == [IntegrityError]
