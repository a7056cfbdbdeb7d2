"""`RequestSettings`: how long the statements of a request may take, and which databases it reads from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from ctxdb_core._databases.arguments import check_function
from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.lifecycle import REQUEST_KEY
from ctxdb_core._units.reading import SAFE_METHODS, ReadsFrom
from ctxdb_core._units.settings import changing
from ctxdb_core.asgi.exchange import Exchange
from ctxdb_core.asgi.http_exchange import HTTPExchange
from ctxdb_core.asgi.types import ASGIApp, Receive, Scope, Send

__all__ = ["Deadline", "RequestSettings"]

Deadline: TypeAlias = Callable[[Scope], float | None]
"""Given the ASGI scope of a request: when its last statement has to be done, on the event loop's clock."""


class RequestSettings:
    """Changes the settings of each request, beneath the middleware that gives it a unit of work.

    This is an application of its own, so that requests without such an option do not pay for it.

    Args:
        app: the ASGI application.
        statement_timeout: how many seconds each statement may take.
        deadline: when the last one has to be done.
        reads_from: maps a database to the one that requests by safe methods read from in its place. Websockets are left
            alone: their handshake is a GET, but their connection may be used for writes.
    """

    def __init__(
        self, app: ASGIApp, statement_timeout: float | None, deadline: Deadline | None, reads_from: ReadsFrom | None
    ) -> None:
        self.app = app
        if deadline is not None:
            check_function(deadline, "`deadline`")
        self._limit = StatementTimeout(statement_timeout)
        self._limited = changing(statement_timeout=self._limit)
        self._deadline = deadline
        self._reading = None if reads_from is None else changing(reads_from=reads_from)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Change the settings, and run the application."""
        exchange = scope.get(REQUEST_KEY)
        if isinstance(exchange, Exchange):
            settings = exchange.settings
            deadline = None if self._deadline is None else self._deadline(scope)
            if deadline is not None:
                settings = replace(settings, statement_timeout=replace(self._limit, deadline=deadline))
            elif self._limit:
                settings = self._limited(settings)
            if self._reading is not None and isinstance(exchange, HTTPExchange) and scope["method"] in SAFE_METHODS:
                settings = self._reading(settings)
            exchange.settings = settings
        await self.app(scope, receive, send)
