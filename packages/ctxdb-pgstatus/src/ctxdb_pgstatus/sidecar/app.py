"""The sidecar's HTTP interface, an ASGI application: every answer comes out of memory."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, MutableMapping
from importlib.metadata import version
from typing import Any, Protocol
from urllib.parse import parse_qs

from ctxdb_pgstatus.lsn import format_lsn, parse_lsn
from ctxdb_pgstatus.sidecar import metrics, page
from ctxdb_pgstatus.sidecar.choice import Choice, Limits, Locality
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.status import ClusterStatus, HostStatus, SyncCondition

__all__ = ["Monitor", "SidecarApp"]

_Headers = Iterable[tuple[bytes, bytes]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_CONDITIONS: Mapping[str, SyncCondition | None] = {
    "/replica": None,
    "/sync_by_time": "time",
    "/sync_by_bytes": "bytes",
    "/sync_by_time_or_bytes": "time_or_bytes",
    "/sync_by_time_and_bytes": "time_and_bytes",
}
# No request is kept for longer than this, whatever it asks for.
_LONGEST_WAIT_SECONDS = 60.0


class Monitor(Protocol):
    """What the application needs of a monitor."""

    @property
    def status(self) -> ClusterStatus:
        """The cluster, as it is known now."""

    async def poll(self) -> object:
        """Ask all hosts now."""

    async def confirm_master(self, host: str) -> bool:
        """Ask the hosts anew, and return whether `host` is the master."""

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica, after having waited for one that has replayed `min_position`."""

    def replayed(self, position: int) -> Container[str]:
        """Return the replicas that are known to have replayed a WAL position."""


class _Response:
    """A response, as the messages that it is sent by: made once where it is the same for all."""

    __slots__ = ("body", "start")

    def __init__(self, status: int, content_type: bytes, content: bytes, headers: _Headers = ()) -> None:
        fields = [(b"content-length", b"%d" % len(content)), (b"cache-control", b"no-store"), *headers]
        if content:
            fields.append((b"content-type", content_type))
        self.start = {"type": "http.response.start", "status": status, "headers": fields}
        self.body = {"type": "http.response.body", "body": content}


class _InvalidParameterError(Exception):
    """A query parameter has a value that it cannot have."""


def _json(content: object, status: int = 200) -> _Response:
    encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return _Response(status, b"application/json", encoded)


def _text(content: str, status: int = 200) -> _Response:
    return _Response(status, b"text/plain; charset=utf-8", content.encode())


def _error(text: str, status: int) -> _Response:
    return _json({"error_text": text}, status)


_NOT_READY = _error("pg_monitor is not ready", 503)
_NOT_FOUND = _text("", 404)
_NOT_ALLOWED = _Response(405, b"", b"", [(b"allow", b"GET, HEAD")])
_OK = _text("OK")


