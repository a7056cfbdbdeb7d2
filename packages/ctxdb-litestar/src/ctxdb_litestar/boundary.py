"""Where the transactions of streamed and of cached responses end, if a middleware may hold their start back."""

from __future__ import annotations

from types import MethodType
from typing import Any

from litestar import Litestar
from litestar.handlers import BaseRouteHandler

from ctxdb_core.asgi import ASGIStreamBoundary, Message
from ctxdb_litestar.commit_errors import MountMiddleware

__all__ = ["add_middleware", "mark_stream_boundary"]

# One middleware, the handling of exceptions, and the method of the route.
_MIN_DEPTH = 3

# No stack of middlewares is so deep, but an object that makes up its attributes may look like an endless one.
_MAX_DEPTH = 100


def mark_stream_boundary(handler: BaseRouteHandler, app: Litestar) -> bool:
    """Have an `ASGIStreamBoundary` put beneath the middlewares of `handler`, if it has any, and return whether it has.

    The compression, for instance, waits for the first chunk of a stream before it sends the start on.
    """
    others = [each for each in handler.resolve_middleware() if each not in (MountMiddleware, _add_boundary)]
    if not others and not app.compression_config:
        return False
    add_middleware(handler, _add_boundary)
    return True


def add_middleware(handler: BaseRouteHandler, middleware: Any) -> None:
    """Give `handler` one more middleware, further in than its others, if it has not got it yet."""
    if middleware not in handler.resolve_middleware():
        handler.middleware = [*(handler.middleware or ()), middleware]


def _add_boundary(app: Any) -> Any:
    """Put the boundary beneath the middlewares that Litestar adds: they are further in than any other one.

    Each of them keeps what is beneath it in ``app``. The innermost is Litestar's handling of exceptions, whose
    responses are to pass through the boundary, too: so it goes above that one.
    """
    stack = [app]
    while hasattr(stack[-1], "app") and len(stack) < _MAX_DEPTH:
        stack.append(stack[-1].app)
    # Beneath them all is a method of the route. Where it is not found, a middleware keeps what is beneath it elsewhere.
    if len(stack) < _MIN_DEPTH or not isinstance(stack[-1], MethodType):
        return ASGIStreamBoundary(app, is_kept=_is_cached)
    *_, above, exception_handling, _ = stack
    above.app = ASGIStreamBoundary(exception_handling, is_kept=_is_cached)
    return app


def _is_cached(scope: Any, start: Message) -> bool:
    # As Litestar's cache asks: it keeps a response before that has passed the middlewares further out.
    # The handler of a mounted application has no cache.
    if not getattr(scope["route_handler"], "cache", False):
        return False
    is_kept: bool = scope["litestar_app"].response_cache_config.cache_response_filter(scope, start["status"])
    return is_kept
