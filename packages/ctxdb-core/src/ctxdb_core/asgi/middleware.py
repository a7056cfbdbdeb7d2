"""The unit of work of an ASGI request: a middleware for any ASGI application, which imports no framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.lifecycle import REQUEST_KEY, outer_unit
from ctxdb_core._units.unit import UnitOfWork, current_unit
from ctxdb_core.asgi.exchange import Exchange, HTTPExchange, WebSocketExchange
from ctxdb_core.asgi.types import ASGIApp, Receive, Scope, Send
from ctxdb_core.policy import CommitPolicy, commit_below_400

__all__ = ["ASGIHTTPDBSessionMiddleware", "Deadline", "answer_commit_error", "commit_error", "has_unit_of_work"]

Deadline: TypeAlias = Callable[[Scope], float | None]
"""Given the ASGI scope of a request: when its last statement has to be done, on the event loop's clock."""

# Bound once: looking a method up at each request is felt where the request uses no database.
_get_current_unit, _set_current_unit, _reset_current_unit = current_unit.get, current_unit.set, current_unit.reset


class ASGIHTTPDBSessionMiddleware:
    """Gives each request of an ASGI application a unit of work.

    It is committed or rolled back when the response starts, before the first byte leaves (ASGI, "Response Start"); what
    is done in it afterwards, by a streamed body or a background task, is committed when the application returns. A
    websocket connection has one unit of work, ended before its close frame.

    A request that comes through this middleware twice is ended by the outer one.

    Args:
        app: the ASGI application.
        before_commit: awaited with each session that is about to be committed.
        commit_policy: given the status of the response: whether to commit.
        statement_timeout: how many seconds each statement of a request may take; see `set_statement_timeout`.
        deadline: given the ASGI scope of a request: when its last statement has to be done, on the event loop's clock;
            ``None`` for no deadline. Streamed bodies and background tasks are part of the request.
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommit | None = None,
        commit_policy: CommitPolicy = commit_below_400,
        *,
        statement_timeout: float | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self.app = app
        if statement_timeout is not None or deadline is not None:
            self.app = _LimitingStatements(app, statement_timeout, deadline)
        self.before_commit = before_commit
        self.commit_policy = commit_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application in a unit of work; scopes other than ``http`` and ``websocket`` are passed on."""
        exchange: Exchange
        if scope["type"] == "http":
            exchange = http_exchange = HTTPExchange(self.before_commit, self.commit_policy, send)
            http_exchange.source, receive = receive, http_exchange.receive
        elif scope["type"] == "websocket":
            exchange = WebSocketExchange(self.before_commit, self.commit_policy, send)
        else:
            # A lifespan, for instance: it lasts longer than any unit of work that its server was started in.
            inherited = _get_current_unit(None)
            if inherited is None or inherited.shared:
                await self.app(scope, receive, send)
                return
            token = _set_current_unit(UnitOfWork.ended())
            try:
                await self.app(scope, receive, send)
            finally:
                _reset_current_unit(token)
            return
        # Most requests find nothing at all: these two look-ups spare them the closer look.
        if (REQUEST_KEY in scope or _get_current_unit(None) is not None) and outer_unit(scope) is not None:
            await self.app(scope, receive, send)
            return
        root_app = scope.get("app")
        scope[REQUEST_KEY] = exchange
        token = _set_current_unit(exchange)
        try:
            try:
                await self.app(scope, receive, exchange.send)
            except BaseException as exc:
                if await exchange.app_raised(exc):
                    raise
            if exchange.failure is not None:
                await self._answer_failure(exchange, scope, receive, send, root_app)
            elif not exchange.finish_idle():
                # Where no response was begun, there is no success that would have to be true.
                await exchange.finish(commit=exchange.responded and not exchange.is_cut_off)
        finally:
            _reset_current_unit(token)
            # The server's `send` may know the scope: left in it, the exchange would be in a reference cycle.
            scope.pop(REQUEST_KEY, None)

    async def answer_error(
        self, error: Exception, scope: Scope, receive: Receive, send: Send, root_app: Any | None
    ) -> None:
        """Send the response for an `error` that kept the application's response from being sent.

        By default it is raised: the server answers 500. A subclass for a framework asks the exception handlers of the
        application.

        Args:
            error: why nothing could be committed.
            scope: the request's ASGI scope, as the application has left it.
            receive: the request's channel, from the beginning of its body.
            send: where the response goes to.
            root_app: the ``scope["app"]`` that this middleware was called with.
        """
        raise error

    async def _answer_failure(
        self, exchange: Exchange, scope: Scope, receive: Receive, send: Send, root_app: Any | None
    ) -> None:
        error = exchange.failure
        assert error is not None
        if not exchange.can_answer:
            await exchange.finish(commit=False, error=error)
            raise error
        exchange.start_over(send)
        try:
            await self.answer_error(error, scope, exchange.receive_again or receive, exchange.send, root_app)
        except BaseException as exc:
            if await exchange.app_raised(exc):
                raise
        if exchange.failure is not None:
            # The error's response could not be committed either: there is no third attempt.
            await exchange.finish(commit=False, error=exchange.failure)
            raise exchange.failure
        if not exchange.finish_idle():
            await exchange.finish(commit=exchange.responded and not exchange.is_cut_off)


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
    return exchange.failure if isinstance(exchange, Exchange) and exchange.can_answer else None


def answer_commit_error(scope: Scope, raised: Exception | None = None) -> None:
    """Let one more response be sent, for the error that `commit_error` has returned.

    Args:
        scope: the request's ASGI scope.
        raised: what the application has raised meanwhile; if that has another cause, it is attached to the error.
    """
    scope[REQUEST_KEY].answer_failure(raised)


class _LimitingStatements:
    """Limits the statements of each request. An application of its own: requests without a limit do not pay for it."""

    def __init__(self, app: ASGIApp, seconds: float | None, deadline: Deadline | None) -> None:
        self.app = app
        self._limit = StatementTimeout(seconds)
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope.get(REQUEST_KEY)
        if isinstance(exchange, Exchange):
            deadline = None if self._deadline is None else self._deadline(scope)
            exchange.statement_timeout = self._limit if deadline is None else replace(self._limit, deadline=deadline)
        await self.app(scope, receive, send)
