"""The error of a failed commit, raised where Litestar answers errors."""

from __future__ import annotations

from typing import Any

from litestar.exceptions import HTTPException
from litestar.status_codes import HTTP_500_INTERNAL_SERVER_ERROR
from litestar.utils.scope.state import ScopeState

from ctxdb_core.asgi import ASGIApp, Receive, Scope, Send, answer_commit_error, commit_error

__all__ = ["ERROR", "CommitErrorMiddleware", "MountMiddleware"]

ERROR = "ctxdb.litestar.error"
"""Where the scope of a request has the error that is to be raised where the request is routed."""

# Where it notes that it is in a mounted application.
_MOUNTED = "ctxdb.litestar.mounted"


class CommitErrorMiddleware:
    """Raises the error of a failed commit anew, as if it came from the route.

    The commit fails while the start of the response is on its way out. By then Litestar has noted that the response has
    started, and answers no error any more. Around its router, that note can be taken back: what comes next is
    Litestar's own handling of exceptions, with the handlers of the route and of all layers above it. This goes around
    the router and not around each route, as the middlewares of a route make Litestar handle exceptions beneath them a
    second time, which is half of what a request without database use would pay.

    A mounted application leaves an error that it has no handler for to the application around it.

    Args:
        app: the router.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route the request."""
        if ERROR in scope:
            _take_back_start(scope)
            raise scope.pop(ERROR)
        try:
            await self.app(scope, receive, send)
        except Exception as exc:
            error = _error_to_answer(scope)
            if error is None:
                raise
            answer_commit_error(scope, exc)
        else:
            return
        _take_back_start(scope)
        raise error


class MountMiddleware:
    """Notes that an application is mounted at a route, and has the handlers of that route asked for its errors, too.

    The mounted application writes its own handlers into the scope, and so hides those of the application around it.

    Args:
        app: the route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the mounted application."""
        # Asked for now, as the mounted application may write its own into this very scope.
        route_handler, is_mounted = scope["route_handler"], _MOUNTED in scope
        scope[_MOUNTED] = True
        try:
            await self.app(scope, receive, send)
        finally:
            if not is_mounted:
                del scope[_MOUNTED]
            if commit_error(scope) is not None:
                state: Any = ScopeState.from_scope(scope)  # type: ignore[arg-type]  # it is one of Litestar's
                state.exception_handlers = {**route_handler.resolve_exception_handlers(), **state.exception_handlers}


def _take_back_start(scope: Scope) -> None:
    """Have Litestar answer errors, although it has noted the start of a response."""
    state: Any = ScopeState.from_scope(scope)  # type: ignore[arg-type]  # it is one of Litestar's
    state.response_started = False


def _error_to_answer(scope: Scope) -> Exception | None:
    error = commit_error(scope)
    return None if error is None or (_MOUNTED in scope and not _has_handler(scope, error)) else error


def _has_handler(scope: Any, error: Exception) -> bool:
    # As Litestar looks for one: by the status of an HTTP exception, by the class, and at last by 500.
    status = error.status_code if isinstance(error, HTTPException) else HTTP_500_INTERNAL_SERVER_ERROR
    handlers: Any = ScopeState.from_scope(scope).exception_handlers
    return any(key in handlers for key in (status, *type(error).__mro__))
