"""Where the transactions of streamed responses end, if a middleware may hold the start of one back.

The search for such middlewares leads through objects that others wrote, and changes some of them. So it enters only
what it knows: the classes of Starlette and FastAPI, and middlewares that an application, a router, a route or a mount
was given as such. Anything else, above all an application that is mounted, may keep in ``app`` what it likes: a WSGI
application, for instance, or one of ASGI 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.middleware.httpsredirect import HTTPSRedirectMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount, Router

from ctxdb_core.asgi import ASGIApp, ASGIHTTPDBSessionMiddleware, ASGIStreamBoundary

__all__ = ["mark_stream_boundaries"]

# Middlewares that send the start of a response on at once.
_PASSING_ON = (
    ASGIHTTPDBSessionMiddleware,
    ASGIStreamBoundary,
    CORSMiddleware,
    ExceptionMiddleware,
    HTTPSRedirectMiddleware,
    ServerErrorMiddleware,
    TrustedHostMiddleware,
)

# More middlewares of this kind, by their names, as not every version of the frameworks has them.
_PASSING_ON_BY_NAME = frozenset(
    {
        ("ctxdb_core.asgi.request_settings", "RequestSettings"),
        ("fastapi.middleware.asyncexitstack", "AsyncExitStackMiddleware"),
        ("fastapi.telemetry._asgi", "ExceptionTelemetryMiddleware"),
        ("starlette.middleware.body_limit", "RequestBodyLimitMiddleware"),
    }
)

# Where the middlewares of the frameworks are, and the one among them whose `app` is no ASGI application.
_MIDDLEWARE_PACKAGES = ("ctxdb_core.asgi.", "fastapi.middleware.", "fastapi.telemetry.", "starlette.middleware.")
_WSGI_MODULE = "starlette.middleware.wsgi"

# No stack of middlewares is so deep, but an object that makes its attributes up may look like an endless stack.
_MAX_DEPTH = 100

IsBottom = Callable[[Any], bool]
"""Tells whether an object is beneath all middlewares of a stack, each of which was given as a middleware."""


def mark_stream_boundaries(app: Any, tell: Callable[[], None]) -> None:
    """Put an `ASGIStreamBoundary` beneath each stack of middlewares in `app` of which one may hold a start back.

    A stack of middlewares lies around the routes of an application, of each application that is mounted in it, and
    around single routes and mounts. A stack is followed as long as each middleware keeps the one beneath it in ``app``,
    which is a convention.

    Args:
        app: what a `DBSessionMiddleware` was given.
        tell: called for each boundary, which may be found much later: a mounted application makes its stack of
            middlewares at its first request.
    """
    # Nothing but `Starlette.build_middleware_stack` makes an `ExceptionMiddleware`, and above it are the middlewares
    # that the application was given.
    _Search(tell).enter(app, lambda each: isinstance(each, ExceptionMiddleware))


class _Search:
    """One search, beginning at one middleware."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        # An application may be mounted in itself.
        self._seen: set[int] = set()

    def enter(self, app: Any, is_bottom: IsBottom) -> None:
        """Mark the stack of middlewares that begins with `app`, and what is beneath it.

        Args:
            app: the outermost middleware, or what is beneath all of them if there is none.
            is_bottom: whether an object is beneath all that are known to be middlewares.
        """
        stack, beneath = _stack_of(app, is_bottom)
        holding = [each for each in stack if not _passes_on(each)]
        if holding:
            self._put_boundary(holding[-1])
        if any(isinstance(each, ASGIStreamBoundary) for each in stack):
            self._tell()
        if isinstance(beneath, Starlette):
            self._enter_application(beneath)
        elif isinstance(beneath, Router):
            self._enter_router(beneath)
        elif is_bottom(beneath):
            # Starlette's handling of exceptions, whose responses need no boundary, or an application that is mounted.
            self.enter(beneath, _is_nothing)

    def _put_boundary(self, middleware: Any) -> None:
        if not isinstance(middleware.app, ASGIStreamBoundary):
            # A middleware may be a frozen object.
            with suppress(AttributeError):
                middleware.app = ASGIStreamBoundary(middleware.app)
        if isinstance(middleware.app, ASGIStreamBoundary):
            self._tell()

    def _enter_application(self, app: Starlette) -> None:
        def mark(stack: Any) -> None:
            self.enter(stack, lambda each: isinstance(each, ExceptionMiddleware) or each is app.router)

        if app.middleware_stack is not None:
            mark(app.middleware_stack)
            return
        # It is built at the first request: until then, the application may be given more middlewares.
        build: Callable[[], Any] = app.build_middleware_stack

        def build_and_mark() -> ASGIApp:
            stack: ASGIApp = build()
            mark(stack)
            return stack

        app.build_middleware_stack = build_and_mark  # type: ignore[method-assign]  # on this one object only

    def _enter_router(self, router: Router) -> None:
        # By identity, as routers with equal routes are equal.
        if id(router) in self._seen:
            return
        self._seen.add(id(router))
        # A router with middlewares of its own keeps them above its method `app`.
        self.enter(getattr(router, "middleware_stack", None), lambda each: isinstance(each, MethodType))
        self._enter_routes(router.routes)

    def _enter_routes(self, routes: Iterable[Any]) -> None:
        for route in routes:
            # FastAPI keeps a router that was included in another one as it is.
            included = getattr(route, "original_router", None)
            if isinstance(included, Router):
                self._enter_router(included)
            elif isinstance(route, Mount):
                self.enter(route.app, _is(getattr(route, "_base_app", route.app)))
            elif hasattr(route, "endpoint"):
                self.enter(getattr(route, "app", None), _is(route.endpoint))
            else:
                # A host, for instance, has no middlewares of its own.
                self.enter(getattr(route, "app", None), _is_nothing)


def _stack_of(app: Any, is_bottom: IsBottom) -> tuple[list[Any], Any]:
    """Return the middlewares from `app` downwards that may be entered, and what is beneath them.

    All of them may be entered if `is_bottom` recognises the object beneath them. Otherwise, those of the frameworks
    may, down to the first foreign one.
    """
    stack, beneath = _follow(app, lambda each: not is_bottom(each) and not isinstance(each, (Starlette, Router)))
    return (stack, beneath) if is_bottom(beneath) else _follow(app, _is_of_a_framework)


def _follow(app: Any, may_enter: Callable[[Any], bool]) -> tuple[list[Any], Any]:
    stack: list[Any] = []
    while may_enter(app) and hasattr(app, "app") and len(stack) < _MAX_DEPTH:
        stack.append(app)
        app = app.app
    return stack, app


def _is_of_a_framework(middleware: Any) -> bool:
    """Return whether `middleware` is one of Starlette, FastAPI or ctxdb, or of a class that is derived from one."""
    return any(
        kind in _PASSING_ON or (kind.__module__.startswith(_MIDDLEWARE_PACKAGES) and kind.__module__ != _WSGI_MODULE)
        for kind in type(middleware).__mro__
    )


def _passes_on(middleware: Any) -> bool:
    kind = type(middleware)
    return isinstance(middleware, _PASSING_ON) or (kind.__module__, kind.__qualname__) in _PASSING_ON_BY_NAME


def _is(bottom: Any) -> IsBottom:
    # A function is as good a bottom: it is an endpoint, or a middleware that hides what is beneath it.
    return lambda each: each is bottom or isinstance(each, FunctionType)


def _is_nothing(each: Any) -> bool:
    return False
