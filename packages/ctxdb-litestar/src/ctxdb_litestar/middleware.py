"""The unit of work around each request of a Litestar application."""

from __future__ import annotations

from typing import Any

from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware, Receive, Scope, Send
from ctxdb_litestar.commit_errors import ERROR

__all__ = ["LitestarDBSessionMiddleware"]


class LitestarDBSessionMiddleware(ASGIHTTPDBSessionMiddleware):
    """Gives each request of a Litestar application a unit of work, around all that the application does for it."""

    has_boundary = False

    async def answer_error(
        self, error: Exception, scope: Scope, receive: Receive, send: Send, root_app: Any | None
    ) -> None:
        """Answer through the application once more, whose router raises `error` this time.

        Most errors are answered by `CommitErrorMiddleware`. This one has come from further out: the answer to another
        error could not be committed, for instance. Or a middleware further in has caught it: what that one has answered
        was not sent, as it might claim a success.
        """
        scope[ERROR] = error
        try:
            await self.app(scope, receive, send)
        finally:
            scope.pop(ERROR, None)
