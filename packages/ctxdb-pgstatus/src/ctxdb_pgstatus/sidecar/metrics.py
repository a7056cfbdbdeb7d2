"""The metrics of the sidecar, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ctxdb_pgstatus.status import ClusterStatus, Fault, HostStatus

__all__ = ["CONTENT_TYPE", "render"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
"""The media type of the metrics."""

_NAMESPACE = "ctxdb_pgstatus"
_OF_HOSTS: Sequence[tuple[str, str, Callable[[HostStatus, ClusterStatus], float | None]]] = (
    ("host_up", "Whether the host answers.", lambda host, _: host.alive),
    ("host_master", "Whether the host is the master.", lambda host, status: host.host == status.master),
    (
        "host_claims_master",
        "Whether the host says that it is the master: more than one that does is a fault.",
        lambda host, _: host.alive and host.role == "master",
    ),
    ("host_replica", "Whether the host is a living replica.", lambda host, _: host.alive and host.role == "replica"),
    (
        "host_lag_seconds",
        "How far the host is behind the master, in time.",
        lambda host, _: host.lag_ms / 1000 if host.alive and host.lag_ms is not None else None,
    ),
    (
        "host_lag_bytes",
        "How far the host is behind the master, in bytes of WAL.",
        lambda host, _: host.lag_bytes if host.alive else None,
    ),
    ("host_in_sync_by_time", "Whether the lag in time is within its limit.", lambda host, _: host.in_sync_by_time),
    ("host_in_sync_by_bytes", "Whether the lag in bytes is within its limit.", lambda host, _: host.in_sync_by_bytes),
    (
        "host_wal_position_bytes",
        "The WAL position: what a master has inserted, what a replica has replayed.",
        lambda host, _: host.position if host.alive else None,
    ),
    (
        "host_possible_dead",
        "Whether the host counts as alive, although its last poll has failed.",
        lambda host, _: host.possible_dead,
    ),
    ("host_timeline", "The timeline that the host writes, or receives.", lambda host, _: host.timeline),
    (
        "host_since_timestamp_seconds",
        "The time from which on the host has been dead, or alive in its role.",
        lambda host, _: host.since.timestamp(),
    ),
)


def render(status: ClusterStatus | None, changes: int) -> bytes:
    """Return the metrics, in Prometheus's text format.

    Args:
        status: the status of the cluster; ``None`` as long as nothing is known.
        changes: how many changes have been noticed.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(status, changes))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Families(Collector):
    """The metrics of one moment."""

    def __init__(self, status: ClusterStatus | None, changes: int) -> None:
        self._status = status
        self._changes = changes

    def collect(self) -> Iterator[Metric]:
        """Yield each family of metrics."""
        status = self._status
        yield _gauge("build_info", "The version of the sidecar.", {"version": version("ctxdb-pgstatus")}, 1)
        yield _gauge("ready", "Whether every host has been asked once.", {}, status is not None)
        if status is None:
            return
        yield _gauge("master_known", "Whether there is a master.", {}, status.master is not None)
        changes = CounterMetricFamily(f"{_NAMESPACE}_changes", "How often a host's state or the master has changed.")
        changes.add_metric((), self._changes)
        yield changes
        at = status.at.timestamp()
        yield _gauge("last_update_timestamp_seconds", "When the status was last put together.", {}, at)
        for name, text, value_of in _OF_HOSTS:
            family = GaugeMetricFamily(f"{_NAMESPACE}_{name}", text, labels=("host",))
            for host in status.hosts:
                value = value_of(host, status)
                if value is not None:
                    family.add_metric((host.host,), float(value))
            yield family
        faults = GaugeMetricFamily(f"{_NAMESPACE}_host_fault", _FAULT, labels=("host", "fault"))
        for host in status.hosts:
            for fault in get_args(Fault):
                faults.add_metric((host.host, fault), float(host.fault == fault))
        yield faults


_FAULT = "Whether a living host is not what it says, by what is wrong."


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(f"{_NAMESPACE}_{name}", text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), float(value))
    return family
