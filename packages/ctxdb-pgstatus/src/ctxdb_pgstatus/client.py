"""`PgStatusClient`: asks a running sidecar, and keeps its answers for a moment."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from datetime import datetime
from itertools import count
from threading import Lock
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

import httpx

from ctxdb_pgstatus._client.answers import (
    REPLICA_PATHS,
    Cluster,
    ClusterReader,
    Confirmed,
    read_confirmed,
    read_host,
    read_start,
)
from ctxdb_pgstatus._client.requests import (
    LONGEST_ANSWER,
    Failure,
    KeptAnswer,
    LoopRequests,
    Question,
    SharedRequests,
    SidecarTimeoutError,
    read_body,
    wait_for_shared,
)
from ctxdb_pgstatus._options import check_seconds, is_number
from ctxdb_pgstatus.errors import MasterUncertainError, OptionError, SidecarError
from ctxdb_pgstatus.lsn import format_lsn
from ctxdb_pgstatus.reading import ReadRule
from ctxdb_pgstatus.source import KnownMaster
from ctxdb_pgstatus.status import HostStatus, Promotion, SyncCondition

__all__ = ["PgStatusClient"]

_logger = logging.getLogger("ctxdb_pgstatus.client")

_HEADERS = {"accept": "application/json", "accept-encoding": "identity"}
_ANSWERS = (httpx.codes.OK, httpx.codes.NOT_FOUND, httpx.codes.SERVICE_UNAVAILABLE)
# In the answer of a sidecar that runs, and cannot tell whether the master's name still leads to the master's server.
_UNCERTAIN = b'"uncertain":true'

_Answer = TypeVar("_Answer")


class PgStatusClient:
    """Knows what a sidecar knows: `ctxdb-pgstatus` or pg-status. A source for `follow_master` and `follow_replica`.

    An answer is kept for `max_age`, and for longer while the sidecar cannot be asked. Callers that need the same answer
    at the same time share one request. A client may be used on several event loops, and has an HTTP client for each
    loop: close it, or use it as an async context manager, on each of them.

    pg-status cannot be told to ask its hosts anew: with it, `confirm_master` is as recent as its last poll.

    Args:
        base_url: the address of the sidecar, such as ``http://127.0.0.1:8000``.
        max_age: for how many seconds an answer is taken out of memory.
        timeout: for how many seconds an answer is waited for.
        max_stale: how many seconds an answer may be old if the sidecar cannot be asked; ``None`` for any age.
        grace: how many seconds after its last answer the sidecar may be away before commits count as unconfirmed. Until
            then the host on which a commit was made is asked, on the commit's own connection, whether it is still a
            primary. That does not show every promotion: a primary that was cut off from the cluster while the sidecar
            was away says that it is a primary, and takes writes that the cluster will not have. With 0, the host is
            never asked.

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
        check_seconds("max_age", max_age, or_zero=True)
        check_seconds("timeout", timeout)
        if max_stale is not None and not (is_number(max_stale) and max_stale >= max_age):
            raise OptionError(f"`max_stale` is {max_stale!r}: give seconds, at least those of `max_age`, or None.")
        check_seconds("grace", grace, or_zero=True)
        self._max_age = max_age
        self._grace = grace
        self._timeout = timeout
        self._max_stale = math.inf if max_stale is None else max_stale
        self._master = Question[str | None]("/master", read_host)
        self._cluster = Question[Cluster]("/hosts", ClusterReader().read)
        # The same endpoint as that of `_master`, but the sidecar asks its hosts before it answers.
        self._confirmed = Question[Confirmed]("/master", read_confirmed, no_cache=True)
        # How many failures of hosts were reported. An answer from before a report is not taken out of memory after it.
        self._reports = 0
        # When a failure of each host was reported last.
        self._reported_at: dict[str, float] = {}
        # When the sidecar last could not be asked for a replica that has replayed a position.
        self._position_failed_at = -math.inf
        self._turns = {condition: count() for condition in REPLICA_PATHS}
        self._reader_turns = count()
        # When the servers of hosts were started, as the sidecar told by other answers than that of `/hosts`.
        self._servers: dict[str, KeptAnswer[datetime | None]] = {}
        self._loops: dict[asyncio.AbstractEventLoop, LoopRequests] = {}
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
        """End the requests and close the connections of this event loop. A later question opens new connections."""
        with self._lock:
            requests = self._loops.pop(asyncio.get_running_loop(), None)
        if requests is not None:
            await requests.close()

    async def master(self) -> str | None:
        """Return the master's name; ``None`` if there is no master.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no earlier answer, or that is too old.
        """
        return await self._ask(self._master)

    async def replica(self) -> str | None:
        """Return a replica's name, each in its turn; the master's without a replica; ``None`` without a master.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no earlier answer, or that is too old.
        """
        return await self.find_replica()

    async def sync_by_time(self) -> str | None:
        """Return the name of a replica that is in sync by time, as `replica` does."""
        return await self.find_replica("time")

    async def sync_by_bytes(self) -> str | None:
        """Return the name of a replica that is in sync by bytes, as `replica` does."""
        return await self.find_replica("bytes")

    async def sync_by_time_or_bytes(self) -> str | None:
        """Return the name of a replica that is in sync by time or by bytes, as `replica` does."""
        return await self.find_replica("time_or_bytes")

    async def sync_by_time_and_bytes(self) -> str | None:
        """Return the name of a replica that is in sync both by time and by bytes, as `replica` does."""
        return await self.find_replica("time_and_bytes")

    async def hosts(self) -> tuple[HostStatus, ...]:
        """Return all hosts.

        pg-status does not tell `HostStatus.since`. With it, this is when the client first saw the host in its role.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no earlier answer, or that is too old.
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
            sync: by which lag the replica has to be in sync.
            min_position: a WAL position in bytes that the replica must have replayed. With a position, the sidecar is
                asked each time.
            max_wait: how long the sidecar may wait for a replica that has replayed `min_position`, in seconds.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no earlier answer, or that is too old.
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
        """Return the name of a replica that suits a rule, each in its turn; else the master's, if the rule allows that.

        Args:
            rule: which replicas will do.
            min_position: a WAL position in bytes that the replica must have replayed. With a position, the sidecar is
                asked each time.
            max_wait: how long the sidecar may wait for a replica that has replayed `min_position`, in seconds.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no earlier answer, or that is too old.
        """
        if min_position is not None:
            # The sidecar heeds the limits of the rule. If no replica will do, it names the master.
            found = await self._find_replayed(rule.sync, min_position, max_wait, rule)
            return found if rule.fallback or found in await self.find_replicas() else None
        status = (await self._ask(self._cluster)).status
        replicas = rule.best(status.replicas())
        if replicas:
            return replicas[next(self._reader_turns) % len(replicas)]
        return status.master if rule.fallback else None

    async def find_replicas(self) -> frozenset[str]:
        """Return the names of all living replicas.

        Raises:
            SidecarError: the sidecar could not be asked, and there is no earlier answer, or that is too old.
        """
        return frozenset(host.host for host in (await self._ask(self._cluster)).status.replicas())

    async def confirm_master(self, host: str) -> bool:
        """Have the sidecar ask the hosts anew, and return whether `host` is the master after that.

        Raises:
            SidecarError: the sidecar could not be asked.
            MasterUncertainError: the sidecar cannot find out whether the name still leads to the server of the master.
        """
        failure = self._confirmed.failure
        if failure is not None and failure.timed_out and time.monotonic() - failure.at < self._max_age:
            # The sidecar has just let another caller wait in vain: this one is told at once.
            raise SidecarError(failure.text)
        # The sidecar may have asked the hosts for a running request before this call.
        kept = await self._share_kept(self._confirmed, running=False)
        answer = kept.answer
        if answer.uncertain is not None:
            raise MasterUncertainError(answer.uncertain)
        self._master.kept, self._master.failure = KeptAnswer(answer.host, kept.at, kept.reports), None
        if answer.host is not None and answer.tells_server:
            self._servers[answer.host] = KeptAnswer(answer.started_at, kept.at, kept.reports)
        return answer.host == host

    def known_master(self) -> KnownMaster | None:
        """Return the master that the sidecar named last; ``None`` if that was more than `grace` seconds ago.

        ``None`` also if the sidecar named no master, or if a failure of that host was reported since then.
        """
        kept = self._master.kept
        if kept is None or kept.answer is None or not time.monotonic() - kept.at < self._grace:
            return None
        if self._reported_at.get(kept.answer, -math.inf) >= kept.at:
            return None
        cluster = None if self._cluster.kept is None else self._cluster.kept.answer.status
        timelines = {} if cluster is None else {each.host: each.timeline for each in cluster.hosts}
        is_of_this_master = cluster is not None and cluster.master == kept.answer
        return KnownMaster(kept.answer, timelines.get(kept.answer) if is_of_this_master else None)

    def server_of(self, host: str) -> datetime | None:
        """Return when the server was started that answers the sidecar by the name `host`; ``None`` if that is unknown.

        The answer comes out of memory. It is unknown while the sidecar cannot ask the host; pg-status never tells it.
        """
        asked = self._servers.get(host)
        kept = self._cluster.kept
        if asked is not None and (kept is None or asked.at > kept.at):
            return asked.answer
        hosts = () if kept is None else kept.answer.status.hosts
        return next((each.started_at for each in hosts if each.host == host and not each.possible_dead), None)

    async def ask_server_of(self, host: str) -> datetime | None:
        """Have the sidecar ask the host over a new connection; return what `server_of` does after that."""
        path = f"/status?{urlencode({'host': host})}"
        question = Question[str | None](path, read_start)
        at = time.monotonic()
        try:
            start = await self._on_this_loop().once(path, lambda: self._fetch(question, no_cache=True))
        except SidecarError:
            return None
        answer = None if start is None else datetime.fromisoformat(start)
        self._servers[host] = KeptAnswer(answer, at, self._reports)
        return answer

    async def promotion_of(self, host: str) -> Promotion | None:
        """Return how much a host had replayed when it was promoted last; ``None`` if the sidecar has not seen that.

        Raises:
            SidecarError: the sidecar could not be asked.
        """
        cluster = await self._share(self._cluster, running=False)
        return next((each.promotion for each in cluster.status.hosts if each.host == host), None)

    def report_failure(self, host: str) -> None:
        """Take no earlier answer out of memory any more, and have the sidecar ask the hosts anew. Does not wait."""
        self._reports += 1
        self._reported_at[host] = time.monotonic()

    async def _find_replayed(
        self, sync: SyncCondition | None, min_position: int, max_wait: float, rule: ReadRule | None = None
    ) -> str | None:
        known = self._cluster.kept
        if not (await self._ask(self._cluster) if known is None else known.answer).tells_timelines:
            # pg-status would ignore the parameter, and name any replica.
            return await self._ask(self._master)
        parameters = {"min_lsn": format_lsn(min_position)}
        if rule is not None and rule.max_lag_ms is not None:
            parameters["lag_ms"] = str(rule.max_lag_ms)
        if rule is not None and rule.max_lag_bytes is not None:
            parameters["lag_bytes"] = str(rule.max_lag_bytes)
        if max_wait > 0:
            parameters["wait_ms"] = str(math.ceil(max_wait * 1000))
        path = f"{REPLICA_PATHS[sync]}?{urlencode(parameters)}"
        # A sidecar that could not be asked a moment ago is not asked again yet.
        if time.monotonic() - self._position_failed_at >= self._max_age:
            question = Question[str | None](path, read_host, max_wait=max(max_wait, 0.0))
            try:
                return await self._on_this_loop().once(path, lambda: self._fetch(question, no_cache=False))
            except SidecarError:
                self._position_failed_at = time.monotonic()
        # The master that was named last: it has every position.
        return await self._ask(self._master)

    async def _ask(self, question: Question[_Answer]) -> _Answer:
        kept = question.kept
        now = time.monotonic()
        if kept is not None and kept.reports == self._reports and now - kept.at < self._max_age:
            return kept.answer
        usable = kept is not None and now - kept.at <= self._max_stale
        failure = question.failure
        if failure is None:
            sharing = self._share(question)
        elif failure.reports == self._reports and now - failure.at < self._max_age:
            # A sidecar that could not be asked a moment ago is not asked again yet.
            if kept is not None and usable:
                return kept.answer
            raise SidecarError(failure.text)
        elif kept is not None and usable:
            # The sidecar is asked again in the background: this caller gets the last answer at once.
            self._requests_for(question).join(running=True)
            return kept.answer
        else:
            sharing = self._share(question)
        try:
            return await sharing
        except SidecarError:
            if kept is None or not usable:
                raise
            return kept.answer

    async def _share(self, question: Question[_Answer], *, running: bool = True) -> _Answer:
        """Send a question, or wait for the answer to that of another caller (see `SharedRequests.join`)."""
        return (await self._share_kept(question, running=running)).answer

    async def _share_kept(self, question: Question[_Answer], *, running: bool) -> KeptAnswer[_Answer]:
        """Return what `_share` does, together with when that was asked for."""
        requests = self._requests_for(question)
        running = running and requests.reports == self._reports
        kept, failure = await wait_for_shared(requests.join(running=running))
        if kept is None:
            raise SidecarError(failure)
        return kept

    def _requests_for(self, question: Question[_Answer]) -> SharedRequests[_Answer]:
        return self._on_this_loop().shared(question, lambda: self._reports, lambda: self._send(question))

    async def _send(self, question: Question[_Answer]) -> tuple[KeptAnswer[_Answer] | None, str]:
        """Send a question, and keep the answer or the failure.

        A failure is returned as its message, and not raised: several callers may wait, and each of them raises an error
        of its own, with its own traceback.
        """
        reports = self._reports
        no_cache = question.no_cache or (question.kept is not None and question.kept.reports != reports)
        at = time.monotonic()
        try:
            answer = await self._fetch(question, no_cache=no_cache)
        except SidecarError as exc:
            question.failure = Failure(str(exc), time.monotonic(), reports, isinstance(exc, SidecarTimeoutError))
            return None, str(exc)
        kept = KeptAnswer(answer, at, reports)
        question.kept, question.failure = kept, None
        return kept, ""

    async def _fetch(self, question: Question[_Answer], *, no_cache: bool) -> _Answer:
        headers = _HEADERS | {"cache-control": "no-cache"} if no_cache else _HEADERS
        limit = asyncio.timeout(self._timeout + question.max_wait)
        try:
            async with limit, self._on_this_loop().http.stream("GET", question.path, headers=headers) as response:
                body = await read_body(response)
        except TimeoutError:
            error = self._failed(question, f"no answer within {self._timeout + question.max_wait:g} s")
            raise SidecarTimeoutError(str(error)) from None
        except httpx.HTTPError as exc:
            raise self._failed(question, f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__) from None
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE and not (body and _UNCERTAIN in body):
            raise self._failed(question, "it has not asked its hosts yet, or the master refuses it")
        if response.status_code not in _ANSWERS:
            raise self._failed(question, f"it answers with status {response.status_code}")
        if body is None:
            raise self._failed(question, f"its answer is compressed, or longer than {LONGEST_ANSWER} bytes")
        try:
            answer = question.read(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._failed(question, f"its answer (status {response.status_code}) is none of a sidecar's") from None
        if self._failing:
            self._failing = False
            _logger.info("the sidecar answers again", extra={"sidecar": self._shown_url})
        return answer

    def _failed(self, question: Question[Any], reason: str) -> SidecarError:
        path = question.path.partition("?")[0]
        error = SidecarError(
            f"The sidecar at {self._shown_url} could not be asked for {path}: {reason}. "
            "Start it, or correct its address."
        )
        if not self._failing:
            self._failing = True
            _logger.warning("%s", error, extra={"sidecar": self._shown_url})
        return error

    def _on_this_loop(self) -> LoopRequests:
        loop = asyncio.get_running_loop()
        requests = self._loops.get(loop)
        if requests is None:
            with self._lock:
                for other in [other for other in self._loops if other.is_closed()]:
                    del self._loops[other]
                requests = self._loops[loop] = LoopRequests(self._url)
        return requests


def _base_url(text: str) -> httpx.URL:
    hint = "give the sidecar's address, as in 'http://127.0.0.1:8000'."
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        # The text is not shown, as it may hold a password.
        raise OptionError(f"`base_url` is no URL: {hint}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise OptionError(f"`base_url` has no scheme, or no host: {hint}")
    return url
