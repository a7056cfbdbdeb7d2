"""`ReadingFrom`: requests by safe methods read from other databases than the ones that other requests write to."""

from __future__ import annotations

from ctxdb_core._units.lifecycle import REQUEST_KEY
from ctxdb_core._units.reading import SAFE_METHODS, ReadsFrom
from ctxdb_core._units.settings import changing
from ctxdb_core.asgi.http_exchange import HTTPExchange
from ctxdb_core.asgi.types import ASGIApp, Receive, Scope, Send

__all__ = ["ReadingFrom"]


class ReadingFrom:
    """Has requests by safe methods read elsewhere, beneath the middleware that gives each request a unit of work.

    This is an application of its own, so that requests without such an option do not pay for it. Websockets are left
    alone: their handshake is a GET, but their connection may be used for writes.

    Args:
        app: the ASGI application.
        reads_from: maps a database to the one that is read from in its place.
    """

    def __init__(self, app: ASGIApp, reads_from: ReadsFrom) -> None:
        self.app = app
        self._reading = changing(reads_from=reads_from)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say where the request reads from, and run the application."""
        exchange = scope.get(REQUEST_KEY)
        if isinstance(exchange, HTTPExchange) and scope["method"] in SAFE_METHODS:
            exchange.settings = self._reading(exchange.settings)
        await self.app(scope, receive, send)
