"""`ctxdb_core.sentry`: the tags and breadcrumbs of events, which a transport keeps instead of sending them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.asgi import SentryAsgiMiddleware
from sentry_sdk.transport import Transport
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tests.support.database import insert_row_that_fails_at_commit

from ctxdb_core import DBConnect, commit_db_session, db_session
from ctxdb_core.sentry import instrument
from ctxdb_starlette import DBSessionMiddleware

SELECT = text("SELECT 1")


class Recording(Transport):
    """Keeps the events instead of sending them."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        for item in envelope.items:
            if item.payload.json is not None:
                self.events.append(item.payload.json)

    def only(self, kind: str | None) -> Any:
        (found,) = [event for event in self.events if event.get("type") == kind]
        return found


@pytest.fixture
def recording() -> Iterator[Recording]:
    transport = Recording()
    sentry_sdk.init(
        dsn="http://key@localhost/1",
        transport=transport,
        traces_sample_rate=1.0,
        default_integrations=False,
        auto_enabling_integrations=False,
    )
    yield transport
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)


@pytest.fixture
def app(db: DBConnect) -> Any:
    async def read(request: Request) -> Response:
        await (await db_session(db)).execute(SELECT)
        return PlainTextResponse("read")

    async def fail(request: Request) -> Response:
        await (await db_session(db)).execute(SELECT)
        await commit_db_session(db)
        await (await db_session(db)).execute(SELECT)
        raise LookupError

    async def fail_at_commit(request: Request) -> Response:
        await insert_row_that_fails_at_commit(db)
        return PlainTextResponse("never seen")

    app = Starlette(routes=[Route(f"/{each.__name__}", each) for each in (read, fail, fail_at_commit)])
    app.add_middleware(DBSessionMiddleware)
    return SentryAsgiMiddleware(app)


async def get(app: Any, path: str) -> None:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get(path)


async def test_the_trace_of_a_request_has_its_unit_and_outcome(recording: Recording, app: Any, db: DBConnect) -> None:
    stop = instrument(db)
    await get(app, "/read")
    stop()
    trace = recording.only("transaction")
    assert trace["tags"]["ctxdb.outcome"] == "committed"
    assert trace["tags"]["ctxdb.unit"]
    assert trace["contexts"]["trace"]["data"]["ctxdb.connection.held"] > 0


@pytest.mark.parametrize(
    ("path", "outcome", "crumbs"),
    [
        ("/fail", "rolled_back", [("committed", "info"), ("rolled_back", "info")]),
        ("/fail_at_commit", "commit_failed", [("commit_failed", "error")]),
    ],
)
async def test_an_error_in_sentry_has_the_outcomes_of_its_transactions_as_breadcrumbs(
    recording: Recording, app: Any, db: DBConnect, path: str, outcome: str, crumbs: list[tuple[str, str]]
) -> None:
    stop = instrument(db)
    await get(app, path)
    stop()
    error = recording.only(None)
    told = [crumb for crumb in error["breadcrumbs"]["values"] if crumb["category"] == "ctxdb"]
    assert [(each["data"]["outcome"], each["level"]) for each in told if "outcome" in each["data"]] == crumbs
    trace = recording.only("transaction")
    assert trace["tags"]["ctxdb.outcome"] == outcome
    assert error["tags"]["ctxdb.unit"] == trace["tags"]["ctxdb.unit"]
