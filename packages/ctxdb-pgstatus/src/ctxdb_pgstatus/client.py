"""`PgStatusClient`: asks a running sidecar, and keeps what it answers for a moment."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from threading import Lock
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, get_args
from urllib.parse import urlencode

import httpx

from ctxdb_pgstatus.errors import MasterUncertainError, OptionError, SidecarError
from ctxdb_pgstatus.lsn import format_lsn, parse_lsn
from ctxdb_pgstatus.reading import ReadRule
from ctxdb_pgstatus.source import KnownMaster
from ctxdb_pgstatus.status import ClusterStatus, Fault, HostStatus, Promotion, Role, SyncCondition

__all__ = ["PgStatusClient"]

_logger = logging.getLogger("ctxdb_pgstatus.client")

_HEADERS = {"accept": "application/json", "accept-encoding": "identity"}
# A host takes 400 bytes: this is room for two thousand of them. Parsing it cannot take long.
_LONGEST_ANSWER = 1 << 20
_ANSWERS = (httpx.codes.OK, httpx.codes.NOT_FOUND, httpx.codes.SERVICE_UNAVAILABLE)
# How a sidecar says that it is there, and cannot tell where the name of the master leads.
_UNCERTAIN = b'"uncertain":true'

_Answer = TypeVar("_Answer")
_PATHS: dict[SyncCondition | None, str] = {
    None: "/replica",
    "time": "/sync_by_time",
    "bytes": "/sync_by_bytes",
    "time_or_bytes": "/sync_by_time_or_bytes",
    "time_and_bytes": "/sync_by_time_and_bytes",
}


class PgStatusClient:
    """Knows what a sidecar knows: `ctxdb-pgstatus` or pg-status. A source for `follow_master` and `follow_replica`.

    An answer is kept for `max_age`, and for longer while the sidecar cannot be asked. Callers that need the same answer
    at the same time share one request. It may be used on several event loops, and has an HTTP client for each: close
    it, or use it as an async context manager, on every one of them.

    pg-status confirms nothing anew: with it, `confirm_master` is as recent as its last poll of the hosts.

    Args:
        base_url: where the sidecar is: ``http://127.0.0.1:8000``.
        max_age: for how many seconds an answer is taken out of memory.
        timeout: for how many seconds an answer is waited for.
        max_stale: how many seconds an answer may be old if the sidecar cannot be asked; ``None`` for any age.
        grace: how many seconds after its last answer the sidecar may be away before commits count as unconfirmed. Until
            then the host that a commit was made on is asked itself, on the commit's own connection, whether it is a
            primary still. That does not show a promotion that neither it nor the sidecar has told of: a primary that
            was cut off while the sidecar was away, too, takes writes that the cluster will not have. 0 for never.

    Raises:
        OptionError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        base_url: str,
        *,
        max_age: float = 1.0,
        timeout: float = 3.0,
        max_stale: float | None = None,
        grace: float = 30.0,
    ) -> None:
        self._url = _base_url(base_url)
        self._shown_url = str(self._url.copy_with(username=None, password=None, query=None)).rstrip("/")
        if not 0 <= max_age < math.inf:
            raise OptionError(f"`max_age` is {max_age!r}: give seconds, 0 or more.")
        if not 0 < timeout < math.inf:
            raise OptionError(f"`timeout` is {timeout!r}: give seconds, above 0.")
        if max_stale is not None and not max_stale >= max_age:
            raise OptionError(f"`max_stale` is {max_stale!r}: give seconds, at least those of `max_age`, or None.")
        if not 0 <= grace < math.inf:
            raise OptionError(f"`grace` is {grace!r}: give seconds, 0 or more.")
        self._max_age = max_age
        self._grace = grace
        self._timeout = timeout
        self._max_stale = math.inf if max_stale is None else max_stale
        self._master = _Question[str | None]("/master", _read_host)
        self._cluster = _Question[_Cluster]("/hosts", _ClusterReader().read)
        # The same answer as that of `_master`, but asked of the hosts themselves.
        self._confirmed = _Question[_Confirmed]("/master", _read_confirmed, no_cache=True)
        self._doubts = 0
        self._doubted_at: dict[str, float] = {}
        self._not_replayed_at = -math.inf
        self._turns = {condition: count() for condition in _PATHS}
        self._reader_turns = count()
        self._servers: dict[str, _Kept[datetime | None]] = {}
        self._loops: dict[asyncio.AbstractEventLoop, _OnLoop] = {}
        self._lock = Lock()
        self._failing = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the requests and close the connections of this event loop. A later question opens them anew."""
        with self._lock:
            here = self._loops.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.close()

    async def master(self) -> str | None:
        """Return the master's name; ``None`` if there is none.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no answer of before, or it is too old.
        """
        return await self._ask(self._master)

    async def replica(self) -> str | None:
        """Return a replica's name, each in its turn; the master's if there is none; ``None`` without a master.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no answer of before, or it is too old.
        """
        return await self.find_replica()

    async def sync_by_time(self) -> str | None:
        """Return a replica as `replica` does, of those that are in sync by time."""
        return await self.find_replica("time")

    async def sync_by_bytes(self) -> str | None:
        """Return a replica as `replica` does, of those that are in sync by bytes."""
        return await self.find_replica("bytes")

    async def sync_by_time_or_bytes(self) -> str | None:
        """Return a replica as `replica` does, of those that are in sync by time or by bytes."""
        return await self.find_replica("time_or_bytes")

    async def sync_by_time_and_bytes(self) -> str | None:
        """Return a replica as `replica` does, of those that are in sync both by time and by bytes."""
        return await self.find_replica("time_and_bytes")

    async def hosts(self) -> tuple[HostStatus, ...]:
        """Return all hosts.

        Of pg-status, which does not tell, `HostStatus.since` is when this client saw it first.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no answer of before, or it is too old.
        """
        return (await self._ask(self._cluster)).status.hosts

    async def find_master(self) -> str | None:
        """Return the master's name, as `master` does."""
        return await self._ask(self._master)

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica's name, each in its turn; the master's if no replica will do; ``None`` without a master.

        Args:
            sync: by which lag it has to be in sync.
            min_position: a WAL position in bytes that it must have replayed: then the sidecar is asked each time.
            max_wait: how long the sidecar may wait for one that has replayed `min_position`, in seconds.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no answer of before, or it is too old.
        """
        if min_position is not None:
            return await self._find_replayed(sync, min_position, max_wait)
        replicas = (await self._ask(self._cluster)).replicas[sync]
        if not replicas:
            return await self._ask(self._master)
        return replicas[next(self._turns[sync]) % len(replicas)]

    async def find_reader(
        self, rule: ReadRule, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        """Return a replica's name by a rule, each in its turn; else the master's, if the rule allows that.

        Args:
            rule: what it has to be like.
            min_position: a WAL position in bytes that it must have replayed: then the sidecar is asked each time.
            max_wait: how long the sidecar may wait for one that has replayed `min_position`, in seconds.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no answer of before, or it is too old.
        """
        status = (await self._ask(self._cluster)).status
        replicas = rule.best(status.replicas())
        if min_position is not None:
            # The sidecar chooses among all that have replayed it, and this one is taken if the rule admits it.
            found = await self._find_replayed(rule.sync, min_position, max_wait, rule)
            admitted = {each.host for each in status.replicas() if rule.admits(each)}
            replicas = [found] if found is not None and found in admitted else []
        if replicas:
            return replicas[next(self._reader_turns) % len(replicas)]
        return status.master if rule.fallback else None

    async def find_replicas(self) -> frozenset[str]:
        """Return the names of all living replicas.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no answer of before, or it is too old.
        """
        return frozenset(host.host for host in (await self._ask(self._cluster)).status.replicas())

    async def confirm_master(self, host: str) -> bool:
        """Have the sidecar ask the hosts anew, and return whether `host` is the master after that.

        Raises:
            SidecarError: the sidecar could not be asked.
            MasterUncertainError: the sidecar cannot find out whether the name still leads to the server of the master.
        """
        failure = self._confirmed.failure
        if failure is not None and failure.took_all_its_time and time.monotonic() - failure.at < self._max_age:
            # Nobody waits for a sidecar that is known to hang.
            raise SidecarError(failure.text)
        # One that is under way may have looked before the call.
        kept = await self._share_kept(self._confirmed, under_way=False)
        answer = kept.answer
        if answer.uncertain is not None:
            raise MasterUncertainError(answer.uncertain)
        self._master.kept, self._master.failure = _Kept(answer.host, kept.at, kept.doubts), None
        if answer.host is not None and answer.tells_server:
            self._servers[answer.host] = _Kept(answer.started_at, kept.at, kept.doubts)
        return answer.host == host

    def known_master(self) -> KnownMaster | None:
        """Return the master that the sidecar named last; ``None`` if that was more than `grace` seconds ago.

        ``None`` also without a master, and if a failure has been reported of that host since then.
        """
        kept = self._master.kept
        if kept is None or kept.answer is None or not time.monotonic() - kept.at < self._grace:
            return None
        if self._doubted_at.get(kept.answer, -math.inf) >= kept.at:
            return None
        cluster = None if self._cluster.kept is None else self._cluster.kept.answer.status
        timelines = {} if cluster is None else {each.host: each.timeline for each in cluster.hosts}
        is_of_this_master = cluster is not None and cluster.master == kept.answer
        return KnownMaster(kept.answer, timelines.get(kept.answer) if is_of_this_master else None)

    def server_of(self, host: str) -> datetime | None:
        """Return when the server was started that answers the sidecar by the name `host`; ``None`` if that is unknown.

        Out of memory. It is unknown as well while the sidecar cannot ask the host, and to pg-status.
        """
        asked = self._servers.get(host)
        kept = self._cluster.kept
        if asked is not None and (kept is None or asked.at > kept.at):
            return asked.answer
        hosts = () if kept is None else kept.answer.status.hosts
        return next((each.started_at for each in hosts if each.host == host and not each.possible_dead), None)

    async def ask_server_of(self, host: str) -> datetime | None:
        """Have the sidecar ask the host over a new connection, and return what `server_of` does after that."""
        path = f"/status?{urlencode({'host': host})}"
        question = _Question[str | None](path, _read_start)
        at = time.monotonic()
        try:
            start = await self._here().once(path, lambda: self._fetch(question, no_cache=True))
        except SidecarError:
            return None
        answer = None if start is None else datetime.fromisoformat(start)
        self._servers[host] = _Kept(answer, at, self._doubts)
        return answer

    async def promotion_of(self, host: str) -> Promotion | None:
        """Return what a host had replayed when it was promoted last; ``None`` if the sidecar has not seen that.

        Raises:
            SidecarError: the sidecar could not be asked.
        """
        cluster = await self._share(self._cluster, under_way=False)
        return next((each.promotion for each in cluster.status.hosts if each.host == host), None)

    def report_failure(self, host: str) -> None:
        """Let the next questions go to the sidecar, and have it ask the hosts anew. Does not wait."""
        self._doubts += 1
        self._doubted_at[host] = time.monotonic()

    async def _find_replayed(
        self, sync: SyncCondition | None, min_position: int, max_wait: float, rule: ReadRule | None = None
    ) -> str | None:
        known = self._cluster.kept
        if not (await self._ask(self._cluster) if known is None else known.answer).tells_timelines:
            # pg-status does not know of this parameter, and would name any replica.
            return await self._ask(self._master)
        parameters = {"min_lsn": format_lsn(min_position)}
        if rule is not None and rule.max_lag_ms is not None:
            parameters["lag_ms"] = str(rule.max_lag_ms)
        if rule is not None and rule.max_lag_bytes is not None:
            parameters["lag_bytes"] = str(rule.max_lag_bytes)
        if max_wait > 0:
            parameters["wait_ms"] = str(math.ceil(max_wait * 1000))
        path = f"{_PATHS[sync]}?{urlencode(parameters)}"
        # Nobody waits for a sidecar that is known to be away.
        if time.monotonic() - self._not_replayed_at >= self._max_age:
            question = _Question[str | None](path, _read_host, patience=max(max_wait, 0.0))
            try:
                return await self._here().once(path, lambda: self._fetch(question, no_cache=False))
            except SidecarError:
                self._not_replayed_at = time.monotonic()
        # The master has everything: the last one that was heard of.
        return await self._ask(self._master)

    async def _ask(self, question: _Question[_Answer]) -> _Answer:
        kept = question.kept
        now = time.monotonic()
        if kept is not None and kept.doubts == self._doubts and now - kept.at < self._max_age:
            return kept.answer
        usable = kept is not None and now - kept.at <= self._max_stale
        failure = question.failure
        if failure is None:
            sharing = self._share(question)
        elif failure.doubts == self._doubts and now - failure.at < self._max_age:
            # Not again at once: nobody waits for a sidecar that is known to be away.
            if kept is not None and usable:
                return kept.answer
            raise SidecarError(failure.text)
        elif kept is not None and usable:
            # It is tried again while the last good answer is given.
            self._flights(question).join(under_way=True)
            return kept.answer
        else:
            sharing = self._share(question)
        try:
            return await sharing
        except SidecarError:
            if kept is None or not usable:
                raise
            return kept.answer

    async def _share(self, question: _Question[_Answer], *, under_way: bool = True) -> _Answer:
        """Send a question, or wait for the answer to one that others have sent."""
        return (await self._share_kept(question, under_way=under_way)).answer

    async def _share_kept(self, question: _Question[_Answer], *, under_way: bool) -> _Kept[_Answer]:
        """Do as `_share` does, and return with the answer when it was asked for."""
        flights = self._flights(question)
        under_way = under_way and flights.doubts == self._doubts
        kept, failure = await _outcome(flights.join(under_way=under_way))
        if kept is None:
            raise SidecarError(failure)
        return kept

    def _flights(self, question: _Question[_Answer]) -> _Flights[_Answer]:
        return self._here().flights(question, lambda: self._doubts, lambda: self._send(question))

    async def _send(self, question: _Question[_Answer]) -> tuple[_Kept[_Answer] | None, str]:
        """Send a question and keep the answer, or the failure."""
        doubts = self._doubts
        no_cache = question.no_cache or (question.kept is not None and question.kept.doubts != doubts)
        at = time.monotonic()
        try:
            answer = await self._fetch(question, no_cache=no_cache)
        except SidecarError as exc:
            question.failure = _Failure(str(exc), time.monotonic(), doubts, isinstance(exc, _SidecarTimeoutError))
            return None, str(exc)
        kept = _Kept(answer, at, doubts)
        question.kept, question.failure = kept, None
        return kept, ""

    async def _fetch(self, question: _Question[_Answer], *, no_cache: bool) -> _Answer:
        headers = _HEADERS | {"cache-control": "no-cache"} if no_cache else _HEADERS
        limit = asyncio.timeout(self._timeout + question.patience)
        try:
            async with limit, self._here().http.stream("GET", question.path, headers=headers) as response:
                body = await _read_body(response)
        except TimeoutError:
            error = self._failed(question, f"no answer within {self._timeout + question.patience:g} s")
            raise _SidecarTimeoutError(str(error)) from None
        except httpx.HTTPError as exc:
            raise self._failed(question, f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__) from None
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE and not (body and _UNCERTAIN in body):
            raise self._failed(question, "it has not asked its hosts yet")
        if response.status_code not in _ANSWERS:
            raise self._failed(question, f"it answers with status {response.status_code}")
        if body is None:
            raise self._failed(question, f"its answer is compressed, or longer than {_LONGEST_ANSWER} bytes")
        try:
            answer = question.read(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._failed(question, f"what it answers (status {response.status_code}) is no answer") from None
        if self._failing:
            self._failing = False
            _logger.info("the sidecar answers again", extra={"sidecar": self._shown_url})
        return answer

    def _failed(self, question: _Question[Any], reason: str) -> SidecarError:
        path = question.path.partition("?")[0]
        error = SidecarError(
            f"The sidecar at {self._shown_url} could not be asked for {path}: {reason}. "
            "Start it, or correct its address."
        )
        if not self._failing:
            self._failing = True
            _logger.warning("%s", error, extra={"sidecar": self._shown_url})
        return error

    def _here(self) -> _OnLoop:
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            with self._lock:
                for other in [other for other in self._loops if other.is_closed()]:
                    del self._loops[other]
                here = self._loops[loop] = _OnLoop(self._url)
        return here


@dataclass(frozen=True, slots=True)
class _Kept(Generic[_Answer]):
    """An answer, when it was asked for, and how many failures had been reported by then."""

    answer: _Answer
    at: float
    doubts: int


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    at: float
    doubts: int
    took_all_its_time: bool


class _SidecarTimeoutError(SidecarError):
    """The sidecar accepts connections, perhaps, and does not answer."""


@dataclass(eq=False, slots=True)
class _Question(Generic[_Answer]):
    """Something that the sidecar is asked, and its last answer."""

    path: str
    read: Callable[[Any], _Answer]
    no_cache: bool = False
    patience: float = 0.0
    kept: _Kept[_Answer] | None = None
    failure: _Failure | None = None


_Outcome = tuple[_Kept[_Answer] | None, str]


class _Flights(Generic[_Answer]):
    """The requests for one answer on one event loop: at most one is under way, and one waits for it to end."""

    def __init__(self, doubts: Callable[[], int], send: Callable[[], Coroutine[Any, Any, _Outcome[_Answer]]]) -> None:
        self._current_doubts = doubts
        self._send = send
        self._running: asyncio.Task[_Outcome[_Answer]] | None = None
        self._waiting: asyncio.Task[_Outcome[_Answer]] | None = None
        self.doubts = doubts()
        """How many failures were reported when the one that is under way was sent."""

    def join(self, *, under_way: bool) -> asyncio.Task[_Outcome[_Answer]]:
        """Return the request whose answer to wait for.

        Args:
            under_way: whether one will do that has been sent before.
        """
        if self._waiting is not None and (not under_way or self._running is None or self._running.done()):
            return self._waiting
        if self._running is None or self._running.done():
            self.doubts = self._current_doubts()
            self._running = self._start(None)
            return self._running
        if under_way:
            return self._running
        self._waiting = self._start(self._running)
        return self._waiting

    def tasks(self) -> Sequence[asyncio.Task[_Outcome[_Answer]]]:
        """Return what has not ended."""
        return [task for task in (self._running, self._waiting) if task is not None and not task.done()]

    def _start(self, previous: asyncio.Task[_Outcome[_Answer]] | None) -> asyncio.Task[_Outcome[_Answer]]:
        # In a context of its own: it belongs to nobody's unit of work.
        return asyncio.create_task(self._run(previous), context=Context())

    async def _run(self, previous: asyncio.Task[_Outcome[_Answer]] | None) -> _Outcome[_Answer]:
        if previous is not None:
            await asyncio.wait([previous])
            self._running, self._waiting = self._waiting, None
        self.doubts = self._current_doubts()
        return await self._send()


class _OnLoop:
    """What belongs to one event loop: an HTTP client, and the requests that are under way."""

    def __init__(self, url: httpx.URL) -> None:
        # The sidecar is near: no proxy stands between. Reading certificates takes longer than all else here.
        secure = url.scheme == "https"
        self.http = httpx.AsyncClient(
            # httpx logs each URL as it is.
            base_url=url.copy_with(username=None, password=None),
            auth=httpx.BasicAuth(url.username, url.password) if url.userinfo else None,
            timeout=None,  # noqa: S113 - each request has a time limit as a whole
            trust_env=secure,
            verify=secure,
        )
        self._flights: dict[_Question[Any], _Flights[Any]] = {}
        self._once: dict[str, asyncio.Task[str | None]] = {}

    def flights(
        self,
        question: _Question[_Answer],
        doubts: Callable[[], int],
        send: Callable[[], Coroutine[Any, Any, _Outcome[_Answer]]],
    ) -> _Flights[_Answer]:
        flights = self._flights.get(question)
        if flights is None:
            flights = self._flights[question] = _Flights(doubts, send)
        return flights

    async def once(self, path: str, send: Callable[[], Coroutine[Any, Any, str | None]]) -> str | None:
        """Send what is not kept; share it with those who ask the same while it is under way."""
        task = self._once.get(path)
        if task is None:
            task = self._once[path] = asyncio.create_task(send(), context=Context())
            task.add_done_callback(lambda _: self._once.pop(path))
        return await _outcome(task)

    async def close(self) -> None:
        tasks: list[asyncio.Task[Any]] = [task for flights in self._flights.values() for task in flights.tasks()]
        tasks += self._once.values()
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            await self.http.aclose()


async def _read_body(response: httpx.Response) -> bytes | None:
    """Return the body of a response; ``None`` if it is more than an answer has, or may become more.

    What is compressed was not asked for, and may unfold to a thousand times its size.
    """
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        return None
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > _LONGEST_ANSWER:
            return None
    return bytes(body)


async def _outcome(task: asyncio.Task[_Answer]) -> _Answer:
    """Wait for a task that others wait for, too: who is cancelled leaves it to them."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        waiting = asyncio.current_task()
        if task.cancelled() and waiting is not None and not waiting.cancelling():
            raise SidecarError("The client was closed while its answer was waited for: close it last.") from None
        raise


