"""What becomes of a response whose transactions could not be ended: it is refused, and its error can be answered.

`AnswerableUnit` is the part of an exchange that decides it. The functions are for adapters of frameworks whose
exception handlers answer further in than the middleware.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ctxdb_core._units.lifecycle import REQUEST_KEY
from ctxdb_core._units.request_unit import RequestUnit
from ctxdb_core._units.session_end import report
from ctxdb_core.asgi.exchange_settings import ExchangeSettings
from ctxdb_core.asgi.response import ANSWERED, Refusal, Response
from ctxdb_core.asgi.types import Message, Scope
from ctxdb_core.errors import ArgumentValueError
from ctxdb_core.phases import Phase, check_transition

__all__ = [
    "AnswerableUnit",
    "answer_commit_error",
    "commit_error",
    "has_unit_of_work",
]


class AnswerableUnit(RequestUnit):
    """The unit of work of a request whose response is refused if its transactions cannot be ended.

    Another response can be sent for the error then, once.
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
                _check_headers(start.get("headers", ()))
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
        """Begin the response for `error_to_answer`: from now on, what is sent is that response.

        Args:
            raised: what the application has raised since the error.
        """
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


def _check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise an error if a server would refuse to send `headers`: behind a commit, that would be too late.

    Raises:
        ArgumentValueError: a value has a control character (RFC 9110, "Field Values").
    """
    # Anything else than a list may be there to be read once.
    if type(headers) is list:
        for name, value in headers:
            if _find_control_character(value):
                raise ArgumentValueError(
                    f"The value of the response header {name!r} has a control character, such as a line break: no "
                    "server sends it. What the request has written is rolled back. Encode the value."
                )


_find_control_character = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search


def has_unit_of_work(scope: Scope) -> bool:
    """Return whether the request has come through an `ASGIHTTPDBSessionMiddleware` that has not ended its unit of work.

    For middlewares that have to be outside of it.
    """
    return REQUEST_KEY in scope


def commit_error(scope: Scope) -> Exception | None:
    """Return the error that kept the response to a request from being sent, if another response can be sent for it.

    For frameworks whose exception handlers are called only for what is raised further in than the middleware. There,
    once the application has returned or raised, an adapter asks for the error, calls `answer_commit_error`, and raises
    it anew.

    Args:
        scope: the request's ASGI scope.
    """
    exchange = scope.get(REQUEST_KEY)
    # Units of other adapters know no failure.
    return exchange.error_to_answer if isinstance(exchange, AnswerableUnit) else None


def answer_commit_error(scope: Scope, raised: Exception | None = None) -> None:
    """Let one more response be sent, for the error that `commit_error` has returned.

    Args:
        scope: the request's ASGI scope.
        raised: what the application has raised meanwhile; if that has another cause, it is attached to the error.
    """
    scope[REQUEST_KEY].begin_answer(raised)


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
