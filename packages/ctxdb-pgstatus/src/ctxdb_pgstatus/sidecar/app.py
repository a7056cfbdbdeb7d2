"""`SidecarApp`: answers the requests to each endpoint of the sidecar, out of memory unless a request forbids that."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import parse_qs

from ctxdb_pgstatus._lazy import errors
from ctxdb_pgstatus.locality import Locality
from ctxdb_pgstatus.lsn import format_lsn, parse_lsn
from ctxdb_pgstatus.reading import LagLimits
from ctxdb_pgstatus.sidecar.choice import Choice
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.sidecar.server import Request, Response
from ctxdb_pgstatus.status import ClusterStatus, HostStatus, Promotion, SyncCondition

__all__ = ["Monitor", "SidecarApp"]

_CONDITIONS: Mapping[str, SyncCondition | None] = {
    "/replica": None,
    "/sync_by_time": "time",
    "/sync_by_bytes": "bytes",
    "/sync_by_time_or_bytes": "time_or_bytes",
    "/sync_by_time_and_bytes": "time_and_bytes",
}
# A request waits no longer than this, whatever `wait_ms` says.
_LONGEST_WAIT_SECONDS = 60.0


class Monitor(Protocol):
    """What the application needs of a `HostMonitor`."""

    @property
    def status(self) -> ClusterStatus:
        """All that is known of the cluster."""

    async def poll(self) -> object:
        """Ask all hosts now."""

    async def confirm_master(self, host: str) -> bool:
        """Ask the hosts anew, and return whether `host` is the master."""

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Wait for a replica that has replayed `min_position`, and return its name."""

    async def ask_server_of(self, host: str) -> object:
        """Ask a host over a new connection."""

    def replayed(self, position: int) -> Container[str]:
        """Return the names of the replicas that are known to have replayed a WAL position."""


class _InvalidParameterError(Exception):
    """A query parameter has a value that it cannot have."""


def _json(content: object, status: int = 200) -> Response:
    encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=False).translate(_CONTROLS).encode()
    return Response(status, encoded, b"application/json")


def _text(content: str, status: int = 200) -> Response:
    return Response(status, content.encode(), b"text/plain; charset=utf-8")


def _error(text: str, status: int) -> Response:
    return _json({"error_text": text}, status)


# `json.dumps` leaves these control characters as they are. Messages of hosts may contain them, and terminals obey them.
_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
_NOT_READY = _error("pg_monitor is not ready", 503)
_NOT_FOUND = _text("", 404)
_NOT_ALLOWED = Response(405, b"", b"", [(b"allow", b"GET, HEAD")])
_READING_METHODS = frozenset((b"GET", b"HEAD"))
_NOT_MONITORED = _error("This host is not monitored", 404)
_OK = _text("OK")
# The endpoints that load balancers use for their checks.
_CHECKS = frozenset(("/primary", "/replica"))
_SIZE = re.compile(r"(?P<number>[0-9]{1,19}) ?(?P<unit>b|kb|mb|gb|tb)?", re.ASCII | re.IGNORECASE)
_HIGHEST = 2**64 - 1
_UNITS = {"b": 0, "kb": 10, "mb": 20, "gb": 30, "tb": 40}


