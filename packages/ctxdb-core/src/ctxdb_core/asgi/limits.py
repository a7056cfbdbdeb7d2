"""`LimitingStatements`: how long the statements of a request may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from ctxdb_core._databases.arguments import check_function
from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.lifecycle import REQUEST_KEY
from ctxdb_core._units.settings import changing
from ctxdb_core.asgi.exchange import Exchange
from ctxdb_core.asgi.types import ASGIApp, Receive, Scope, Send

__all__ = ["Deadline", "LimitingStatements"]

Deadline: TypeAlias = Callable[[Scope], float | None]
"""Given the ASGI scope of a request: when its last statement has to be done, on the event loop's clock."""


class LimitingStatements:
    """Limits the statements of each request, beneath the middleware that gives it a unit of work.

    This is an application of its own, so that requests without a limit do not pay for it.

    Args:
        app: the ASGI application.
        seconds: how long each statement may take.
        deadline: when the last one has to be done.
    """

    def __init__(self, app: ASGIApp, seconds: float | None, deadline: Deadline | None) -> None:
        self.app = app
        if deadline is not None:
            check_function(deadline, "`deadline`")
        self._limit = StatementTimeout(seconds)
        self._limited = changing(statement_timeout=self._limit)
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Set the limits, and run the application."""
        exchange = scope.get(REQUEST_KEY)
        if isinstance(exchange, Exchange):
            deadline = None if self._deadline is None else self._deadline(scope)
            if deadline is None:
                exchange.settings = self._limited(exchange.settings)
            else:
                limit = replace(self._limit, deadline=deadline)
                exchange.settings = replace(exchange.settings, statement_timeout=limit)
        await self.app(scope, receive, send)
