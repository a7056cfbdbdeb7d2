"""Reads the answers of a sidecar: the JSON documents of `ctxdb-pgstatus`, and of pg-status, which has fewer members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, get_args

from ctxdb_pgstatus.lsn import parse_lsn
from ctxdb_pgstatus.status import ClusterStatus, Fault, HostStatus, Promotion, Role, SyncCondition, nearest, responsive

__all__ = ["REPLICA_PATHS", "Cluster", "ClusterReader", "Confirmed", "read_confirmed", "read_host", "read_start"]

REPLICA_PATHS: dict[SyncCondition | None, str] = {
    None: "/replica",
    "time": "/sync_by_time",
    "bytes": "/sync_by_bytes",
    "time_or_bytes": "/sync_by_time_or_bytes",
    "time_and_bytes": "/sync_by_time_and_bytes",
}
"""The endpoint that answers a replica, for each way to be in sync."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The answer of ``/hosts``.

    Attributes:
        status: all hosts.
        replicas: for each way to be in sync, the names of the replicas to take turns: of the replicas that are in sync
            so, the nearest of those whose last poll was answered.
        tells_timelines: whether the sidecar is `ctxdb-pgstatus`. pg-status tells no timelines, and does not know the
            parameters that choose replicas by WAL position.
    """

    status: ClusterStatus
    replicas: Mapping[SyncCondition | None, Sequence[str]]
    tells_timelines: bool


@dataclass(slots=True)
class ClusterReader:
    """Reads the answers of ``/hosts``.

    pg-status tells neither the role of a host nor since when it has had that role. Here the role follows from who is
    the master, and the time is that of the first answer in which the host has this role.
    """

    _before: dict[str, HostStatus] = field(default_factory=dict)

    def read(self, content: Any) -> Cluster:
        """Return what an answer tells of the cluster.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the answer is none of a sidecar's.
        """
        now = datetime.now(UTC)
        hosts = tuple(self._read_host(entry, now) for entry in content)
        self._before = {host.host: host for host in hosts}
        master = next((str(entry["host"]) for entry in content if entry["master"] and entry["alive"]), None)
        status = ClusterStatus(hosts, master, now)
        distances = {str(entry["host"]): int(entry.get("distance", 0)) for entry in content}
        found = {sync: nearest(responsive(status.replicas(sync)), distances.__getitem__) for sync in REPLICA_PATHS}
        replicas = {sync: [host.host for host in hosts] for sync, hosts in found.items()}
        return Cluster(status, replicas, any("timeline" in entry for entry in content))

    def _read_host(self, entry: dict[str, Any], now: datetime) -> HostStatus:
        name, alive = _text(entry["host"]), bool(entry["alive"])
        role: Role | None = None
        if alive:
            # A primary that is not the cluster's master has the role "master" all the same, and is no replica.
            role = "master" if entry.get("role", "master" if entry["master"] else "replica") == "master" else "replica"
        before = self._before.get(name)
        since = _time(entry.get("since"))
        if since is None:
            since = before.since if before is not None and (before.alive, before.role) == (alive, role) else now
        fault = entry.get("fault")
        return HostStatus(
            name,
            alive,
            role,
            since,
            timeline=_number(entry.get("timeline")),
            position=parse_lsn(entry["lsn"]) if entry.get("lsn") else None,
            lag_ms=_number(entry.get("lag_ms")),
            lag_bytes=_number(entry.get("lag_bytes")),
            error=None if entry.get("error") is None else _text(entry["error"]),
            in_sync_by_time=bool(entry.get("sync_by_time")),
            in_sync_by_bytes=bool(entry.get("sync_by_bytes")),
            # A sidecar says "possible_dead" of each dead host as well; `HostStatus` says so of hosts that are alive.
            possible_dead=alive and bool(entry.get("possible_dead")),
            takes_reads=bool(entry.get("takes_reads", True)),
            # A newer sidecar may tell faults that this version does not know.
            fault=fault if fault in get_args(Fault) else None,
            system_identifier=_number(entry.get("system_identifier")),
            started_at=_time(entry.get("started_at")),
            promotion=_read_promotion(entry.get("promotion")),
        )


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The answer of ``/master`` to a request that bypasses the sidecar's memory.

    Attributes:
        host: the master's name; ``None`` if there is no master.
        started_at: when the master's server was started; ``None`` if that is unknown.
        tells_server: whether the sidecar tells which server the master is: pg-status does not.
        uncertain: why the sidecar cannot tell whether the name still leads to the server of the master; ``None`` if it
            can.
    """

    host: str | None
    started_at: datetime | None = None
    tells_server: bool = False
    uncertain: str | None = None


def read_confirmed(content: Any) -> Confirmed:
    """Return what an answer of ``/master`` tells that bypassed the sidecar's memory."""
    if content.get("uncertain"):
        return Confirmed(None, uncertain=_text(content["error_text"]))
    return Confirmed(read_host(content), _time(content.get("started_at")), "started_at" in content)


def read_host(content: Any) -> str | None:
    """Return the name of the host that an answer names; ``None`` if it names none."""
    host = content["host"]
    if host is not None and not isinstance(host, str):
        raise TypeError(host)
    return host or None


def read_start(content: Any) -> str | None:
    """Return when the server of the host was started that an answer of ``/status`` describes, as the answer writes it.

    ``None`` if that is unknown: the sidecar cannot ask the host at the moment, or is pg-status.
    """
    start = None if content.get("possible_dead") else content.get("started_at")
    _time(start)
    return None if start is None else _text(start)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _time(value: Any) -> datetime | None:
    if value is None:
        return None
    time = datetime.fromisoformat(value)
    if time.tzinfo is None:
        raise ValueError(f"{value!r} has no time zone")
    return time


def _read_promotion(content: Any) -> Promotion | None:
    if content is None:
        return None
    timeline = _number(content["timeline"])
    return None if timeline is None else Promotion(timeline, parse_lsn(content["lsn"]))