@dataclass(frozen=True, slots=True)
class _Cluster:
    """All hosts, and the names of the replicas to choose from: of several the nearest ones."""

    status: ClusterStatus
    replicas: Mapping[SyncCondition | None, Sequence[str]]
    tells_timelines: bool


@dataclass(slots=True)
class _ClusterReader:
    """Reads the answer of ``/hosts``; of pg-status, too, which leaves out the roles and since when they are."""

    _before: dict[str, HostStatus] = field(default_factory=dict)

    def read(self, content: Any) -> _Cluster:
        now = datetime.now(UTC)
        hosts = tuple(self._read_host(entry, now) for entry in content)
        self._before = {host.host: host for host in hosts}
        master = next((str(entry["host"]) for entry in content if entry["master"] and entry["alive"]), None)
        status = ClusterStatus(hosts, master, now)
        distances = {str(entry["host"]): int(entry.get("distance", 0)) for entry in content}
        replicas = {sync: _nearest(status.replicas(sync), distances) for sync in _PATHS}
        # pg-status does not: by that it is told apart.
        return _Cluster(status, replicas, any("timeline" in entry for entry in content))

    def _read_host(self, entry: dict[str, Any], now: datetime) -> HostStatus:
        name, alive = _text(entry["host"]), bool(entry["alive"])
        role: Role | None = None
        if alive:
            # A host that merely says that it is the master is not one, and no replica either.
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
            # A dead host is one that may be dead, too, in what a sidecar tells.
            possible_dead=alive and bool(entry.get("possible_dead")),
            takes_reads=bool(entry.get("takes_reads", True)),
            # A newer sidecar may know more of them.
            fault=fault if fault in get_args(Fault) else None,
            system_identifier=_number(entry.get("system_identifier")),
            started_at=_time(entry.get("started_at")),
            promotion=_read_promotion(entry.get("promotion")),
        )


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


