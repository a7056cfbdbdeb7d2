"""`CommitErrorMiddleware`: the error of a failed commit, raised where Litestar answers it."""

from __future__ import annotations

from typing import Any

from litestar.exceptions import HTTPException
from litestar.status_codes import HTTP_500_INTERNAL_SERVER_ERROR
from litestar.types import ASGIApp, Receive, Send
from litestar.utils.scope.state import ScopeState

from ctxdb_core.asgi import answer_commit_error, commit_error

__all__ = ["CommitErrorMiddleware"]

_ROUTED = "ctxdb.litestar.routed"


class CommitErrorMiddleware:
    """Raises the error of a failed commit anew, as if it came from the route.

    The commit fails while the start of the response is on its way out. By then Litestar has noted that the response has
    started, and answers no error any more. Around all middlewares of the route, that note can be taken back: what comes
    next is Litestar's own handling of exceptions, with the handlers of the route and of all layers above it.

    A mounted application leaves an error that it has no handler for to the application around it.

    Args:
        app: the route with its middlewares.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Run the route."""
        # Asked for now: a mounted application may write its own into the same scope.
        route_handler = scope["route_handler"]
        is_mounted = _ROUTED in scope
        scope[_ROUTED] = True
        try:
            await self.app(scope, receive, send)
        except Exception as exc:
            error = _error_to_answer(scope, is_mounted=is_mounted)
            if error is None:
                raise
            answer_commit_error(scope, exc)
        else:
            error = _error_to_answer(scope, is_mounted=is_mounted)
            if error is None:
                return
            # A middleware has answered it already, but that was not sent: its response might claim a success.
            answer_commit_error(scope)
        finally:
            if not is_mounted:
                del scope[_ROUTED]
        state: Any = ScopeState.from_scope(scope)
        state.response_started = False
        state.exception_handlers = {**route_handler.resolve_exception_handlers(), **state.exception_handlers}
        raise error


def _error_to_answer(scope: Any, *, is_mounted: bool) -> Exception | None:
    error = commit_error(scope)
    return None if error is None or (is_mounted and not _has_handler(scope, error)) else error


def _has_handler(scope: Any, error: Exception) -> bool:
    # As Litestar looks for one: by the status of an HTTP exception, by the class, and at last by 500.
    status = error.status_code if isinstance(error, HTTPException) else HTTP_500_INTERNAL_SERVER_ERROR
    handlers: Any = ScopeState.from_scope(scope).exception_handlers
    return any(key in handlers for key in (status, *type(error).__mro__))
