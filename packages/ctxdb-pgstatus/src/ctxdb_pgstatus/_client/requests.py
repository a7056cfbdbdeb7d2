"""Requests to a sidecar: sent once for all callers that need the same answer at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from ctxdb_pgstatus.errors import SidecarError

__all__ = [
    "LONGEST_ANSWER",
    "Failure",
    "KeptAnswer",
    "LoopRequests",
    "Question",
    "SharedRequests",
    "SidecarTimeoutError",
    "read_body",
    "wait_for_shared",
]

_Answer = TypeVar("_Answer")

LONGEST_ANSWER = 1 << 20
"""How many bytes of an answer are read. There is room for two thousand hosts, of 400 bytes each."""


class SidecarTimeoutError(SidecarError):
    """The sidecar has not answered in time: it may be stopped, and accept connections all the same."""


@dataclass(frozen=True, slots=True)
class KeptAnswer(Generic[_Answer]):
    """An answer that is kept.

    Attributes:
        answer: the answer.
        at: when its request was sent, by ``time.monotonic()``.
        reports: how many failures of hosts had been reported by then.
    """

    answer: _Answer
    at: float
    reports: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that has failed.

    Attributes:
        text: the message of the error.
        at: when it failed, by ``time.monotonic()``.
        reports: how many failures of hosts had been reported when the request was sent.
        timed_out: whether the sidecar has not answered in time, while other failures are noticed at once.
    """

    text: str
    at: float
    reports: int
    timed_out: bool


@dataclass(eq=False, slots=True)
class Question(Generic[_Answer]):
    """A question to the sidecar, and its last answer.

    Attributes:
        path: the endpoint, with its query.
        read: reads the answer out of the JSON document.
        no_cache: whether the sidecar is to ask the hosts anew.
        max_wait: how many seconds the sidecar may wait before it answers, in addition to the client's own limit.
        kept: the last answer.
        failure: the last failure, if no answer has come since.
    """

    path: str
    read: Callable[[Any], _Answer]
    no_cache: bool = False
    max_wait: float = 0.0
    kept: KeptAnswer[_Answer] | None = None
    failure: Failure | None = None


_Outcome = tuple[KeptAnswer[_Answer] | None, str]
"""An answer; or ``None`` and the message of the error."""


class SharedRequests(Generic[_Answer]):
    """The requests of one question on one event loop: at most one is running, and one waits for that to end.

    A caller who needs an answer that was asked for after its call cannot share the running request, whose answer may
    show what was so before. All such callers share the waiting request.

    Args:
        count_reports: returns how many failures of hosts have been reported.
        send: sends a request.
    """

    def __init__(
        self, count_reports: Callable[[], int], send: Callable[[], Coroutine[Any, Any, _Outcome[_Answer]]]
    ) -> None:
        self._count_reports = count_reports
        self._send = send
        self._running: asyncio.Task[_Outcome[_Answer]] | None = None
        self._waiting: asyncio.Task[_Outcome[_Answer]] | None = None
        self.reports = count_reports()
        """How many failures had been reported when the running request was sent."""

    def join(self, *, running: bool) -> asyncio.Task[_Outcome[_Answer]]:
        """Return the request whose answer to wait for.

        Args:
            running: whether the answer to a request will do that was sent before this call.
        """
        if self._waiting is not None and (not running or self._running is None or self._running.done()):
            return self._waiting
        if self._running is None or self._running.done():
            self.reports = self._count_reports()
            self._running = self._start(None)
            return self._running
        if running:
            return self._running
        self._waiting = self._start(self._running)
        return self._waiting

    def tasks(self) -> Sequence[asyncio.Task[_Outcome[_Answer]]]:
        """Return the tasks of the requests that have not ended."""
        return [task for task in (self._running, self._waiting) if task is not None and not task.done()]

    def _start(self, previous: asyncio.Task[_Outcome[_Answer]] | None) -> asyncio.Task[_Outcome[_Answer]]:
        # The task has an empty context: it serves callers of several units of work, and must keep none of them alive.
        return asyncio.create_task(self._run(previous), context=Context())

    async def _run(self, previous: asyncio.Task[_Outcome[_Answer]] | None) -> _Outcome[_Answer]:
        if previous is not None:
            await asyncio.wait([previous])
            self._running, self._waiting = self._waiting, None
        self.reports = self._count_reports()
        return await self._send()


class LoopRequests:
    """An HTTP client for one event loop, and the requests that are under way on that loop.

    Args:
        url: the address of the sidecar.
    """

    def __init__(self, url: httpx.URL) -> None:
        # The sidecar runs on the same machine or near it, so proxies of the environment are not used for HTTP. Reading
        # the certificates for HTTPS would take longer than all else here: so only where they are needed.
        secure = url.scheme == "https"
        self.http = httpx.AsyncClient(
            # httpx logs each URL, with the password if there is one in it.
            base_url=url.copy_with(username=None, password=None),
            auth=httpx.BasicAuth(url.username, url.password) if url.userinfo else None,
            timeout=None,  # noqa: S113 - each request has a time limit as a whole
            trust_env=secure,
            verify=secure,
        )
        self._shared: dict[Question[Any], SharedRequests[Any]] = {}
        self._once: dict[str, asyncio.Task[str | None]] = {}

    def shared(
        self,
        question: Question[_Answer],
        count_reports: Callable[[], int],
        send: Callable[[], Coroutine[Any, Any, _Outcome[_Answer]]],
    ) -> SharedRequests[_Answer]:
        """Return the requests of a question, which are made with the other arguments if there are none yet."""
        requests = self._shared.get(question)
        if requests is None:
            requests = self._shared[question] = SharedRequests(count_reports, send)
        return requests

    async def once(self, path: str, send: Callable[[], Coroutine[Any, Any, str | None]]) -> str | None:
        """Send a request whose answer is not kept, or wait for the same request of another caller."""
        task = self._once.get(path)
        if task is None:
            task = self._once[path] = asyncio.create_task(send(), context=Context())

            def forget(done: asyncio.Task[str | None]) -> None:
                del self._once[path]
                # If no caller waits any more, asyncio must not warn of an exception that was not read.
                _ = done.cancelled() or done.exception()

            task.add_done_callback(forget)
        return await wait_for_shared(task)

    async def close(self) -> None:
        """Cancel the requests, and close the connections."""
        tasks: list[asyncio.Task[Any]] = [task for requests in self._shared.values() for task in requests.tasks()]
        tasks += self._once.values()
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            await self.http.aclose()


async def read_body(response: httpx.Response) -> bytes | None:
    """Return the body of a response; ``None`` if it has more bytes than `LONGEST_ANSWER`, or is compressed.

    The client asks for no compression: a compressed body may unfold to a thousand times its size.
    """
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        return None
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > LONGEST_ANSWER:
            return None
    return bytes(body)


async def wait_for_shared(task: asyncio.Task[_Answer]) -> _Answer:
    """Wait for a task for which other callers wait, too. A caller that is cancelled leaves the task to the others.

    Raises:
        SidecarError: the task was cancelled, as the client was closed.
    """
    # Not `asyncio.shield`: from Python 3.14 on, that logs an error of a task which its caller has given up.
    await asyncio.wait([task])
    if task.cancelled():
        raise SidecarError("The PgStatusClient was closed while an answer was waited for: close it after its last use.")
    return task.result()
