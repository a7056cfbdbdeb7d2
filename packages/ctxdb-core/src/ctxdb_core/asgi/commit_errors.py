"""The error that kept a response from being sent: for frameworks whose exception handlers answer further in."""

from __future__ import annotations

from ctxdb_core._units.lifecycle import REQUEST_KEY
from ctxdb_core.asgi.exchange import Exchange
from ctxdb_core.asgi.types import Scope

__all__ = ["answer_commit_error", "commit_error", "has_unit_of_work"]


def has_unit_of_work(scope: Scope) -> bool:
    """Return whether the request has come through an `ASGIHTTPDBSessionMiddleware` that has not ended its unit of work.

    For middlewares that have to be outside of it.
    """
    return REQUEST_KEY in scope


def commit_error(scope: Scope) -> Exception | None:
    """Return the error that kept the response to a request from being sent, if another response can be sent for it.

    For frameworks whose exception handlers are called only for what is raised further in than the middleware. There,
    once the application has returned or raised, an adapter asks for the error, calls `answer_commit_error`, and raises
    it anew.

    Args:
        scope: the request's ASGI scope.
    """
    exchange = scope.get(REQUEST_KEY)
    # Units of other adapters know no failure.
    return exchange.error_to_answer if isinstance(exchange, Exchange) else None


def answer_commit_error(scope: Scope, raised: Exception | None = None) -> None:
    """Let one more response be sent, for the error that `commit_error` has returned.

    Args:
        scope: the request's ASGI scope.
        raised: what the application has raised meanwhile; if that has another cause, it is attached to the error.
    """
    scope[REQUEST_KEY].begin_answer(raised)
