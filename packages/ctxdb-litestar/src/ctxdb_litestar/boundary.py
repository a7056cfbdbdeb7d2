"""Where the transactions of streamed and of cached responses end, if a middleware may hold their start back."""

from __future__ import annotations

from typing import Any

from litestar import Litestar
from litestar.handlers import BaseRouteHandler

from ctxdb_core.asgi import ASGIStreamBoundary, Message
from ctxdb_litestar.middleware import CommitErrorMiddleware

__all__ = ["mark_stream_boundary"]


def mark_stream_boundary(handler: BaseRouteHandler, app: Litestar) -> None:
    """Have an `ASGIStreamBoundary` put beneath the middlewares of `handler`, if it has any but those that pass all on.

    The compression, for instance, waits for the first chunk of a stream before it sends the start on.
    """
    others = [each for each in handler.resolve_middleware() if each is not CommitErrorMiddleware]
    if _add_boundary not in others and (others or app.compression_config):
        handler.middleware = [*(handler.middleware or ()), _add_boundary]


def _add_boundary(app: Any) -> Any:
    """Put the boundary beneath the middlewares that are Litestar's own: they are further in than any other one.

    Each of them keeps what is beneath it in ``app``; the innermost is the handling of exceptions.
    """
    above, exception_handling = None, app
    while hasattr(exception_handling.app, "app"):
        above, exception_handling = exception_handling, exception_handling.app
    boundary = ASGIStreamBoundary(exception_handling, is_kept=_is_cached)
    if above is None:
        return boundary
    above.app = boundary
    return app


def _is_cached(scope: Any, start: Message) -> bool:
    # As Litestar's cache asks: it keeps a response before that has passed the middlewares further out.
    # The handler of a mounted application has no cache.
    if not getattr(scope["route_handler"], "cache", False):
        return False
    is_kept: bool = scope["litestar_app"].response_cache_config.cache_response_filter(scope, start["status"])
    return is_kept
