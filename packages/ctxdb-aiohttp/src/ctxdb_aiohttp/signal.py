"""`note_response`: the handler for ``on_response_prepare``, by which the adapter learns of each response."""

from __future__ import annotations

from aiohttp import web

from ctxdb_aiohttp.exchange import Exchange, current_exchange
from ctxdb_aiohttp.handler_response import HandlerResponse
from ctxdb_aiohttp.late_response import LateResponse
from ctxdb_aiohttp.websocket import WebSocket
from ctxdb_aiohttp.writer import watched_writer

__all__ = ["note_response"]


async def note_response(request: web.Request, response: web.StreamResponse) -> None:
    """Have the transactions of a response ended in time, which is being prepared while its unit of work is open."""
    exchange = current_exchange.get(None)
    if exchange is not None and exchange.serves(request):
        _expect(exchange, request, response)
        return
    # Most responses are prepared when their unit of work has ended. Those of a unit that lives on may have been left to
    # aiohttp by another task.
    watched = watched_writer(request.writer)
    if watched is not None and isinstance(watched.delivery, LateResponse):
        watched.delivery.expect(request, response)


def _expect(exchange: Exchange, request: web.Request, response: web.StreamResponse) -> None:
    watched = exchange.watched
    if watched is not None and isinstance(watched.delivery, LateResponse):
        watched.delivery.expect(request, response)
    elif isinstance(response, web.WebSocketResponse):
        exchange.watch(WebSocket(exchange, request, response))
    else:
        exchange.watch(HandlerResponse(exchange, request, response))
