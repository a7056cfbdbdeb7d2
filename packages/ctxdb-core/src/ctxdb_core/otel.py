"""OpenTelemetry: spans of units of work, transactions and commits, and metrics of pools, with ``ctxdb-core[otel]``.

Names and attributes are those of OpenTelemetry's semantic conventions for databases ("Semantic conventions for database
client spans", "... metrics"), as far as these have one; the others begin with ``ctxdb.``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import Token
from time import perf_counter, time_ns
from typing import Any
from weakref import WeakKeyDictionary, ref

from opentelemetry import context, metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider
from sqlalchemy import URL, Connection, Dialect, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._databases.url import host_of, without_secrets
from ctxdb_core._sqlalchemy.binds import is_autocommit
from ctxdb_core._sqlalchemy.private import follow_dialect, listen_first
from ctxdb_core._telemetry.pools import PoolFollower, PoolTotal
from ctxdb_core._telemetry.units import FollowedTransaction, FollowedUnit, UnitFollower
from ctxdb_core.events import TransactionBegun

__all__ = ["instrument"]

_NAME = "ctxdb_core.otel"

_SECONDS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0]
"""The buckets that the conventions advise for durations of a database's client."""

_SYSTEMS = {"mssql": "microsoft.sql_server", "oracle": "oracle.db", "cockroachdb": "cockroachdb"}
"""What the conventions call the databases that SQLAlchemy calls otherwise (``db.system.name``)."""

_POOL_NAME = "db.client.connection.pool.name"


def instrument(
    *dbs: DBConnect, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
) -> Callable[[], None]:
    """Make spans and metrics of all work on `dbs` from now on.

    A unit of work that takes a connection has a span beneath the span that is current then, which is the request's
    where the framework is instrumented; each of its transactions has one beneath that, and the COMMIT one beneath the
    transaction's. Spans of statements, as ``opentelemetry-instrumentation-sqlalchemy`` or an instrumentation of the
    driver makes them, are beneath the transaction's, unless the application has opened a span of its own meanwhile.

    No text of a statement or of an error is sent: databases put values into the messages of their errors.

    Args:
        *dbs: the databases.
        tracer_provider: makes the spans; by default, the provider of the process.
        meter_provider: makes the metrics; by default, the provider of the process.

    Returns:
        A function without arguments that ends the instrumentation.

    Raises:
        ArgumentTypeError: there is no database, or one is no `DBConnect` (a ``TypeError``, too).
    """
    spans = _Spans(dbs, tracer_provider)
    units = _UnitMetrics(dbs, meter_provider)
    pools = _PoolMetrics(dbs, meter_provider)

    def stop() -> None:
        for follower in (spans, units, pools):
            follower.stop()

    return stop


# --- spans ------------------------------------------------------------------------------------------------------------


