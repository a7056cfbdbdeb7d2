"""`DBSessionMiddleware`: the ASGI middleware of the core, with Starlette's way of answering errors."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware

from ctxdb_core import commit_below_400
from ctxdb_core.adapters import BeforeCommit, CommitPolicy, ReadsFrom, RequestPolicy
from ctxdb_core.asgi import (
    ASGIApp,
    ASGIHTTPDBSessionMiddleware,
    Deadline,
    Receive,
    Scope,
    Send,
)
from ctxdb_starlette.boundary import mark_stream_boundaries

__all__ = ["DBSessionMiddleware"]


class DBSessionMiddleware(ASGIHTTPDBSessionMiddleware):
    """Gives each request and each websocket of a Starlette or FastAPI application a unit of work.

    ``app.add_middleware(DBSessionMiddleware)`` is all the wiring there is. If the commit fails, the application's
    exception handlers answer, as they would if the endpoint had raised the error.

    Args:
        app: the application, passed by ``add_middleware``.
        before_commit: awaited with each session that is about to be committed.
        commit_policy: called with the status of the response, and with the ASGI scope if it takes a second argument;
            returns whether to commit.
        statement_timeout: how many seconds each statement of a request may take.
        deadline: called with the ASGI scope of a request; returns when its last statement has to be done, on the event
            loop's clock.
        reads_from: for databases, the one whose sessions requests by GET, HEAD, OPTIONS and TRACE get in their place:
            ``{master: replica}``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        before_commit: BeforeCommit | None = None,
        commit_policy: CommitPolicy | RequestPolicy = commit_below_400,
        statement_timeout: float | None = None,
        deadline: Deadline | None = None,
        reads_from: ReadsFrom | None = None,
    ) -> None:
        super().__init__(
            app,
            before_commit,
            commit_policy,
            statement_timeout=statement_timeout,
            deadline=deadline,
            reads_from=reads_from,
        )
        self.has_boundary: bool = False
        mark_stream_boundaries(app, self._note_boundary)

    def _note_boundary(self) -> None:
        self.has_boundary = True

    async def answer_error(
        self, error: Exception, scope: Scope, receive: Receive, send: Send, root_app: Any | None
    ) -> None:
        """Answer through the exception handlers of the application, else raise `error`."""

        async def failing(scope: Scope, receive: Receive, send: Send) -> None:
            raise error

        app: ASGIApp = failing
        # The application that handled the request, which may be mounted in the one that has this middleware.
        inner_app = scope.get("app")
        if isinstance(inner_app, Starlette) and inner_app is not root_app:
            app = _with_exception_handlers(app, inner_app)
            if root_app is None or _server_error_handler(inner_app) is not None:
                app = ServerErrorMiddleware(app, handler=_server_error_handler(inner_app), debug=inner_app.debug)
        if isinstance(root_app, Starlette):
            app = _with_exception_handlers(app, root_app)
        await app(scope, receive, send)


def _with_exception_handlers(app: ASGIApp, owner: Starlette) -> ASGIApp:
    # As in Starlette.build_middleware_stack: the handler of 500 and Exception belongs to the server error middleware.
    handlers = {key: handler for key, handler in owner.exception_handlers.items() if key not in (500, Exception)}
    return ExceptionMiddleware(app, handlers=handlers, debug=owner.debug)


def _server_error_handler(owner: Starlette) -> Any | None:
    return owner.exception_handlers.get(500) or owner.exception_handlers.get(Exception)