def _nearest(hosts: Sequence[HostStatus], distances: Mapping[str, int]) -> list[str]:
    best = min((distances[host.host] for host in hosts), default=0)
    return [host.host for host in hosts if distances[host.host] == best]


def _read_start(content: Any) -> str | None:
    start = None if content.get("possible_dead") else content.get("started_at")
    _time(start)
    return None if start is None else _text(start)


def _read_host(content: Any) -> str | None:
    host = content["host"]
    if host is not None and not isinstance(host, str):
        raise TypeError(host)
    return host or None


@dataclass(frozen=True, slots=True)
class _Confirmed:
    """The master that the sidecar has confirmed.

    Attributes:
        host: its name; ``None`` if there is none.
        started_at: when its server was started; ``None`` if that is unknown.
        tells_server: whether the sidecar knows of servers at all: pg-status does not.
        uncertain: why the sidecar cannot tell where the name of the master leads; ``None`` if it can.
    """

    host: str | None
    started_at: datetime | None = None
    tells_server: bool = False
    uncertain: str | None = None


def _read_confirmed(content: Any) -> _Confirmed:
    if content.get("uncertain"):
        return _Confirmed(None, uncertain=_text(content["error_text"]))
    return _Confirmed(_read_host(content), _time(content.get("started_at")), "started_at" in content)


def _base_url(text: str) -> httpx.URL:
    hint = "give the sidecar's address, as in 'http://127.0.0.1:8000'."
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        # Not shown, as it may hold a password.
        raise OptionError(f"`base_url` is no URL: {hint}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise OptionError(f"`base_url` has no scheme, or no host: {hint}")
    return url