class SidecarApp:
    """Answers requests by what `monitor` knows.

    Args:
        history: the lags and changes of the last minutes, for the status page.
        locality: where the hosts and their readers are.
        sync_max_lag_ms: up to which lag in milliseconds a replica is in sync by time, which the plots show.
        poll_interval: how many seconds pass until the status page requests its present content.
    """

    def __init__(
        self,
        history: History,
        locality: Locality | None = None,
        sync_max_lag_ms: int = 1000,
        poll_interval: float = 1.0,
    ) -> None:
        self.monitor: Monitor | None = None
        """The monitor; ``None`` until it has asked every host once."""
        self._history = history
        self._locality = locality or Locality()
        self._limit_ms = sync_max_lag_ms
        self._refresh = poll_interval
        self._choice = Choice(self._locality)
        # The responses that name one host, or none: by the host, the status code without a host, and whether it is
        # JSON.
        self._names: dict[tuple[str | None, int, bool], Response] = {}
        # The responses of `/hosts` and `/replicas_info`, each with the status that it was made of. They are used until
        # there is a newer status.
        self._of_hosts: tuple[ClusterStatus, Response] | None = None
        self._of_replicas: tuple[ClusterStatus, Response] | None = None
        self._of_cluster: Mapping[str, Callable[[ClusterStatus, Request], Response]] = {
            "/master": self._master,
            "/primary": self._primary,
            "/most_sync_by_bytes": self._most_in_sync,
            **dict.fromkeys(_CONDITIONS, self._replica),
            "/hosts": self._hosts,
            "/replicas_info": self._replicas_info,
            "/status": self._status,
            "/health": self._health,
        }
        self._without_cluster: Mapping[str, Callable[[], Response]] = {
            "/live": lambda: _OK,
            "/version": self._version,
            "/ready": lambda: _NOT_READY if self.monitor is None else _OK,
            "/metrics": self._metrics,
            "/": self._page,
        }

    def __call__(self, request: Request) -> Response | Awaitable[Response]:
        """Return the response to a request; an awaitable of it if the hosts have to be asked first."""
        path, method = request.path, request.method
        answer = self._of_cluster.get(path)
        if answer is None and path not in self._without_cluster:
            return _NOT_FOUND
        # HAProxy checks by OPTIONS unless it is told otherwise (HAProxy, "option httpchk").
        if method not in _READING_METHODS and not (method == b"OPTIONS" and path in _CHECKS):
            return _NOT_ALLOWED
        if answer is None:
            return self._without_cluster[path]()
        monitor = self.monitor
        if monitor is None:
            return _NOT_READY
        if request.bypasses_memory or b"wait_ms=" in request.query:
            return self._answer_after_asking(answer, request, monitor)
        return _answer(answer, monitor.status, request)

    async def _answer_after_asking(
        self, answer: Callable[[ClusterStatus, Request], Response], request: Request, monitor: Monitor
    ) -> Response:
        path = request.path
        if request.bypasses_memory:
            if path in ("/master", "/primary"):
                try:
                    await _confirm_master(monitor)
                except asyncio.CancelledError:
                    # The client has left. The next clause would import the errors, and SQLAlchemy with them.
                    raise
                except errors.MasterUncertainError as exc:
                    return _json({"error_text": exc.args[0], "uncertain": True}, 503)
                except errors.PgStatusError as exc:
                    # The master refuses the monitor. A client that is told so may ask the master itself, over a
                    # connection that it has.
                    return _error(str(exc), 503)
                if path == "/master" and request.accepts_json:
                    return self._master_and_its_server(monitor.status)
            else:
                await monitor.poll()
            if path == "/status" and (host := _parameters(request.query).get("host")) is not None:
                # A client asks so to find out whether the name leads to another server by now: only a new connection
                # tells.
                await monitor.ask_server_of(host)
        if path in _CONDITIONS:
            try:
                parameters = _parameters(request.query)
                position = _position(parameters, "min_lsn")
                wait = min((_number(parameters, "wait_ms") or 0) / 1000, _LONGEST_WAIT_SECONDS)
            except _InvalidParameterError as exc:
                return _error(f"Invalid {exc}", 400)
            if wait and position is not None:
                await monitor.find_replica(_CONDITIONS[path], min_position=position, max_wait=wait)
        return _answer(answer, monitor.status, request)

    # --- one host -----------------------------------------------------------------------------------------------------

    def _name(self, host: str | None, request: Request, *, otherwise: int = 404) -> Response:
        """Return the response that names `host`. There are few of them, so each is made once and kept.

        Args:
            host: the name of the host; ``None`` for no host.
            request: the request.
            otherwise: the status code of the response for no host.
        """
        as_json = request.accepts_json
        response = self._names.get((host, otherwise, as_json))
        if response is None:
            status = otherwise if host is None else 200
            if as_json:
                locality = self._locality
                dc, geo = (None, None) if host is None else (locality.dcs.get(host), locality.geos.get(host))
                response = _json({"host": host, "dc": dc, "geo": geo}, status)
            else:
                response = _text(host or "", status)
            self._names[host, otherwise, as_json] = response
        return response

    def _master(self, status: ClusterStatus, request: Request) -> Response:
        return self._name(status.master, request)

    def _master_and_its_server(self, status: ClusterStatus) -> Response:
        """Return the response of `_master`, and in it the start of the master's server, by which that is known."""
        name = status.master
        host = next((each for each in status.hosts if each.host == name), None)
        started_at = None if host is None or host.possible_dead else host.started_at
        content = {
            "host": name,
            "dc": None if name is None else self._locality.dcs.get(name),
            "geo": None if name is None else self._locality.geos.get(name),
            "started_at": None if started_at is None else started_at.isoformat(),
        }
        return _json(content, 404 if name is None else 200)

    def _primary(self, status: ClusterStatus, request: Request) -> Response:
        """Tell by the status code whether the host of the query is the master; without a host, if there is a master."""
        host = status.master
        if request.query and (asked := _parameters(request.query).get("host")) is not None:
            if all(each.host != asked for each in status.hosts):
                return _NOT_MONITORED
            host = asked if asked == host else None
        return self._name(host, request, otherwise=503)

    def _replica(self, status: ClusterStatus, request: Request) -> Response:
        condition = _CONDITIONS[request.path]
        if not request.query:
            return self._name(self._choice.replica(status, condition, None), request)
        parameters = _parameters(request.query)
        limits = self._limits(parameters)
        if request.path == "/replica" and ("lag" in parameters or "host" in parameters):
            return self._check_replica(status, request, parameters, limits)
        return self._name(self._choice.replica(status, condition, limits), request)

    def _check_replica(
        self, status: ClusterStatus, request: Request, parameters: Mapping[str, str], limits: LagLimits
    ) -> Response:
        """Tell by the status code whether the host of the query is a replica within limits; without one, if any is."""
        asked = parameters.get("host")
        if asked is not None and all(each.host != asked for each in status.hosts):
            return _NOT_MONITORED
        size = _size(parameters, "lag")
        if size is not None:
            limits = replace(limits, lag_bytes=size if limits.lag_bytes is None else min(size, limits.lag_bytes))
        replicas = [each for each in status.replicas() if asked in (None, each.host) and limits.admit(each, None)]
        return self._name(replicas[0].host if replicas else None, request, otherwise=503)

    def _most_in_sync(self, status: ClusterStatus, request: Request) -> Response:
        return self._name(self._choice.most_in_sync(status, self._limits(_parameters(request.query))), request)

    def _limits(self, parameters: Mapping[str, str]) -> LagLimits:
        lag_ms, lag_bytes = _number(parameters, "lag_ms"), _number(parameters, "lag_bytes")
        position = _position(parameters, "min_lsn")
        _number(parameters, "wait_ms")
        # 0/0 is before all WAL: every replica will do, also one that has replayed nothing.
        among = self.monitor.replayed(position) if position and self.monitor is not None else None
        return LagLimits(lag_ms, lag_bytes, among)

    # --- all hosts ----------------------------------------------------------------------------------------------------

    def _hosts(self, status: ClusterStatus, _request: Request) -> Response:
        if self._of_hosts is None or self._of_hosts[0] is not status:
            self._of_hosts = (status, _json([self._describe(host, status) for host in status.hosts]))
        return self._of_hosts[1]

    def _replicas_info(self, status: ClusterStatus, _request: Request) -> Response:
        if self._of_replicas is None or self._of_replicas[0] is not status:
            self._of_replicas = (status, _json([{"host": host.host} for host in status.replicas()]))
        return self._of_replicas[1]

    def _status(self, status: ClusterStatus, request: Request) -> Response:
        name = _parameters(request.query).get("host")
        if name is None:
            return _error("Get parameter 'host' wasn't passed", 400)
        for host in status.hosts:
            if host.host == name:
                return _json(self._describe(host, status))
        return _NOT_MONITORED

    def _health(self, status: ClusterStatus, _request: Request) -> Response:
        """Return whether the cluster takes writes, and whether all of its hosts are alive."""
        alive = sum(host.alive for host in status.hosts)
        whole = "ok" if alive == len(status.hosts) else "degraded"
        content = {
            "status": "down" if status.master is None else whole,
            "master": status.master,
            "hosts": len(status.hosts),
            "alive": alive,
            "replicas": len(status.replicas()),
        }
        return _json(content, 503 if status.master is None else 200)

    # --- for people and Prometheus: what these need is imported for the first of them ---------------------------------

    def _version(self) -> Response:
        return _text(importlib.import_module("importlib.metadata").version("ctxdb-pgstatus"))

    def _metrics(self) -> Response:
        metrics = importlib.import_module("ctxdb_pgstatus.sidecar.metrics")
        status = None if self.monitor is None else self.monitor.status
        content = metrics.render(status, self._history.changes_in_all)
        return Response(200, content, metrics.CONTENT_TYPE)

    def _page(self) -> Response:
        page = importlib.import_module("ctxdb_pgstatus.sidecar.page")
        status = None if self.monitor is None else self.monitor.status
        content = page.render(status, self._history, self._limit_ms, self._refresh)
        return Response(200, content.encode(), b"text/html; charset=utf-8", page.HEADERS)

    def _describe(self, host: HostStatus, status: ClusterStatus) -> dict[str, Any]:
        known = host.alive and host.position is not None
        return {
            "host": host.host,
            "dc": self._locality.dcs.get(host.host),
            "geo": self._locality.geos.get(host.host),
            "distance": self._locality.distance(host.host),
            "master": host.host == status.master,
            "alive": host.alive,
            # As in pg-status, which says so of each dead host as well.
            "possible_dead": host.possible_dead or not host.alive,
            "role": host.role,
            "lag_ms": host.lag_ms if host.alive else None,
            "sync_by_time": host.in_sync_by_time,
            "lag_bytes": host.lag_bytes if host.alive else None,
            "sync_by_bytes": host.in_sync_by_bytes,
            "lsn": format_lsn(host.position) if known and host.position is not None else None,
            "timeline": host.timeline,
            "since": host.since.isoformat(),
            "error": host.error,
            "takes_reads": host.takes_reads,
            "fault": host.fault,
            "system_identifier": host.system_identifier,
            "started_at": None if host.started_at is None else host.started_at.isoformat(),
            "promotion": None if host.promotion is None else _describe_promotion(host.promotion),
        }


