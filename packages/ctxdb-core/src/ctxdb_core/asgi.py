"""The unit of work of an ASGI request: a middleware for any ASGI application, which imports no framework."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from threading import get_ident
from typing import Any, TypeAlias

from ctxdb_core._gate import wait_for_statements
from ctxdb_core._session_end import report
from ctxdb_core.lifecycle import REQUEST_KEY, outer_unit
from ctxdb_core.policy import CommitPolicy, commit_below_400
from ctxdb_core.unit import BeforeCommit, UnitOfWork, current_unit

__all__ = ["ASGIApp", "ASGIHTTPDBSessionMiddleware", "Message", "Receive", "Scope", "Send"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

# Bound once: looking a method up at each request is felt where the request uses no database.
_get_current_unit, _set_current_unit, _reset_current_unit = current_unit.get, current_unit.set, current_unit.reset

# How much of a request's body is kept in case that a handler of errors reads it.
_KEPT_BYTES = 1 << 20

# WebSocket close codes that say that all went well (RFC 6455, section 7.4.1).
_NORMAL_CLOSURE, _GOING_AWAY, _INTERNAL_ERROR = 1000, 1001, 1011


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
    """

    def __init__(
        self, app: ASGIApp, before_commit: BeforeCommit | None = None, commit_policy: CommitPolicy = commit_below_400
    ) -> None:
        self.app = app
        self.before_commit = before_commit
        self.commit_policy = commit_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application in a unit of work; scopes other than ``http`` and ``websocket`` are passed on."""
        exchange: _Exchange
        if scope["type"] == "http":
            exchange = http_exchange = _HTTPExchange(self, send)
            http_exchange.source, receive = receive, http_exchange.receive
        elif scope["type"] == "websocket":
            exchange = _WebSocketExchange(self, send)
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
                await exchange.finish(commit=exchange.responded)
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
        self, exchange: _Exchange, scope: Scope, receive: Receive, send: Send, root_app: Any | None
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
            await exchange.finish(commit=exchange.responded)


class _Exchange(UnitOfWork):
    """The unit of work of one request, together with the `send` that ends it in time."""

    responded = False
    """Whether a response has begun."""
    receive_again: Receive | None = None
    """Where a handler of errors receives the request from, if not where the application did."""
    can_answer = True
    """Whether a response for an error can still be sent."""
    failure: Exception | None = None
    """Why the response that the application began was not sent."""

    def __init__(self, middleware: ASGIHTTPDBSessionMiddleware, forward: Send) -> None:
        # UnitOfWork.__init__ is spelled out here: on a request without database use, the call would be felt.
        self.sessions = {}
        self.before_commit = middleware.before_commit
        self.thread = get_ident()
        self.middleware = middleware
        self.forward = forward

    def send(self, message: Message) -> Awaitable[None]:
        """Forward a message of the application, after what has to happen before it."""
        raise NotImplementedError

    def start_over(self, forward: Send) -> None:
        """Take another response: the one of the error."""
        self.failure = None
        self.responded = False
        self.forward = forward

    async def refuse_response(self, exc: Exception) -> None:
        """Send nothing more of what the application sends, as `exc` kept its transactions from being ended."""
        self.failure = exc
        self.forward = _discard
        await self.roll_back(exc)

    async def respond(self, message: Message) -> None:
        """End the transactions as the status of the response demands, then let it start."""
        # After a refused response, the application may try one of its own for the error: it is not sent either.
        if self.failure is None:
            try:
                if self.middleware.commit_policy(message["status"]):
                    await self.commit()
                else:
                    # A body that is made already may be using the session: it shall not be interrupted.
                    await wait_for_statements(self.sessions.values())
                    await self.roll_back()
            except Exception as exc:
                await self.refuse_response(exc)
                raise
        await self.forward(message)

    async def app_raised(self, exc: BaseException) -> bool:
        """Roll back for an exception of the application; return whether it is the one to raise.

        It is not where a commit failed: then that error surfaces, and not what the application made of it.
        """
        failure = self.failure
        if failure is None:
            await self.finish(commit=False, error=exc)
            return True
        if isinstance(exc, Exception):
            if not _is_caused_by(exc, failure):
                report(exc, failure, "the application failed on top of it")
            return False
        report(failure, exc, "nothing was committed, as that had failed")
        await self.finish(commit=False, error=exc)
        return True


class _HTTPExchange(_Exchange):
    source: Receive
    kept_bytes = 0
    kept: list[Message] | None = None
    """The request's body as far as the application has received it; empty once it is too large to be kept."""

    async def receive(self) -> Message:
        """Pass the request on to the application, and keep it for a handler of errors that wants to read it."""
        message = await self.source()
        if message["type"] == "http.request" and self.kept_bytes <= _KEPT_BYTES:
            self.kept_bytes += len(message.get("body", b""))
            kept = self.kept = self.kept or []
            kept.append(message)
            if self.kept_bytes > _KEPT_BYTES:
                self.kept = [{"type": "http.request", "body": b"", "more_body": False}]
        return message

    async def receive_again(self) -> Message:
        """Return once more what `receive` has passed on, then what follows: an error handler reads from the start."""
        return self.kept.pop(0) if self.kept else await self.source()

    def send(self, message: Message) -> Awaitable[None]:
        # A plain function: most messages cost no coroutine of their own.
        if message["type"] == "http.response.start":
            self.responded = True
            if self.sessions or self.callbacks:
                return self.respond(message)
        return self.forward(message)


class _WebSocketExchange(_Exchange):
    accepted = False
    """Whether the handshake was accepted."""

    def send(self, message: Message) -> Awaitable[None]:
        kind = message["type"]
        if kind == "websocket.accept":
            self.accepted = self.responded = True
            self.can_answer = False
        elif kind == "websocket.close":
            return self._close(message)
        elif kind == "websocket.http.response.start":
            self.responded = True
            return self.respond(message)
        return self.forward(message)

    async def _close(self, message: Message) -> None:
        # A close before the handshake is over refuses it: the client gets a 403.
        normal = self.accepted and message.get("code", _NORMAL_CLOSURE) in (_NORMAL_CLOSURE, _GOING_AWAY)
        forward = self.forward
        if self.failure is None:
            try:
                if normal:
                    await self.commit()
                else:
                    await self.roll_back()
            except Exception as exc:
                await self.refuse_response(exc)
                self.can_answer = False
                await forward({"type": "websocket.close", "code": _INTERNAL_ERROR, "reason": ""})
                raise
        await self.forward(message)


async def _discard(message: Message) -> None:
    """Drop a message of an application whose response is not sent any more."""


def _is_caused_by(exc: BaseException | None, cause: BaseException) -> bool:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        if exc is cause:
            return True
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__
    return False
