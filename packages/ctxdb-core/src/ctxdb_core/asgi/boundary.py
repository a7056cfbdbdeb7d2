"""`ASGIStreamBoundary`: where a streamed body begins, beneath middlewares that hold its start back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ctxdb_core._units.abandonment import current_call
from ctxdb_core._units.lifecycle import REQUEST_KEY
from ctxdb_core._units.session_end import in_transaction
from ctxdb_core.asgi.body import StreamedBody, let_failure_arrive
from ctxdb_core.asgi.http_exchange import HTTPExchange
from ctxdb_core.asgi.response import ResponseStart
from ctxdb_core.asgi.types import ASGIApp, Message, Receive, Scope, Send
from ctxdb_core.errors import ContextClosedError
from ctxdb_core.phases import Phase

__all__ = ["ASGIStreamBoundary"]


class ASGIStreamBoundary:
    """Ends the transactions of a streamed response where it is made, for middlewares that hold its start back.

    Beneath a middleware that passes messages on through a queue (Starlette's ``BaseHTTPMiddleware``), or that waits for
    the body before it sends the start (its ``GZipMiddleware``), a streamed body runs ahead of its own
    ``http.response.start``: the body's work would be taken for the response's. So this goes beneath such a middleware,
    and `ASGIHTTPDBSessionMiddleware` above it. A response with a ``content-length`` is not streamed, and left to the
    latter.

    Args:
        app: the ASGI application.
        is_kept: given the ASGI scope of a request and the ``http.response.start`` of a response that is not streamed:
            whether a middleware above, such as a cache, is going to keep it. Then its transactions end here, too: what
            is kept has been committed.
    """

    def __init__(self, app: ASGIApp, is_kept: Callable[[Scope, Message], bool] | None = None) -> None:
        self.app = app
        self.is_kept = is_kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        exchange = scope.get(REQUEST_KEY)
        if not isinstance(exchange, HTTPExchange):
            await self.app(scope, receive, send)
            return
        if exchange.phase is Phase.AHEAD:
            await exchange.forget_stream()
        streamed = False
        body: StreamedBody | None = None
        starting: ResponseStart | None = None
        calls = exchange.follow_calls()
        call = calls.begin()

        def note_variables() -> None:
            if exchange.response is not None and not exchange.closed:
                # Something may have to be ended.
                calls.note_variables(call)

        async def start_stream(message: Message) -> None:
            nonlocal body, starting
            # What other tasks send meanwhile comes behind it. Two of them may send a start at once.
            starting = start = ResponseStart()
            try:
                start.enter()
                body = await exchange.begin_stream(message, call)
                await pass_up(message)
            except asyncio.CancelledError:
                exchange.give_up_start()
                raise
            finally:
                start.end()

        async def send_behind(start: ResponseStart, message: Message) -> None:
            await start.wait()
            await send_streamed(message)

        async def pass_on(message: Message) -> None:
            if body is not None:
                body.note_progress(message, exchange)
                await _end_reading(message, exchange)
            await pass_up(message)

        async def pass_up(message: Message) -> None:
            # What the middlewares in between do with the message is not the body's doing.
            token = current_call.set(None)
            try:
                await send(message)
            finally:
                current_call.reset(token)

        def send_streamed(message: Message) -> Awaitable[None]:
            nonlocal streamed
            if message["type"] == "http.response.start":
                calls.note_response(call)
                note_variables()
                is_kept = self.is_kept is not None and self.is_kept(scope, message)
                if is_kept and calls.left_open is not None and calls.left_open.handlers:
                    # A middleware has given up on the handler since, and what the response tells was rolled back.
                    raise ContextClosedError
                streamed = is_kept or _is_streamed(message)
                if streamed and exchange.phase in (Phase.HANDLING, Phase.AHEAD):
                    return start_stream(message)
            elif starting is not None and starting.holds_up():
                return send_behind(starting, message)
            if streamed and exchange.phase in (Phase.HANDLING, Phase.AHEAD):
                return pass_on(message)
            if body is not None:
                return send_part(body, message)
            return send(message)

        async def send_part(body: StreamedBody, message: Message) -> None:
            if not message.get("more_body", False) and any(map(in_transaction, exchange.sessions.values())):
                note_variables()
                await let_failure_arrive()
            body.note_progress(message, exchange)
            await _end_reading(message, exchange)
            await send(message)

        try:
            await self.app(scope, receive, send_streamed)
        except BaseException as exc:
            if body is not None:
                await exchange.fail_stream(body, exc)
            raise
        finally:
            if body is not None:
                body.call = None
            note_variables()
            calls.end(call)


async def _end_reading(message: Message, exchange: HTTPExchange) -> None:
    """End the transactions that have only read, before a part of the body that is not the last one is passed on."""
    if message.get("more_body", False) and exchange.sessions:
        await exchange.end_reading()


def _is_streamed(start: Message) -> bool:
    return start["status"] not in (204, 304) and not any(
        name.lower() == b"content-length" for name, _ in start.get("headers", ())
    )
