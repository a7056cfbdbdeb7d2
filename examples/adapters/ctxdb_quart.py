"""ctxdb for Quart: the request's SQLAlchemy transaction, ended before its response leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from quart import Quart, Request, Websocket, request, websocket
from quart.asgi import ASGIHTTPConnection, ASGIWebsocketConnection
from quart.ctx import AppContext

from ctxdb_core import DBConnect, commit_below_400
from ctxdb_core.adapters import (
    FINISHING,
    BeforeCommit,
    CommitPolicy,
    Phase,
    RequestPolicy,
    UnitOfWork,
    begin,
    check_transition,
    close_all,
    finalize,
    with_request,
)

__all__ = ["setup"]

# Where an application keeps its options, and where a request's scope keeps its exchange.
_EXTENSION = "ctxdb"
_EXCHANGE = "ctxdb_quart.exchange"


@dataclass(frozen=True)
class _Options:
    before_commit: BeforeCommit | None
    commits: RequestPolicy


def setup(
    app: Quart,
    *dbs: DBConnect,
    before_commit: BeforeCommit | None = None,
    commit_policy: CommitPolicy | RequestPolicy = commit_below_400,
) -> None:
    """Give each request and each websocket of a Quart application a unit of work.

    A blueprint may bring it along, by ``blueprint.record(lambda state: setup(state.app, db))``. An application that it
    is set up on already keeps its options, and closes the blueprint's databases as well.

    Args:
        app: the application.
        *dbs: closed when the application shuts down.
        before_commit: awaited with each session that is about to be committed.
        commit_policy: given the status of the response, and the request if it takes two arguments: whether to commit.
    """
    shut_down = app.shutdown

    async def shut_down_and_close() -> None:
        # Not by `after_serving`: if one of those functions fails, the others are not called.
        try:
            await shut_down()
        finally:
            await close_all(*dbs)

    app.shutdown = shut_down_and_close  # type: ignore[method-assign]  # on this one object only
    options = _Options(before_commit, with_request(commit_policy))
    if app.extensions.setdefault(_EXTENSION, options) is not options:
        return
    app.asgi_http_class = _HTTPConnection
    app.asgi_websocket_class = _WebsocketConnection
    app.finalize_request = _settling(app, app.finalize_request, request)  # type: ignore[method-assign]  # ditto
    app.finalize_websocket = _settling(app, app.finalize_websocket, websocket)  # type: ignore[method-assign]  # ditto


class _HTTPConnection(ASGIHTTPConnection):
    async def __call__(self, receive: Any, send: Any) -> None:
        await _cancelled_with_handler(super().__call__(receive, send), self.scope)

    async def handle_request(self, request: Request, send: Any) -> None:
        async with _unit_of_work(self.app, request) as exchange:
            await super().handle_request(request, exchange.settled(send) if exchange else send)


@asynccontextmanager
async def _unit_of_work(app: Quart, request: Request | Websocket) -> AsyncIterator[_Exchange | None]:
    options: _Options = app.extensions[_EXTENSION]
    scope: Any = request.scope
    unit = begin(scope, before_commit=options.before_commit)
    if unit is None:
        yield None
        return
    exchange = scope[_EXCHANGE] = _Exchange(unit, options.commits, request)
    try:
        yield exchange
    except BaseException as exc:
        await finalize(unit, commit=False, error=exc)
        raise
    # Quart ends each body that it does not stop, so one that has not come to its end was cut off.
    await finalize(unit, commit=exchange.phase in FINISHING and exchange.phase is not Phase.BODY)


async def _cancelled_with_handler(connection: Awaitable[None], scope: Any) -> None:
    """Cancel the handler's task with the server's, which Quart does from 0.23 on."""
    try:
        await connection
    except asyncio.CancelledError:
        if _EXCHANGE in scope:
            handler = scope[_EXCHANGE].handler
            handler.cancel()
            await asyncio.wait([handler])
        raise


def _settling(app: Quart, finalize_response: Callable[..., Awaitable[Any]], connection: Any) -> Any:
    """Return a `finalize_response` after which the transactions have ended, or that answers for why they could not."""

    async def finalize_and_settle(*args: Any, **kwargs: Any) -> Any:
        response = await finalize_response(*args, **kwargs)
        exchange: _Exchange | None = connection.scope.get(_EXCHANGE)
        if exchange is None:
            return response
        try:
            await exchange.settle(None if response is None else response.status_code)
        except Exception as error:  # noqa: BLE001 - raised again, unless an error handler of the application answers it
            await finalize(exchange.unit, commit=False, last=False, error=error)
            # From 0.23 on, Quart passes the context first.
            context = args[:1] if isinstance(args[0], AppContext) else ()
            handle_user_exception: Callable[..., Awaitable[Any]] = app.handle_user_exception
            result = await handle_user_exception(*context, error)
            response = await finalize_response(*context, result, **kwargs)
            await exchange.settle(500 if response is None else response.status_code)
        return response

    return finalize_and_settle


class _Exchange:
    """A request or websocket with its unit of work, and the phase that it is in."""

    def __init__(self, unit: UnitOfWork, commits: RequestPolicy, request: Request | Websocket) -> None:
        self.unit = unit
        self.commits = commits
        self.request = request
        self.handler = asyncio.current_task()
        self.phase = Phase.HANDLING

    def move_to(self, phase: Phase) -> None:
        """Go over to `phase`; nothing happens if that is the current one."""
        if phase is not self.phase:
            check_transition(self.phase, phase)
            self.phase = phase

    async def settle(self, status: int | None) -> None:
        """End the transactions as `status` demands; a websocket whose handler has just returned has none."""
        if self.phase is Phase.REFUSED:
            self.move_to(Phase.HANDLING)  # this is the answer to the error
        try:
            commit = self.calls_for_commit(status)
            await finalize(self.unit, commit=commit, last=False)
        except Exception:
            self.refuse()
            raise
        if self.phase is Phase.BODY and commit:
            self.move_to(Phase.AFTER)  # a websocket's, which has its close frame left to send

    def calls_for_commit(self, status: int | None) -> bool:
        """Return whether the transactions are to be committed."""
        if status is None:
            return self.phase in _ACCEPTED
        if status == _SWITCHING_PROTOCOLS:
            # A policy is about what requests ask for, and is not asked about websockets.
            return True
        return not self.is_refused_by_close() and self.commits(status, self.request)

    def is_refused_by_close(self) -> bool:
        """Return whether Quart refuses a handshake by a close, and not by its response: the client gets a 403."""
        extensions: Any = self.request.scope.get("extensions") or {}
        is_handshake = isinstance(self.request, Websocket) and self.phase not in _ACCEPTED
        return is_handshake and _DENIAL not in extensions

    def refuse(self) -> None:
        """Note that the transactions could not be ended."""
        self.move_to(Phase.BROKEN if self.phase is Phase.AFTER else Phase.REFUSED)

    async def end_body(self) -> None:
        """Commit what a body has done, before the last of it is sent."""
        try:
            await finalize(self.unit, commit=True, last=False, ends_body=True)
        except Exception:
            self.move_to(Phase.BROKEN)
            raise
        self.move_to(Phase.AFTER)

    def settled(self, send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
        """Return a `send` that ends the transactions before a message tells the client how they ended."""

        async def settle_and_send(message: Any) -> None:
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    await self.settle(message["status"])
                    self.move_to(Phase.BODY)
                case "http.response.body" | "websocket.http.response.body" if not message.get("more_body", False):
                    await self.end_body()
                case "http.response.body" if self.phase is Phase.BODY:
                    # What has only read holds no connection while a slow client reads.
                    await self.unit.end_reading()
                case "websocket.close" if self.phase is Phase.AFTER:
                    await self.settle(None)
                case "websocket.close":
                    await finalize(self.unit, commit=False, last=False)
                    message = {**message, "code": _INTERNAL_ERROR}
            await send(message)

        return settle_and_send


# The status of a handshake, and the phases in which it is behind a websocket.
_SWITCHING_PROTOCOLS = 101
_ACCEPTED = (Phase.BODY, Phase.AFTER)

# The ASGI extension by which a handshake is refused with a response ("WebSocket Denial Response").
_DENIAL = "websocket.http.response"

# WebSocket close codes that say that all went well, and that it did not (RFC 6455, section 7.4.1).
_WELL = (1000, 1001)
_INTERNAL_ERROR = 1011


class _WebsocketConnection(ASGIWebsocketConnection):
    exchange: _Exchange | None = None

    async def __call__(self, receive: Any, send: Any) -> None:
        await _cancelled_with_handler(super().__call__(receive, send), self.scope)

    async def handle_websocket(self, websocket: Websocket, send: Any) -> None:
        async with _unit_of_work(self.app, websocket) as exchange:
            self.exchange = exchange
            await super().handle_websocket(websocket, exchange.settled(send) if exchange else send)

    async def accept_connection(self, send: Any, headers: Any, subprotocol: str | None) -> None:
        # Quart calls it before everything else that a handler sends or receives as well.
        if self.exchange and self.exchange.phase not in _ACCEPTED:
            await self.exchange.settle(_SWITCHING_PROTOCOLS)
            self.exchange.move_to(Phase.BODY)
        await super().accept_connection(send, headers, subprotocol)

    async def close_connection(self, send: Any, code: int, reason: str) -> None:
        exchange = self.exchange
        if exchange:
            is_accepted = exchange.phase in _ACCEPTED
            try:
                await finalize(exchange.unit, commit=is_accepted and code in _WELL, last=False)
            except Exception:
                exchange.refuse()
                await super().close_connection(send, _INTERNAL_ERROR, "")
                raise
            if is_accepted:
                exchange.move_to(Phase.AFTER)
        await super().close_connection(send, code, reason)
