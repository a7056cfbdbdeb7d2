"""`Exchange`: a request and its response as one unit of work, in one phase at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextvars import ContextVar, Token
from typing import Any, Protocol

from ctxdb_core._sqlalchemy.doors import wait_for_calls
from ctxdb_core._units.session_end import report
from ctxdb_core._units.unit import UnitOfWork
from ctxdb_core._units.watcher import tell
from ctxdb_core.asgi.types import Message, Receive, Scope, Send
from ctxdb_core.phases import FINISHING, Phase, check_transition
from ctxdb_core.policy import RequestPolicy

__all__ = ["Exchange", "Options", "discard", "enter_start", "is_in_start_of", "leave_start"]

_SWITCHING_PROTOCOLS = 101

_starting: ContextVar[object] = ContextVar("ctxdb_starting", default=None)
"""The exchange whose response the running code is starting; what the commit calls back inherits it."""


class Options(Protocol):
    """What a middleware says of all its exchanges."""

    commits: RequestPolicy
    """Given the status of a response, and the ASGI scope of its request: whether to commit."""
    has_boundary: bool
    """Whether an `ASGIStreamBoundary` may be beneath, which tells of handlers that a middleware gives up on."""


class Exchange(UnitOfWork):
    """The unit of work of one request, and the `send` that its application is given.

    What the application sends moves the exchange from phase to phase (`ctxdb_core.phases`): each transition ends the
    transactions that it has to, before the message is forwarded to the server.

    An exchange is made by `ASGIHTTPDBSessionMiddleware`, without a call of ``__init__``: that would be a quarter of
    what a request without database use pays.
    """

    options: Options
    scope: Scope
    """The request's, as the application has left it."""
    phase: Phase = Phase.HANDLING
    """Where the response is on its way."""
    is_idle: bool
    """Whether the unit has never had a session, a callback or a strategy: then there is nothing to end at any time."""
    forward: Send
    """Where the messages of the application go to: the server, or `discard`."""
    answer_route: Send | None
    """Where the response for an error goes to, if the application's own is refused.

    It is used up by the one answer that there may be, and by whatever makes an answer impossible.
    """
    is_starting: bool = False
    """Whether the transactions are being ended for a response that is about to start."""
    started: asyncio.Event | None = None
    """Set when that response has started, or was refused; ``None`` as long as nobody waits for it."""
    failure: Exception | None = None
    """Why the response was refused, in the phase `REFUSED`; ``None`` in any other."""

    def send(self, message: Message) -> Awaitable[None]:
        """Forward a message of the application, after what has to happen before it."""
        raise NotImplementedError

    def request_again(self, receive: Receive) -> Receive:
        """Return where a handler of errors receives the request from, if the application was given `receive`."""
        return receive

    # Another task may send while the transactions are being ended, as that takes its time. Litestar's
    # `websocket_stream` accepts in one task and sends in another; sse-starlette pings its client in a task of its own.

    def begin_start(self) -> Token[Any]:
        """Keep what other tasks send waiting until `end_start`; but not what the end of the transactions waits for."""
        self.is_starting = True
        return enter_start(self)

    def end_start(self) -> None:
        """Let those send who wait for the start of the response."""
        self.is_starting = False
        started, self.started = self.started, None
        if started is not None:
            started.set()

    def must_wait_for_start(self) -> bool:
        """Return whether the running code has to wait until the response has started that is about to."""
        return self.is_starting and not is_in_start_of(self)

    async def send_behind_start(self, message: Message) -> None:
        """Send a message of another task once the response has started."""
        if self.started is None:
            self.started = asyncio.Event()
        await self.started.wait()
        await self.send(message)

    def announce(self, message: Message) -> Message:
        """Tell the watchers of the start of a response; return it with the header fields that they add."""
        status = message.get("status", _SWITCHING_PROTOCOLS)
        for watcher in self.watchers:
            added = tell(watcher.response_starts, status)
            if added:
                message = {**message, "headers": [*message.get("headers", ()), *added]}
        return message

    def move_to(self, phase: Phase) -> None:
        """Go over to `phase`; nothing happens if that is the current one.

        Raises:
            IllegalTransitionError: it cannot follow the current one.
        """
        if phase is not self.phase:
            check_transition(self.phase, phase)
            self.phase = phase

    def refuse(self, error: Exception) -> None:
        """Forward nothing more of the response, as `error` has kept its transactions from being ended."""
        self.move_to(Phase.REFUSED)
        self.failure = error
        self.forward = discard

    async def settle(self, status: int) -> None:
        """End the transactions as a response with `status` demands it.

        Raises:
            Exception: why they could not be ended. Everything was rolled back then, and the response is refused.
        """
        try:
            if self.options.commits(status, self.scope):
                await self.commit()
            else:
                # A body that is made already may be using a session: its statement must not be interrupted.
                await wait_for_calls(self.sessions.values())
                await self.roll_back()
        except Exception as exc:
            # Two responses at once, of a middleware and of the handler beneath it, may have been about to start. If
            # the other one has started meanwhile, it is not touched by this error.
            if self.phase in (Phase.HANDLING, Phase.AHEAD):
                self.refuse(exc)
            await self.roll_back(exc)
            raise

    @property
    def error_to_answer(self) -> Exception | None:
        """Why the response was refused, if another one can be sent for that error."""
        return None if self.answer_route is None else self.failure

    def begin_answer(self, raised: Exception | None = None) -> None:
        """Begin the response for `error_to_answer`: from now on, what is sent is that response.

        Args:
            raised: what the application has raised since the error.
        """
        assert self.answer_route is not None
        assert self.failure is not None
        if raised is not None:
            _attach(raised, self.failure)
        self.move_to(Phase.HANDLING)
        self.failure = None
        self.forward, self.answer_route = self.answer_route, None

    async def fail(self, exc: BaseException) -> bool:
        """Roll back for what the application has raised, and return whether that is the error to raise.

        It is not if a response was refused: then that response's error surfaces, and not what the application has made
        of it. But a cancellation and the like surface in any case.
        """
        failure = self.failure
        if failure is not None and isinstance(exc, Exception):
            _attach(exc, failure)
            return False
        if failure is not None:
            report(failure, exc, "nothing was committed, as that had failed")
        await self.finish(commit=False, error=exc)
        return True

    async def conclude(self) -> None:
        """End the unit, now that the application has returned.

        Raises:
            Exception: why the response was refused, if no other one was sent for that; or the error of a commit.
        """
        if self.failure is not None:
            await self.finish(commit=False, error=self.failure)
            raise self.failure
        if not self.finish_idle():
            await self.finish(commit=self.phase in FINISHING and not self.is_cut_off)

    @property
    def is_cut_off(self) -> bool:
        """Whether the application has returned in the middle of what it was doing, although it has raised nothing."""
        return False


async def _discard(message: Message) -> None:
    """Drop a message of a response that is not sent any more."""


discard: Send = _discard


def _attach(exc: Exception, failure: Exception) -> None:
    """Attach what the application has raised to the `failure` that surfaces, unless it has just passed that on."""
    if not _is_caused_by(exc, failure):
        report(exc, failure, "the application failed on top of it")


def _is_caused_by(exc: BaseException | None, cause: BaseException) -> bool:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        if exc is cause:
            return True
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__
    return False


def enter_start(exchange: Exchange) -> Token[Any]:
    """Have what the running code does until `leave_start` be part of the start of a response."""
    return _starting.set(exchange)


def leave_start(token: Token[Any]) -> None:
    """Have what the running code does from now on be no part of the start that `token` was returned for."""
    _starting.reset(token)


def is_in_start_of(exchange: Exchange) -> bool:
    """Return whether the running code ends transactions for the start of a response, or is called back for that."""
    return _starting.get() is exchange
