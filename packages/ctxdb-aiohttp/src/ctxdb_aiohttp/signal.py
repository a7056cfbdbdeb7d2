"""`note_response`: the handler for ``on_response_prepare``, by which the adapter learns of each response."""

from __future__ import annotations

from aiohttp import web

from ctxdb_aiohttp.exchange import exchange_of
from ctxdb_aiohttp.handler_response import HandlerResponse
from ctxdb_aiohttp.late_response import LateResponse
from ctxdb_aiohttp.websocket import WebSocket

__all__ = ["note_response"]


async def note_response(request: web.Request, response: web.StreamResponse) -> None:
    """Have the transactions of a response ended in time, which is being prepared while its unit of work is open."""
    if getattr(request.writer, "ctxdb_exchange", None) is None:
        # The unit of work of most responses has ended before they are prepared.
        return
    exchange = exchange_of(request)
    assert exchange is not None
    watched = exchange.watched
    if watched is not None and isinstance(watched.delivery, LateResponse):
        watched.delivery.expect(request, response)
    elif isinstance(response, web.WebSocketResponse):
        exchange.watch(WebSocket(exchange, request, response))
    else:
        exchange.watch(HandlerResponse(exchange, request, response))
