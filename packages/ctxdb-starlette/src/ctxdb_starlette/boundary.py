"""Where the transactions of streamed responses end, if a middleware may hold the start of one back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.middleware.httpsredirect import HTTPSRedirectMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Router

from ctxdb_core.asgi import ASGIApp, ASGIHTTPDBSessionMiddleware, ASGIStreamBoundary

__all__ = ["mark_stream_boundaries"]

# Middlewares that send the start of a response on at once.
_PASSING_ON = (
    ASGIHTTPDBSessionMiddleware,
    CORSMiddleware,
    ExceptionMiddleware,
    HTTPSRedirectMiddleware,
    ServerErrorMiddleware,
    TrustedHostMiddleware,
)


def mark_stream_boundaries(app: Any) -> None:
    """Put an `ASGIStreamBoundary` beneath each stack of middlewares in `app` of which one may hold a start back.

    There is one around the routes of an application, of each that is mounted in it, and around single routes and
    mounts. They are followed as far as each middleware keeps what is beneath it in ``app``, which is a convention.
    """
    stack: list[Any] = []
    while not isinstance(app, (ASGIStreamBoundary, Starlette, Router)) and (inner := getattr(app, "app", None)):
        stack.append(app)
        app = inner
    if isinstance(app, ASGIStreamBoundary):
        return
    if not all(isinstance(each, _PASSING_ON) for each in stack):
        # Above Starlette's handling of exceptions, whose responses need no other treatment.
        above = [each for each in stack if not isinstance(each, ExceptionMiddleware)]
        lowest = next(each for each in reversed(above) if not isinstance(each, _PASSING_ON))
        lowest.app = ASGIStreamBoundary(lowest.app)
    if isinstance(app, Starlette):
        _mark_when_built(app)
    elif isinstance(app, Router):
        for route in app.routes:
            mark_stream_boundaries(getattr(route, "app", None))


def _mark_when_built(app: Starlette) -> None:
    if app.middleware_stack is not None:
        mark_stream_boundaries(app.middleware_stack)
        return
    # It is built at the first request: until then, the application may be given more middlewares.
    build: Callable[[], Any] = app.build_middleware_stack

    def build_and_mark() -> ASGIApp:
        stack: ASGIApp = build()
        mark_stream_boundaries(stack)
        return stack

    app.build_middleware_stack = build_and_mark  # type: ignore[method-assign]  # on this one object only
