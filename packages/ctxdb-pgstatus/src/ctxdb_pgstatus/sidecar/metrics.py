"""What Prometheus reads: its text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

from ctxdb_pgstatus.status import ClusterStatus, HostStatus

__all__ = ["render"]

_NAMESPACE = "ctxdb_pgstatus"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_OF_HOSTS: Sequence[tuple[str, str, Callable[[HostStatus, ClusterStatus], float | None]]] = (
    ("host_up", "Whether the host answers.", lambda host, _: host.alive),
    ("host_master", "Whether the host is the master.", lambda host, status: host.host == status.master),
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
    ("host_timeline", "The timeline that the host writes, or receives.", lambda host, _: host.timeline),
    (
        "host_since_timestamp_seconds",
        "Since when the host has been alive, or not, in its role.",
        lambda host, _: host.since.timestamp(),
    ),
)


def render(status: ClusterStatus | None, changes: int) -> str:
    """Return the metrics.

    Args:
        status: of the cluster; ``None`` as long as nothing is known.
        changes: how many changes have been noticed.
    """
    lines: list[str] = []
    _family(lines, "build_info", "gauge", "The version of the sidecar.", [({"version": version("ctxdb-pgstatus")}, 1)])
    _family(lines, "ready", "gauge", "Whether every host has been asked once.", [({}, status is not None)])
    if status is not None:
        _family(lines, "master_known", "gauge", "Whether there is a master.", [({}, status.master is not None)])
        _family(
            lines, "changes_total", "counter", "How often a host's state or the master has changed.", [({}, changes)]
        )
        _family(
            lines,
            "last_update_timestamp_seconds",
            "gauge",
            "When the status was last put together.",
            [({}, status.at.timestamp())],
        )
        for name, text, value_of in _OF_HOSTS:
            values = [({"host": host.host}, value_of(host, status)) for host in status.hosts]
            _family(lines, name, "gauge", text, values)
    return "\n".join(lines) + "\n"


def _family(
    lines: list[str], name: str, kind: str, text: str, values: Sequence[tuple[dict[str, str], float | None]]
) -> None:
    lines.append(f"# HELP {_NAMESPACE}_{name} {text}")
    lines.append(f"# TYPE {_NAMESPACE}_{name} {kind}")
    for labels, value in values:
        if value is not None:
            shown = ",".join(f'{label}="{content.translate(_ESCAPES)}"' for label, content in labels.items())
            braces = f"{{{shown}}}" if shown else ""
            lines.append(f"{_NAMESPACE}_{name}{braces} {int(value) if isinstance(value, bool) else value!r}")