def _describe_promotion(promotion: Promotion) -> dict[str, Any]:
    return {"timeline": promotion.timeline, "lsn": format_lsn(promotion.position)}


async def _confirm_master(monitor: Monitor) -> None:
    """Ask the hosts anew, so that the monitor's status tells the master as of after this call."""
    host = monitor.status.master
    if host is None or not await monitor.confirm_master(host):
        await monitor.poll()


def _answer(answer: Callable[[ClusterStatus, Request], Response], status: ClusterStatus, request: Request) -> Response:
    try:
        return answer(status, request)
    except _InvalidParameterError as exc:
        return _error(f"Invalid {exc}", 400)


def _parameters(query: bytes) -> dict[str, str]:
    found = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    return {name: values[0] for name, values in found.items()}


def _number(parameters: Mapping[str, str], name: str) -> int | None:
    text = parameters.get(name)
    if text is None:
        return None
    # pg-status takes numbers up to 2^64 - 1, and some clients give the highest one for "no limit". A longer text is not
    # read at all, as Python takes quadratic time for that.
    if text.isascii() and text.isdigit() and len(text) <= len(str(_HIGHEST)) and (number := int(text)) <= _HIGHEST:
        return number
    raise _InvalidParameterError(name)


def _size(parameters: Mapping[str, str], name: str) -> int | None:
    """Return a number of bytes, with or without a unit of PostgreSQL's: ``1048576``, ``16MB``."""
    text = parameters.get(name)
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise _InvalidParameterError(name)
    return int(match["number"]) << _UNITS[(match["unit"] or "b").lower()]


def _position(parameters: Mapping[str, str], name: str) -> int | None:
    text = parameters.get(name)
    if text is None:
        return None
    try:
        return parse_lsn(text)
    except ValueError:
        raise _InvalidParameterError(name) from None