class _Spans(UnitFollower):
    """Makes the spans."""

    def __init__(self, dbs: Iterable[DBConnect], provider: TracerProvider | None) -> None:
        self._tracer = trace.get_tracer(_NAME, tracer_provider=provider)
        self._key = f"ctxdb.otel.{id(self)}"
        self._attributes: WeakKeyDictionary[Engine, dict[str, Any]] = WeakKeyDictionary()
        self._followed: WeakKeyDictionary[Dialect, list[Any]] = WeakKeyDictionary()
        """The dialects, with what keeps their engines' listeners: engines of several event loops may share both."""
        super().__init__(dbs)
        for db in dbs:
            db.on_engine(self._follow, overridden=True)

    def unit_begins(self, unit: FollowedUnit) -> None:
        started = time_ns() - _nanoseconds(perf_counter() - unit.started)
        unit.state = self._tracer.start_span("unit of work", start_time=started, attributes={"ctxdb.unit.id": unit.id})

    def transaction_begins(self, transaction: FollowedTransaction, event: TransactionBegun) -> None:
        attributes = self._attributes_of(event.connection.engine)
        outer = trace.get_current_span()
        unit = transaction.unit
        span = self._tracer.start_span(
            _titled("transaction", attributes),
            trace.set_span_in_context(outer if unit is None else unit.state),
            attributes=attributes,
        )
        transaction.state = state = _TransactionSpan(span, outer, attributes, is_autocommit(event.connection))
        event.connection.info[self._key] = state

    def transaction_ends(self, transaction: FollowedTransaction) -> None:
        state: _TransactionSpan = transaction.state
        state.detach()
        state.is_over = True
        state.span.set_attribute("ctxdb.outcome", transaction.outcome)
        state.span.set_attribute("ctxdb.connection.held", transaction.held)
        _note_failure(state.span, transaction.outcome, transaction.error)
        state.span.end()

    def unit_ends(self, unit: FollowedUnit) -> None:
        span: Span = unit.state
        if unit.outcome is not None:
            span.set_attribute("ctxdb.outcome", unit.outcome)
        span.set_attribute("ctxdb.unit.transactions", unit.transactions)
        span.set_attribute("ctxdb.connection.held", unit.held)
        _note_failure(span, unit.outcome, unit.error)
        span.end()

    def _attributes_of(self, engine: Engine) -> dict[str, Any]:
        attributes = self._attributes.get(engine)
        if attributes is None:
            attributes = self._attributes[engine] = _attributes_of(engine.dialect.name, engine.url)
        return attributes

    def _follow(self, host: str, engine: AsyncEngine) -> None:
        """Make the spans of commits on an engine, and have those of statements beneath their transaction's."""
        sync_engine, key, tracer = engine.sync_engine, self._key, self._tracer

        def enter(connection: Connection, *_: object) -> None:
            state = connection.info.get(key)
            if state is not None:
                state.attach()

        def execute(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            # The execution context is the last argument of each of the three methods.
            execution = kwargs.get("context") or args[-1]
            try:
                original(*args, **kwargs)
            finally:
                state = None if execution is None else _state_of(execution.root_connection, key)
                if state is not None:
                    state.detach()

        def commit(original: Callable[[Any], None], connection: Any) -> None:
            state = _state_of(connection, key)
            if state is None or state.is_over or state.is_autocommit:
                original(connection)
                return
            span = tracer.start_span(
                _titled("COMMIT", state.attributes),
                trace.set_span_in_context(state.span),
                SpanKind.CLIENT,
                {**state.attributes, "db.operation.name": "COMMIT"},
            )
            # An instrumentation of the driver finds the span, too.
            with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
                try:
                    original(connection)
                except BaseException as exc:
                    _note_failure(span, "commit_failed", exc)
                    raise

        is_new = sync_engine.dialect not in self._followed
        listeners_of_engines = self._followed.setdefault(sync_engine.dialect, [])
        if not any(each is sync_engine.dispatch for each in listeners_of_engines):
            listeners_of_engines.append(sync_engine.dispatch)
            # This listener comes before the instrumentation of SQLAlchemy, which makes its span in the same event.
            listen_first(sync_engine, "before_cursor_execute", enter)
        if not is_new:
            return
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            follow_dialect(sync_engine.dialect, name, execute)
        follow_dialect(sync_engine.dialect, "do_commit", commit)


class _TransactionSpan:
    """The span of a transaction, which is current while one of its statements is made."""

    __slots__ = ("_attached", "_outer", "attributes", "is_autocommit", "is_over", "span")

    def __init__(self, span: Span, outer: Span, attributes: dict[str, Any], is_autocommit: bool) -> None:  # noqa: FBT001 - by its only caller
        self.span = span
        self.attributes = attributes
        self.is_autocommit = is_autocommit
        """Whether each statement is committed by itself, and no COMMIT is sent."""
        self.is_over = False
        self._outer = outer
        self._attached: Token[Context] | None = None

    def attach(self) -> None:
        """Make the span current, unless the application has opened one of its own since it began."""
        if not self.is_over and trace.get_current_span() is self._outer:
            self._attached = context.attach(trace.set_span_in_context(self.span))

    def detach(self) -> None:
        """Make the span current again that was so before."""
        attached, self._attached = self._attached, None
        if attached is not None:
            context.detach(attached)


def _state_of(connection: Any, key: str) -> _TransactionSpan | None:
    try:
        state: _TransactionSpan | None = connection.info.get(key)
    except NotImplementedError:
        # Before the first use of an engine, SQLAlchemy asks its server by a connection of another kind.
        return None
    return state


def _note_failure(span: Span, outcome: str | None, error: BaseException | None) -> None:
    if outcome == "commit_failed" or error is not None:
        span.set_status(StatusCode.ERROR)
    if error is not None:
        span.set_attribute("error.type", type(error).__name__)
        cause = getattr(error, "orig", None) or error
        code = getattr(cause, "sqlstate", None)
        if code is not None:
            span.set_attribute("db.response.status_code", str(code))


def _titled(operation: str, attributes: dict[str, Any]) -> str:
    target = attributes.get("db.namespace")
    return f"{operation} {target}" if target else operation


def _attributes_of(dialect: str, url: URL) -> dict[str, Any]:
    attributes: dict[str, Any] = {"db.system.name": _SYSTEMS.get(dialect, dialect)}
    if url.database:
        attributes["db.namespace"] = url.database
    if url.host or url.query.get("host"):
        attributes["server.address"] = without_secrets(host_of(url))
        if url.port is not None:
            attributes["server.port"] = url.port
    return attributes


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


# --- metrics ----------------------------------------------------------------------------------------------------------


class _UnitMetrics(UnitFollower):
    """Counts and times units of work and transactions, for which the conventions have no names."""

    def __init__(self, dbs: Iterable[DBConnect], provider: MeterProvider | None) -> None:
        meter = metrics.get_meter(_NAME, meter_provider=provider)
        self._units = meter.create_histogram(
            "ctxdb.unit.duration",
            "s",
            "How long units of work lasted that have taken a connection, from their first session to their end.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._transactions = meter.create_histogram(
            "ctxdb.transaction.duration",
            "s",
            "How long transactions lasted, from their connection to the end of COMMIT or ROLLBACK.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        super().__init__(dbs)

    def transaction_ends(self, transaction: FollowedTransaction) -> None:
        self._transactions.record(
            transaction.duration, {"server.address": transaction.host, "ctxdb.outcome": transaction.outcome}
        )

    def unit_ends(self, unit: FollowedUnit) -> None:
        self._units.record(perf_counter() - unit.started, {"ctxdb.outcome": unit.outcome or "rolled_back"})


class _PoolMetrics(PoolFollower):
    """The metrics that the conventions have for pools of connections."""

    def __init__(self, dbs: Iterable[DBConnect], provider: MeterProvider | None) -> None:
        meter = metrics.get_meter(_NAME, meter_provider=provider)

        def times(name: str, description: str) -> metrics.Histogram:
            return meter.create_histogram(
                f"db.client.connection.{name}", "s", description, explicit_bucket_boundaries_advisory=_SECONDS
            )

        self._waited = times("wait_time", "The time it took to obtain an open connection from the pool.")
        self._used = times("use_time", "The time between borrowing a connection and returning it to the pool.")
        self._made = times("create_time", "The time it took to create a new connection.")
        self._timeouts = meter.create_counter(
            "db.client.connection.timeouts",
            "{timeout}",
            "The number of connection timeouts that have occurred trying to obtain a connection from the pool.",
        )
        super().__init__(dbs)
        # The meter keeps its callbacks for ever, and must not keep the databases.
        myself = ref(self)

        def observe(name: str, unit: str, description: str, of: Callable[[PoolTotal], Iterable[_Count]]) -> None:
            def callback(options: CallbackOptions) -> Iterator[Observation]:
                follower = myself()
                if follower is None or not follower.is_active:
                    return
                for pool, total in follower.totals().items():
                    for count, attributes in of(total):
                        if count is not None:
                            yield Observation(count, {_POOL_NAME: pool, **attributes})

            meter.create_observable_up_down_counter(f"db.client.connection.{name}", [callback], unit, description)

        observe(
            "count",
            "{connection}",
            "The number of connections that are currently in the state described by the attribute `state`.",
            lambda total: [(total.idle, _state("idle")), (total.in_use, _state("used"))],
        )
        observe(
            "idle.max",
            "{connection}",
            "The maximum number of idle open connections allowed.",
            lambda total: [(total.idle_limit, {})],
        )
        observe(
            "max",
            "{connection}",
            "The maximum number of open connections allowed.",
            lambda total: [(total.limit, {})],
        )
        observe(
            "pending_requests",
            "{request}",
            "The number of current pending requests for an open connection.",
            lambda total: [(total.waiting, {})],
        )

    def connection_taken(self, pool: str, waited: float) -> None:
        self._waited.record(waited, {_POOL_NAME: pool})

    def connection_returned(self, pool: str, used: float) -> None:
        self._used.record(used, {_POOL_NAME: pool})

    def connection_made(self, pool: str, took: float) -> None:
        self._made.record(took, {_POOL_NAME: pool})

    def connection_timed_out(self, pool: str) -> None:
        self._timeouts.add(1, {_POOL_NAME: pool})


_Count = tuple[int | None, dict[str, str]]


def _state(name: str) -> dict[str, str]:
    return {"db.client.connection.state": name}
