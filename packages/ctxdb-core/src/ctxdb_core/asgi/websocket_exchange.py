"""`WebSocketExchange`: a websocket connection as a unit of work."""

from __future__ import annotations

from collections.abc import Awaitable

from ctxdb_core.asgi.exchange import Exchange
from ctxdb_core.asgi.response import Response, ResponseStart
from ctxdb_core.asgi.types import Message
from ctxdb_core.phases import Phase

__all__ = ["WebSocketExchange"]

# WebSocket close codes that say that all went well (RFC 6455, section 7.4.1).
_NORMAL_CLOSURE, _GOING_AWAY, _INTERNAL_ERROR = 1000, 1001, 1011


class WebSocketExchange(Exchange):
    """The unit of work of a websocket connection.

    The handshake starts its response, which ends with the close frame; what is between the two is its body.
    """

    def send(self, message: Message) -> Awaitable[None]:
        kind, response = message["type"], self.follow_response()
        if kind == "websocket.accept":
            return self._accept(response, message)
        if response.start is not None and response.start.holds_up():
            return self.send_behind(response.start, message)
        if kind == "websocket.close":
            return self._close(message)
        if kind == "websocket.http.response.start":
            return self._deny(message)
        if kind == "websocket.http.response.body" and not message.get("more_body", False):
            return self._end_denial(message)
        return self.forward(message)

    async def _accept(self, response: Response, message: Message) -> None:
        """Accept the connection, once what was done before is committed."""
        response.start = start = ResponseStart()
        try:
            if self.phase is Phase.HANDLING:
                start.enter()
                await self._commit_handshake()
                if self.watchers:
                    message = self.announce(message, self.watchers)
            await self.forward(message)
        finally:
            response.end_start(start)

    async def _commit_handshake(self) -> None:
        # The upgrade is a success like any other; a policy is about what requests ask for, and is not asked.
        try:
            await self.commit()
        except Exception as exc:
            self.refuse(exc)
            raise
        self._begin_body()

    def _begin_body(self) -> None:
        # Two tasks may have answered the handshake at once.
        if self.phase is Phase.HANDLING:
            self.move_to(Phase.BODY)

    async def _deny(self, message: Message) -> None:
        """Answer the handshake by an HTTP response (ASGI, "WebSocket Denial Response")."""
        if self.phase is Phase.HANDLING:
            await self.settle(message)
            self._begin_body()
        await self.forward(message)

    async def _end_denial(self, message: Message) -> None:
        """Send the end of a denial's body, once what was done since its start is committed."""
        await (self.send_last(message) if self.phase in (Phase.BODY, Phase.AFTER) else self.forward(message))

    async def _close(self, message: Message) -> None:
        """Close the connection, once its transactions have ended as the close code demands."""
        # A close before the handshake is over refuses it: the client gets a 403.
        is_normal = self.phase is not Phase.HANDLING and message.get("code", _NORMAL_CLOSURE) in (
            _NORMAL_CLOSURE,
            _GOING_AWAY,
        )
        if self.phase is not Phase.REFUSED:
            try:
                if is_normal:
                    await self.commit()
                else:
                    await self.roll_back()
            except Exception as exc:
                if self.phase is Phase.BODY:
                    # The close frame tells the client that the connection did not end well.
                    self.refuse(exc, can_be_answered=False)
                    await self.server({"type": "websocket.close", "code": _INTERNAL_ERROR, "reason": ""})
                raise
        # A handshake that is refused has had its whole response.
        self._begin_body()
        self.note_body_is_sent()
        await self.forward(message)
