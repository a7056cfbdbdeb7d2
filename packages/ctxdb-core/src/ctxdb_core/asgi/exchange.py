"""`Exchange`: a request and its response as one unit of work, in one phase at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from contextvars import Context
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

from ctxdb_core._units.ids import process, unit_id_givers, unit_numbers
from ctxdb_core._units.request_unit import RequestUnit
from ctxdb_core._units.session_end import report
from ctxdb_core._units.settings import UnitSettings
from ctxdb_core._units.watcher import UnitWatcher, report_failure
from ctxdb_core.asgi.response import ANSWERED, Refusal, Response, ResponseStart, check_headers
from ctxdb_core.asgi.types import Message, Receive, Scope, Send
from ctxdb_core.phases import FINISHING, Phase, check_transition
from ctxdb_core.policy import RequestPolicy

__all__ = ["CONTEXT_KEY", "Exchange", "ExchangeSettings"]

CONTEXT_KEY = "ctxdb.context"
"""Where the scope of a request has the context variables of its beginning, if a stream boundary may be beneath."""

_SWITCHING_PROTOCOLS = 101

_SILENT = (Phase.REFUSED, Phase.BROKEN)

# Bound once: to look up a member of an enumeration takes as long as several calls (Python 3.11).
_BODY, _AFTER = Phase.BODY, Phase.AFTER


class Options(Protocol):
    """What a middleware says of all its exchanges."""

    commits: RequestPolicy
    """Given the status of a response, and the ASGI scope of its request: whether to commit."""
    has_boundary: bool
    """Whether an `ASGIStreamBoundary` may be beneath, which tells of handlers that a middleware gives up on."""


@dataclass(frozen=True, slots=True)
class ExchangeSettings(UnitSettings):
    """The settings of the exchanges of one middleware."""

    _: KW_ONLY
    middleware: Options


class Exchange(RequestUnit):
    """The unit of work of one request, and the `send` that its application is given.

    What the application sends moves the exchange from phase to phase (`ctxdb_core.phases`): each transition ends the
    transactions that it has to, before the message is forwarded to the server. If they cannot be ended, the response is
    refused. Another response can be sent for the error then, once.
    """

    settings: ExchangeSettings
    origin: Scope
    """The scope of the request, as the application has left it."""
    phase: Phase
    """The phase that the request is in."""
    response: Response | None
    """What is known of the response; ``None`` while the unit is idle.

    An idle unit has never had a session, a callback, a watcher or a strategy: there is nothing to end at any time.
    """
    server: Send
    """The `send` of the server."""

    @property
    def context(self) -> Context | None:
        found: Context | None = self.origin.get(CONTEXT_KEY)
        return found

    def follow_response(self) -> Response:
        """Follow the response from now on, as there is something to end; return what is known of it."""
        if self.response is None:
            self.response = Response()
        return self.response

    def move_to(self, phase: Phase) -> None:
        """Go over to `phase`; nothing happens if that is the current one.

        Raises:
            IllegalTransitionError: it cannot follow the current one.
        """
        if phase is not self.phase:
            check_transition(self.phase, phase)
            self.phase = phase

    def send(self, message: Message) -> Awaitable[None]:
        """Forward a message of the application, after what has to happen before it."""
        raise NotImplementedError

    def request_again(self, receive: Receive) -> Receive:
        """Return where a handler of errors receives the request from, if the application was given `receive`."""
        return receive

    def identify(self) -> tuple[str, str | None]:
        scope, registration = self.origin, self.registration
        if registration is None or registration.id is not None or unit_id_givers or "method" not in scope:
            return super().identify()
        # The common case, without calls.
        registration.id = unit_id = f"{process.name}-{next(unit_numbers)}"
        return unit_id, f"{scope['method']} {scope['path']}"

    async def send_behind(self, start: ResponseStart, message: Message) -> None:
        """Send a message of another task once the response has started."""
        await start.wait()
        await self.send(message)

    def announce(self, message: Message, watchers: Mapping[object, UnitWatcher]) -> Message:
        """Tell the watchers of the start of a response; return it with the header fields that they add.

        They are told of none that is not let through: of two starts at once, the other one may have been refused.
        """
        if self.phase in _SILENT:
            return message
        status = message.get("status", _SWITCHING_PROTOCOLS)
        headers = message.get("headers", ())
        for watcher in watchers.values():
            try:
                headers = [*headers, *watcher.response_starts(status)]
            except (Exception, asyncio.CancelledError):  # noqa: BLE001 - it is logged, and changes nothing
                report_failure(watcher)
        # The application may send its own message again.
        message = {**message}
        message["headers"] = headers
        return message

    def forward(self, message: Message) -> Awaitable[None]:
        """Send a message of the application to the server, or drop it in a phase in which nothing is let through."""
        return _discard(message) if self.phase in _SILENT else self.server(message)

    async def send_last(self, message: Message) -> None:
        """Forward the last part of a body, once all that the body has done is committed.

        If the commit fails, the client sees the response break off.

        Raises:
            Exception: the error of the commit.
        """
        try:
            await self.commit_body()
        except Exception:
            self.move_to(Phase.BROKEN)
            raise
        self.note_body_is_sent()
        await self.forward(message)

    async def commit_body(self) -> None:
        """Commit what the body has done.

        Raises:
            Exception: as `commit`.
        """
        await self.commit(ends_body=True)

    def note_body_is_sent(self) -> None:
        """Note that the last part of the body is let through: what comes now is background work."""
        if self.phase is _BODY:
            self.move_to(_AFTER)

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

    # --- a response whose transactions could not be ended -------------------------------------------------------------

    def refuse(self, error: Exception, *, can_be_answered: bool = True) -> None:
        """Forward nothing more of the response, as `error` has kept its transactions from being ended.

        Args:
            error: why they could not be ended.
            can_be_answered: whether another response can be sent for `error`. There is one such answer at the most.
        """
        self.move_to(Phase.REFUSED)
        response = self.follow_response()
        response.refusal = Refusal(error, can_be_answered and response.refusal is None)

    @property
    def refusal(self) -> Refusal | None:
        """What has kept the application's response from being sent; ``None`` if nothing has."""
        return None if self.response is None else self.response.refusal

    @property
    def failure(self) -> Exception | None:
        """Why the response was refused, in the phase `REFUSED`; ``None`` in any other."""
        refusal = self.refusal
        return None if refusal is None else refusal.error

    async def settle(self, start: Message) -> None:
        """End the transactions as a response with this `start` demands it.

        Raises:
            Exception: why they could not be ended. Everything was rolled back then, and the response is refused.
        """
        try:
            if self.settings.middleware.commits(start["status"], self.origin):
                check_headers(start)
                await self.commit()
            else:
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
        refusal = self.refusal
        return refusal.error if refusal is not None and refusal.can_be_answered else None

    def begin_answer(self, raised: Exception | None = None) -> None:
        """Begin the response for `error_to_answer`: from now on, what is sent is that response."""
        error = self.error_to_answer
        assert error is not None
        if raised is not None:
            _attach(raised, error)
        self.move_to(Phase.HANDLING)
        self.follow_response().refusal = ANSWERED

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


async def _discard(message: Message) -> None:
    """Drop a message of a response that is not sent any more."""


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
