"""`ASGIHTTPDBSessionMiddleware`: the unit of work of each request of an ASGI application."""

from __future__ import annotations

from asyncio import _get_running_loop  # for implementers of event loops, and what costs the least
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any

from ctxdb_core._databases.arguments import check_function
from ctxdb_core._databases.shutdown import stop_queries_of_requests
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.lifecycle import REQUEST_KEY, outer_unit
from ctxdb_core._units.reading import ReadsFrom, check_reads_from
from ctxdb_core._units.session_end import refuse_after_unit
from ctxdb_core._units.unit import UnitOfWork, current_unit
from ctxdb_core._units.unit_sessions import NO_SESSIONS_ANY_MORE, NO_SESSIONS_YET
from ctxdb_core.asgi.exchange import CONTEXT_KEY, Exchange, ExchangeSettings
from ctxdb_core.asgi.http_exchange import HTTPExchange
from ctxdb_core.asgi.request_settings import Deadline, RequestSettings
from ctxdb_core.asgi.response import ANSWERED, Response
from ctxdb_core.asgi.types import ASGIApp, Message, Receive, Scope, Send
from ctxdb_core.asgi.websocket_exchange import WebSocketExchange
from ctxdb_core.phases import Phase
from ctxdb_core.policy import CommitPolicy, RequestPolicy, commit_below_400, with_request

__all__ = ["ASGIHTTPDBSessionMiddleware"]

# Bound once: looking an attribute up at each request is felt where the request uses no database.
_HANDLING = Phase.HANDLING
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
        commit_policy: given the status of the response, and the ASGI scope if it takes a second argument: whether to
            commit.
        statement_timeout: how many seconds each statement of a request may take; see `set_statement_timeout`.
        deadline: given the ASGI scope of a request: when its last statement has to be done, on the event loop's clock;
            ``None`` for no deadline. Streamed bodies and background tasks are part of the request.
        reads_from: for databases, the one whose sessions requests by GET, HEAD, OPTIONS and TRACE get in their place:
            ``{master: replica}``. Units of work of their own that such a request opens do not.

    Raises:
        TypeError: `commit_policy` is no plain function of a status, or of a status and a scope; `reads_from` is no
            mapping of `DBConnect`s; `before_commit` or `deadline` is no function.
    """

    has_boundary = True
    """Whether an `ASGIStreamBoundary` may be beneath.

    Then the author of each statement of a request is noted, as a middleware may give up on a handler.
    A subclass that looks for the places of boundaries itself says here whether there are any.
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommit | None = None,
        commit_policy: CommitPolicy | RequestPolicy = commit_below_400,
        *,
        statement_timeout: float | None = None,
        deadline: Deadline | None = None,
        reads_from: ReadsFrom | None = None,
    ) -> None:
        check_function(app, "`app`, the ASGI application")
        self.app: ASGIApp = app
        reads_from = check_reads_from(reads_from)
        if statement_timeout is not None or deadline is not None or reads_from is not None:
            self.app = RequestSettings(app, statement_timeout, deadline, reads_from)
        if before_commit is not None:
            check_function(before_commit, "`before_commit`")
        self.commits: RequestPolicy = with_request(commit_policy)
        """Whether a response with a status is committed, in a request with a scope."""
        self._settings = ExchangeSettings(before_commit, middleware=self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application in a unit of work; scopes other than ``http`` and ``websocket`` are passed on."""
        exchange: Exchange
        if scope["type"] == "http":
            exchange = http_exchange = HTTPExchange()
            exchange.response = None
            http_exchange.source, receive = receive, http_exchange.receive
        elif scope["type"] == "websocket":
            exchange = WebSocketExchange()
            exchange.response = Response()
        else:
            await self._pass_on(scope, receive, send)
            return
        # Most requests find nothing at all: these two look-ups spare them the closer look.
        if (REQUEST_KEY in scope or _get_current_unit(None) is not None) and outer_unit(scope) is not None:
            await self.app(scope, receive, send)
            return
        # An exchange has no `__init__`: a request without database use would feel the call. `begin` sets the same
        # attributes, and so does the answer in a unit of its own below.
        exchange.sessions = NO_SESSIONS_YET
        exchange.loop = _get_running_loop()
        exchange.settings = self._settings
        exchange.hooks = exchange.registration = exchange.token = exchange.calls = None
        if self.has_boundary:
            scope[CONTEXT_KEY] = copy_context()
        exchange.phase = _HANDLING
        exchange.origin = scope
        exchange.server = send
        root_app = scope.get("app")
        scope[REQUEST_KEY] = exchange
        token = _set_current_unit(exchange)
        try:
            try:
                await self.app(scope, receive, exchange.send)
            except BaseException as exc:
                if await exchange.fail(exc):
                    raise
            if exchange.response is None:
                exchange.sessions = NO_SESSIONS_ANY_MORE
                return
            if exchange.refusal is None and exchange.finish_idle():
                return
            if exchange.error_to_answer is not None:
                await self._answer(exchange, scope, receive, root_app)
            await exchange.conclude()
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

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, root_app: Any | None) -> None:
        error = exchange.error_to_answer
        assert error is not None
        exchange.begin_answer()
        if exchange.closed:
            await self._answer_in_unit_of_its_own(error, exchange, scope, receive, root_app)
            return
        calls = exchange.calls
        try:
            with nullcontext() if calls is None else calls.variables_of_handler():
                await self.answer_error(error, scope, exchange.request_again(receive), exchange.send, root_app)
        except BaseException as exc:
            if await exchange.fail(exc):
                raise

    async def _answer_in_unit_of_its_own(
        self, error: Exception, exchange: Exchange, scope: Scope, receive: Receive, root_app: Any | None
    ) -> None:
        """Answer an error whose unit of work has ended: a handler that was given up on may still ask for that one."""
        answering = HTTPExchange()
        answering.sessions, answering.loop = NO_SESSIONS_YET, exchange.loop
        answering.settings, answering.origin = self._settings, scope
        answering.hooks = answering.registration = answering.token = answering.calls = None
        answering.phase = _HANDLING
        answering.server, answering.source = exchange.server, receive
        answering.response = Response()
        answering.response.refusal = ANSWERED
        scope[REQUEST_KEY] = answering
        token = _set_current_unit(answering)
        try:
            try:
                await self.answer_error(error, scope, exchange.request_again(receive), answering.send, root_app)
            except BaseException as exc:
                if await answering.fail(exc):
                    raise
            await answering.conclude()
        finally:
            _reset_current_unit(token)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a lifespan, say, which lasts longer than any unit of work around its server."""
        if scope["type"] == "lifespan":
            send = self._shutting_down(send)
        inherited = _get_current_unit(None)
        if inherited is None or inherited.shared:
            await self.app(scope, receive, send)
            return
        token = _set_current_unit(UnitOfWork.ended())
        try:
            await self.app(scope, receive, send)
        finally:
            _reset_current_unit(token)

    def _shutting_down(self, send: Send) -> Send:
        """Return what sends a lifespan's messages, and lets the shutdown end when queries of requests were stopped."""

        async def send_when_stopped(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await stop_queries_of_requests(self._has_opened, refuse_after_unit)
            await send(message)

        return send_when_stopped

    def _has_opened(self, unit: UnitOfWork | None) -> bool:
        """Return whether `unit` is that of a request of this middleware, or was opened inside of such a request."""
        while unit is not None and not isinstance(unit, Exchange):
            unit = unit.enclosing()
        return unit is not None and unit.settings.middleware is self
