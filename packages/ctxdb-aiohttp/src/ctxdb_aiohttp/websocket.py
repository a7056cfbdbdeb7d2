"""`WebSocket`: a websocket as a response of its handler, whose transactions end before its close frame."""

from __future__ import annotations

from typing import Any

from aiohttp import WSCloseCode, web

from ctxdb_aiohttp.exchange import Exchange
from ctxdb_aiohttp.handler_response import HandlerResponse
from ctxdb_aiohttp.writer import WatchedWriter
from ctxdb_core.adapters import Phase, finalize, is_inside

__all__ = ["WebSocket"]

# Close codes that say that all went well (RFC 6455, section 7.4.1).
_NORMAL_CLOSES = (WSCloseCode.OK, WSCloseCode.GOING_AWAY)


class WebSocket(HandlerResponse):
    """A websocket: it is in ``BODY`` from its handshake to its close frame.

    Args:
        exchange: that of the request.
        request: the request, or the copy of it that the websocket is prepared with.
        socket: the websocket.
    """

    def __init__(self, exchange: Exchange, request: web.Request, socket: web.WebSocketResponse) -> None:
        super().__init__(exchange, request, socket)
        self.socket = socket

    async def start(self, watched: WatchedWriter, status_line: str, headers: Any) -> None:
        await super().start(watched, status_line, headers)
        self._end_before_close()

    async def break_off(self, error: Exception) -> None:
        if self.exchange.phase is Phase.BODY:
            self.exchange.refuse(self.socket, error)
            await self.socket.close(code=WSCloseCode.INTERNAL_ERROR)
        else:
            await super().break_off(error)

    def _end_before_close(self) -> None:
        """End the transactions before the close frame, where the handler closes the connection."""
        exchange, socket = self.exchange, self.socket
        close = socket.close

        async def end_and_close(**options: Any) -> bool:
            # The handler's work is not whole where the client closes, as the handler has not been told yet, nor where
            # code outside of the request does, such as the application's shutdown.
            if (
                exchange.phase is Phase.BODY
                and socket.close_code is None
                and not socket.closed
                and is_inside(exchange.unit)
            ):
                try:
                    commit = options.get("code", WSCloseCode.OK) in _NORMAL_CLOSES
                    await finalize(exchange.unit, commit=commit, last=False)
                except Exception as exc:
                    await self.break_off(exc)
                    raise
                exchange.move_to(Phase.AFTER)
            return await close(**options)

        socket.close = end_and_close  # type: ignore[method-assign]  # on this one object only
