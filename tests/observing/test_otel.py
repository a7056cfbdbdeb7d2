"""`ctxdb_core.otel`: spans and metrics of OpenTelemetry, as its exporters for tests keep them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.metrics import db_metrics
from opentelemetry.semconv.attributes import db_attributes, error_attributes, server_attributes
from opentelemetry.trace import StatusCode, get_current_span
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tests.support.database import Database, insert_row_that_fails_at_commit

from ctxdb_core import ArgumentTypeError, DBConnect, db_session, new_db_ctx, new_non_ctx_session
from ctxdb_core.otel import instrument
from ctxdb_starlette import DBSessionMiddleware

SELECT = text("SELECT 1")


class Telemetry:
    """An OpenTelemetry SDK that keeps the spans and metrics that it would export."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.tracers.get_tracer("test")
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider(metric_readers=[self.reader])

    def instrument(self, *dbs: DBConnect) -> Any:
        return instrument(*dbs, tracer_provider=self.tracers, meter_provider=self.meters)

    def spans(self) -> list[ReadableSpan]:
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def span(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans() if span.name.startswith(name)]
        return found

    def tree(self) -> list[str]:
        """Return the path of each span from the outermost one."""
        by_id = {span.context.span_id: span for span in self.spans() if span.context is not None}

        def path(span: ReadableSpan) -> str:
            parent = None if span.parent is None else by_id.get(span.parent.span_id)
            name = span.name.split(" ")[0]
            return name if parent is None else f"{path(parent)} > {name}"

        return [path(span) for span in self.spans()]

    def points(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.tracers.shutdown()
    telemetry.meters.shutdown()


@pytest.fixture
async def url_db(database: Database) -> AsyncIterator[DBConnect]:
    async with DBConnect.from_url(database.url, pool_size=2, max_overflow=1, pool_timeout=0.01) as db:
        yield db


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_unit_its_transaction_and_its_commit_have_spans_beneath_the_requests_span(
    telemetry: Telemetry, url_db: DBConnect, database: Database
) -> None:
    telemetry.instrument(url_db)
    with telemetry.tracer.start_as_current_span("request"):
        async with new_db_ctx() as _:
            await (await db_session(url_db)).execute(SELECT)
    assert telemetry.tree() == [
        "request", "request > unit", "request > unit > transaction", "request > unit > transaction > COMMIT",
    ]  # fmt: skip
    for name in ("transaction", "COMMIT"):
        found = attributes(telemetry.span(name))
        assert found[db_attributes.DB_SYSTEM_NAME] == "postgresql"
        assert found[db_attributes.DB_NAMESPACE] == database.name
        assert found[server_attributes.SERVER_ADDRESS] == url_db.host
    assert attributes(telemetry.span("COMMIT"))[db_attributes.DB_OPERATION_NAME] == "COMMIT"
    transaction = attributes(telemetry.span("transaction"))
    assert transaction["ctxdb.outcome"] == "committed"
    assert transaction["ctxdb.connection.held"] > 0
    unit = attributes(telemetry.span("unit"))
    assert (unit["ctxdb.outcome"], unit["ctxdb.unit.transactions"]) == ("committed", 1)
    assert unit["ctxdb.connection.held"] == transaction["ctxdb.connection.held"]
    assert {span.status.status_code for span in telemetry.spans()} == {StatusCode.UNSET}


@pytest.mark.parametrize("instrumented", ["before", "after"])
async def test_spans_of_statements_are_beneath_their_transaction(
    telemetry: Telemetry, url_db: DBConnect, instrumented: str
) -> None:
    if instrumented == "before":
        telemetry.instrument(url_db)
    instrumentor = SQLAlchemyInstrumentor()
    engine = (await url_db.engine()).sync_engine
    # The instrumentation declares that it is made for SQLAlchemy up to 2.0.
    instrumentor.instrument(
        engine=engine,
        tracer_provider=telemetry.tracers,
        meter_provider=telemetry.meters,
        skip_dep_check=True,
    )
    try:
        if instrumented == "after":
            telemetry.instrument(url_db)
        with telemetry.tracer.start_as_current_span("request") as request:
            async with new_db_ctx():
                session = await db_session(url_db)
                await session.execute(SELECT)
                assert get_current_span() is request, "the application's own spans are children of the request's"
                with telemetry.tracer.start_as_current_span("step"):
                    await session.execute(SELECT)
            await asyncio.sleep(0)
            assert get_current_span() is request
    finally:
        instrumentor.uninstrument()
    paths = telemetry.tree()
    assert "request > unit > transaction > SELECT" in paths
    # A span that the application has opened itself is closer to the statement than the transaction's span.
    assert "request > step > SELECT" in paths


async def test_an_instrumented_framework_is_the_parent_and_a_stream_has_two_transactions(
    telemetry: Telemetry, url_db: DBConnect
) -> None:
    async def read(request: Request) -> Response:
        await (await db_session(url_db)).execute(SELECT)

        async def body() -> AsyncIterator[bytes]:
            await (await db_session(url_db)).execute(SELECT)
            yield b"streamed"

        return StreamingResponse(body())

    async def refuse(request: Request) -> Response:
        await (await db_session(url_db)).execute(SELECT)
        return PlainTextResponse("no", 409)

    app = Starlette(routes=[Route("/read", read), Route("/refuse", refuse)])
    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(
        OpenTelemetryMiddleware, tracer_provider=telemetry.tracers, meter_provider=telemetry.meters,
        exclude_spans=["receive", "send"],
    )  # fmt: skip
    telemetry.instrument(url_db)
    async with client_of(app) as client:
        await asyncio.gather(client.get("/read"), client.get("/refuse"))
    paths = telemetry.tree()
    assert paths.count("GET > unit") == 2
    assert paths.count("GET > unit > transaction") == 3
    outcomes = sorted(attributes(span)["ctxdb.outcome"] for span in telemetry.spans() if span.name == "unit of work")
    assert outcomes == ["committed", "rolled_back"]


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_a_failed_commit_is_an_error_that_shows_no_value(telemetry: Telemetry, url_db: DBConnect) -> None:
    telemetry.instrument(url_db)
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            await insert_row_that_fails_at_commit(url_db)
    for name in ("transaction", "unit", "COMMIT"):
        span = telemetry.span(name)
        assert span.status.status_code is StatusCode.ERROR, name
        # SQLAlchemy 2.0 shows the base class of the driver's error, and later versions the driver's own class.
        assert attributes(span)[error_attributes.ERROR_TYPE] in {"IntegrityError", "ForeignKeyViolationError"}
        assert span.events == ()
        assert span.status.description is None
    assert attributes(telemetry.span("transaction"))["ctxdb.outcome"] == "commit_failed"
    assert attributes(telemetry.span("unit"))["ctxdb.outcome"] == "commit_failed"
    assert attributes(telemetry.span("COMMIT"))[db_attributes.DB_RESPONSE_STATUS_CODE] == "23503"


async def test_the_spans_of_a_roll_back_have_the_type_of_its_error(telemetry: Telemetry, url_db: DBConnect) -> None:
    telemetry.instrument(url_db)
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await (await db_session(url_db)).execute(SELECT)
            raise LookupError
    for name in ("transaction", "unit"):
        found = attributes(telemetry.span(name))
        assert (found["ctxdb.outcome"], found["error.type"]) == ("rolled_back", "LookupError")


async def test_the_transaction_of_a_session_outside_of_units_is_beneath_the_current_span(
    telemetry: Telemetry, url_db: DBConnect
) -> None:
    telemetry.instrument(url_db)
    with telemetry.tracer.start_as_current_span("job"):
        async with new_non_ctx_session(url_db) as session:
            await session.execute(SELECT)
    assert telemetry.tree() == ["job", "job > transaction"]


async def test_a_read_only_database_has_no_commits(telemetry: Telemetry, database: Database) -> None:
    async with DBConnect.from_url(database.url, read_only=True) as db:
        telemetry.instrument(db)
        async with new_db_ctx():
            await (await db_session(db)).execute(SELECT)
    assert telemetry.tree() == ["unit", "unit > transaction"]


async def test_the_metrics_of_pools_have_the_names_and_values_of_the_conventions(
    telemetry: Telemetry, url_db: DBConnect, database: Database
) -> None:
    telemetry.instrument(url_db)
    async with new_db_ctx():
        await (await db_session(url_db)).execute(SELECT)
        during = telemetry.points()
    points = telemetry.points()
    assert {name for name in points if name.startswith("db.")} == {
        db_metrics.DB_CLIENT_CONNECTION_COUNT,
        db_metrics.DB_CLIENT_CONNECTION_CREATE_TIME,
        db_metrics.DB_CLIENT_CONNECTION_IDLE_MAX,
        db_metrics.DB_CLIENT_CONNECTION_MAX,
        db_metrics.DB_CLIENT_CONNECTION_PENDING_REQUESTS,
        db_metrics.DB_CLIENT_CONNECTION_USE_TIME,
        db_metrics.DB_CLIENT_CONNECTION_WAIT_TIME,
    }

    def counts(found: list[NumberDataPoint]) -> dict[object, float]:
        return {(point.attributes or {})["db.client.connection.state"]: point.value for point in found}

    assert counts(during["db.client.connection.count"]) == {"idle": 0, "used": 1}
    assert counts(points["db.client.connection.count"]) == {"idle": 1, "used": 0}
    for name, value in {"idle.max": 2, "max": 3, "pending_requests": 0}.items():
        assert [point.value for point in points[f"db.client.connection.{name}"]] == [value], name
    for name in ("create_time", "use_time", "wait_time"):
        assert [point.count for point in points[f"db.client.connection.{name}"]] == [1], name
    (point,) = points["db.client.connection.use_time"]
    pool = point.attributes["db.client.connection.pool.name"]
    assert pool.endswith(f"/{database.name}")
    assert "password" not in pool
    assert [point.attributes["ctxdb.outcome"] for point in points["ctxdb.transaction.duration"]] == ["committed"]
    assert [point.attributes["ctxdb.outcome"] for point in points["ctxdb.unit.duration"]] == ["committed"]


async def test_a_time_out_at_the_pool_is_counted(telemetry: Telemetry, database: Database) -> None:
    async with DBConnect.from_url(database.url, pool_size=1, max_overflow=0, pool_timeout=0.01) as db:
        telemetry.instrument(db)
        async with new_non_ctx_session(db) as session:
            await session.execute(SELECT)
            async with new_non_ctx_session(db) as other:
                with pytest.raises(PoolTimeoutError):
                    await other.execute(SELECT)
    assert [point.value for point in telemetry.points()["db.client.connection.timeouts"]] == [1]


async def test_a_transaction_on_a_second_event_loop_has_one_set_of_spans_and_metrics(
    telemetry: Telemetry, database: Database
) -> None:
    async def use() -> None:
        async with new_db_ctx():
            await (await db_session(db)).execute(SELECT)

    engine = create_async_engine(database.url)
    db = DBConnect.from_engine(engine)
    telemetry.instrument(db)
    await use()
    await asyncio.to_thread(asyncio.run, use())
    await use()
    await engine.dispose()
    assert telemetry.tree() == ["unit", "unit > transaction", "unit > transaction > COMMIT"] * 3
    points = telemetry.points()
    for name, count in {"create_time": 2, "use_time": 3, "wait_time": 3}.items():
        assert [point.count for point in points[f"db.client.connection.{name}"]] == [count], name


async def test_a_block_of_overridden_is_followed_too(telemetry: Telemetry, database: Database) -> None:
    db = DBConnect.from_url("postgresql+asyncpg://nowhere.invalid/app")
    telemetry.instrument(db)
    async with db.overridden(database.url), new_db_ctx():
        await (await db_session(db)).execute(SELECT)
    assert telemetry.tree() == ["unit", "unit > transaction", "unit > transaction > COMMIT"]


async def test_no_spans_and_metrics_are_made_after_the_instrumentation_has_ended(
    telemetry: Telemetry, url_db: DBConnect
) -> None:
    stop = telemetry.instrument(url_db)
    async with new_db_ctx():
        await (await db_session(url_db)).execute(SELECT)
    told = len(telemetry.spans())
    stop()
    async with new_db_ctx():
        await (await db_session(url_db)).execute(SELECT)
    assert len(telemetry.spans()) == told
    assert [point.count for point in telemetry.points()["db.client.connection.use_time"]] == [1]


def test_instrument_refuses_wrong_arguments_at_once() -> None:
    with pytest.raises(ArgumentTypeError):
        instrument()
    with pytest.raises(ArgumentTypeError):
        instrument("sqlite+aiosqlite://")  # type: ignore[arg-type]  # what is tried