class SidecarApp:
    """Answers what `monitor` knows.

    Args:
        history: what the status page tells of the last minutes.
        locality: which replicas are preferred.
        sync_max_lag_ms: the limit that the plots show.
        poll_interval: how often the status page asks anew, in seconds.
    """

    def __init__(
        self,
        history: History,
        locality: Locality | None = None,
        sync_max_lag_ms: int = 1000,
        poll_interval: float = 1.0,
    ) -> None:
        self.monitor: Monitor | None = None
        """Whose knowledge is answered; ``None`` until every host has been asked once."""
        self._history = history
        self._locality = locality or Locality()
        self._limit_ms = sync_max_lag_ms
        self._refresh = poll_interval
        self._choice = Choice(self._locality)
        self._version = _text(version("ctxdb-pgstatus"))
        self._names: dict[tuple[str | None, bool], _Response] = {}
        self._of_hosts: tuple[ClusterStatus, _Response] | None = None
        self._of_cluster: Mapping[str, Callable[[ClusterStatus, bytes], _Response]] = {
            "/hosts": self._hosts,
            "/replicas_info": self._replicas_info,
            "/status": self._status,
            "/health": self._health,
        }
        self._without_cluster: Mapping[str, Callable[[], _Response]] = {
            "/live": lambda: _OK,
            "/version": lambda: self._version,
            "/ready": lambda: _NOT_READY if self.monitor is None else _OK,
            "/metrics": self._metrics,
            "/": self._page,
        }

    async def __call__(self, scope: MutableMapping[str, Any], _receive: object, send: _Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        response = await self._respond(scope)
        await send(response.start)
        await send(response.body)

    async def _respond(self, scope: MutableMapping[str, Any]) -> _Response:
        path = scope["path"]
        names_host = path == "/master" or path in _CONDITIONS or path == "/most_sync_by_bytes"
        if not names_host and path not in self._of_cluster and path not in self._without_cluster:
            return _NOT_FOUND
        if scope["method"] not in ("GET", "HEAD"):
            return _NOT_ALLOWED
        if path in self._without_cluster:
            return self._without_cluster[path]()
        monitor = self.monitor
        if monitor is None:
            return _NOT_READY
        as_json = uncached = False
        for name, value in scope["headers"]:
            if name == b"accept":
                as_json = as_json or b"application/json" in value
            elif name == b"cache-control":
                uncached = uncached or b"no-cache" in value
        query: bytes = scope["query_string"]
        if path == "/master":
            host = await _confirmed_master(monitor) if uncached else monitor.status.master
            return self._name(host, as_json=as_json)
        if uncached:
            await monitor.poll()
        if not names_host:
            return self._of_cluster[path](monitor.status, query)
        try:
            return self._name(await self._replica(monitor, path, query), as_json=as_json)
        except _InvalidParameterError as exc:
            return _error(f"Invalid {exc}", 400)

    async def _replica(self, monitor: Monitor, path: str, query: bytes) -> str | None:
        limits = None
        if query:
            parameters = _parameters(query)
            lag_ms, lag_bytes = _number(parameters, "lag_ms"), _number(parameters, "lag_bytes")
            position = _position(parameters, "min_lsn")
            wait = min((_number(parameters, "wait_ms") or 0) / 1000, _LONGEST_WAIT_SECONDS)
            if wait and position is not None and path in _CONDITIONS:
                await monitor.find_replica(_CONDITIONS[path], min_position=position, max_wait=wait)
            limits = Limits(lag_ms, lag_bytes, None if position is None else monitor.replayed(position))
        if path in _CONDITIONS:
            return self._choice.replica(monitor.status, _CONDITIONS[path], limits)
        return self._choice.most_in_sync(monitor.status, limits or Limits())

    def _name(self, host: str | None, *, as_json: bool) -> _Response:
        """Return the response that names `host`: there are as many as hosts, so each is made once."""
        response = self._names.get((host, as_json))
        if response is None:
            status = 404 if host is None else 200
            response = _json({"host": host}, status) if as_json else _text(host or "", status)
            self._names[host, as_json] = response
        return response

    def _hosts(self, status: ClusterStatus, _query: bytes) -> _Response:
        if self._of_hosts is None or self._of_hosts[0] is not status:
            self._of_hosts = (status, _json([self._describe(host, status) for host in status.hosts]))
        return self._of_hosts[1]

    def _replicas_info(self, status: ClusterStatus, _query: bytes) -> _Response:
        return _json([{"host": host.host} for host in status.replicas()])

    def _status(self, status: ClusterStatus, query: bytes) -> _Response:
        name = _parameters(query).get("host")
        if name is None:
            return _error("Get parameter 'host' wasn't passed", 400)
        for host in status.hosts:
            if host.host == name:
                return _json(self._describe(host, status))
        return _error("This host is not monitored", 404)

    def _health(self, status: ClusterStatus, _query: bytes) -> _Response:
        """Return whether the cluster takes writes, and whether all of it is there."""
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

    def _metrics(self) -> _Response:
        status = None if self.monitor is None else self.monitor.status
        content = metrics.render(status, self._history.changes_in_all)
        return _Response(200, b"text/plain; version=0.0.4; charset=utf-8", content.encode())

    def _page(self) -> _Response:
        status = None if self.monitor is None else self.monitor.status
        content = page.render(status, self._history, self._limit_ms, self._refresh)
        return _Response(200, b"text/html; charset=utf-8", content.encode(), page.HEADERS)

    def _describe(self, host: HostStatus, status: ClusterStatus) -> dict[str, Any]:
        known = host.alive and host.position is not None
        return {
            "host": host.host,
            "dc": self._locality.dcs.get(host.host),
            "geo": self._locality.geos.get(host.host),
            "distance": self._locality.distance(host.host),
            "master": host.host == status.master,
            "alive": host.alive,
            "role": host.role,
            "lag_ms": host.lag_ms if host.alive else None,
            "sync_by_time": host.in_sync_by_time,
            "lag_bytes": host.lag_bytes if host.alive else None,
            "sync_by_bytes": host.in_sync_by_bytes,
            "lsn": format_lsn(host.position) if known and host.position is not None else None,
            "timeline": host.timeline,
            "since": host.since.isoformat(),
            "error": host.error,
        }


async def _confirmed_master(monitor: Monitor) -> str | None:
    """Return the master after all that happened before the call."""
    host = monitor.status.master
    if host is not None and await monitor.confirm_master(host):
        return host
    await monitor.poll()
    return monitor.status.master


def _parameters(query: bytes) -> dict[str, str]:
    found = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    return {name: values[0] for name, values in found.items()}


def _number(parameters: Mapping[str, str], name: str) -> int | None:
    text = parameters.get(name)
    if text is None:
        return None
    # Longer ones are no lag of anything, and take long to read.
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise _InvalidParameterError(name)
    return int(text)


def _position(parameters: Mapping[str, str], name: str) -> int | None:
    text = parameters.get(name)
    if text is None:
        return None
    try:
        return parse_lsn(text)
    except ValueError:
        raise _InvalidParameterError(name) from None
