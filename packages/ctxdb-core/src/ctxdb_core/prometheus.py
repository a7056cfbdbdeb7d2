"""Prometheus: metrics of pools, transactions and units of work, with ``ctxdb-core[prometheus]``.

``deploy/grafana`` has a dashboard for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._telemetry.pools import PoolFollower
from ctxdb_core._telemetry.units import FollowedTransaction, FollowedUnit, UnitFollower

__all__ = ["instrument"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def instrument(*dbs: DBConnect, registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Add metrics of all work on `dbs` to `registry` from now on; call this function once for each registry.

    ``prometheus_client.make_asgi_app()`` serves those of the default registry. Each worker process tells its own, as
    each has pools of its own: let Prometheus ask each of them.

    Args:
        *dbs: the databases.
        registry: where the metrics are registered.

    Returns:
        A function without arguments that ends the instrumentation, and takes the metrics out of the registry.

    Raises:
        ArgumentTypeError: there is no database, or one is no `DBConnect` (a ``TypeError``, too).
        ValueError: the registry has such metrics already.
    """
    units = _Units(dbs)
    pools = _Pools(dbs)
    collector = _Collector(dbs, units, pools)
    try:
        registry.register(collector)
    except ValueError:
        units.stop()
        pools.stop()
        raise

    def stop() -> None:
        units.stop()
        pools.stop()
        registry.unregister(collector)

    return stop


class _Units(UnitFollower):
    def __init__(self, dbs: Iterable[DBConnect]) -> None:
        self.transactions = Histogram(
            "ctxdb_transaction_duration_seconds",
            "How long transactions lasted, from their connection to the end of COMMIT or ROLLBACK",
            ["host", "outcome"],
            registry=None,
            buckets=_SECONDS,
        )
        self.units = Histogram(
            "ctxdb_unit_duration_seconds",
            "How long units of work lasted that have taken a connection, from their first session to their end",
            ["outcome"],
            registry=None,
            buckets=_SECONDS,
        )
        super().__init__(dbs)

    def transaction_ends(self, transaction: FollowedTransaction) -> None:
        self.transactions.labels(transaction.host, transaction.outcome).observe(transaction.duration)

    def unit_ends(self, unit: FollowedUnit) -> None:
        self.units.labels(unit.outcome or "rolled_back").observe(perf_counter() - unit.started)


class _Pools(PoolFollower):
    def __init__(self, dbs: Iterable[DBConnect]) -> None:
        def times(name: str, description: str) -> Histogram:
            return Histogram(name, description, ["pool"], registry=None, buckets=_SECONDS)

        self.waited = times("ctxdb_connection_wait_seconds", "How long connections were waited for at the pool")
        self.used = times("ctxdb_connection_use_seconds", "How long connections were held")
        self.made = times("ctxdb_connection_create_seconds", "How long it took to open connections to the server")
        self.timeouts = Counter(
            "ctxdb_connection_timeouts", "How often no connection was free within the pool's time-out", ["pool"],
            registry=None,
        )  # fmt: skip
        super().__init__(dbs)

    def connection_taken(self, pool: str, waited: float) -> None:
        self.waited.labels(pool).observe(waited)

    def connection_returned(self, pool: str, used: float) -> None:
        self.used.labels(pool).observe(used)

    def connection_made(self, pool: str, took: float) -> None:
        self.made.labels(pool).observe(took)

    def connection_timed_out(self, pool: str) -> None:
        self.timeouts.labels(pool).inc()


class _Collector:
    """Reads the pools when Prometheus asks, and tells what the followers have counted since."""

    def __init__(self, dbs: tuple[DBConnect, ...], units: _Units, pools: _Pools) -> None:
        self._dbs = dbs
        self._units = units
        self._pools = pools

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics whose names the registry compares with those that it has."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield each metric; the registry calls this."""
        connections = _gauge("ctxdb_pool_connections", "Open connections: in use, or idle", ["pool", "state"])
        limit = _gauge("ctxdb_pool_connections_limit", "How many connections there may be", ["pool"])
        waiting = _gauge("ctxdb_pool_waiting", "How many tasks wait for a connection", ["pool"])
        for name, total in self._pools.totals().items():
            connections.add_metric([name, "in_use"], total.in_use)
            connections.add_metric([name, "idle"], total.idle)
            waiting.add_metric([name], total.waiting)
            if total.limit is not None:
                limit.add_metric([name], total.limit)
        units = {unit.id: unit for db in self._dbs for unit in db.status().units}
        held = _gauge("ctxdb_units_open", "Units of work that have a session open", [])
        held.add_metric([], len(units))
        oldest = _gauge("ctxdb_unit_oldest_seconds", "For how long the oldest of them has had one", [])
        oldest.add_metric([], max((unit.open_for for unit in units.values()), default=0.0))
        yield from (connections, limit, waiting, held, oldest)
        for metric in (
            self._units.transactions,
            self._units.units,
            self._pools.waited,
            self._pools.used,
            self._pools.made,
            self._pools.timeouts,
        ):
            yield from metric.collect()


def _gauge(name: str, description: str, labels: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, description, labels=labels)
