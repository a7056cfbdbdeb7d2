"""`enclose`: the unit of work around an application as a whole, where it has no middlewares but those of ctxdb."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from types import MethodType
from typing import Any, TypeAlias

from aiohttp import web
from aiohttp.typedefs import Middleware

from ctxdb_aiohttp.route import Route

__all__ = ["enclose"]

_WITHOUT_SUBAPPLICATIONS = (web.PlainResource, web.DynamicResource, web.StaticResource)
"""The resources of aiohttp that lead to handlers of the application itself."""

_Handle: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def enclose(app: web.Application, outer: Middleware, own: tuple[object, ...]) -> None:
    """Have `outer` called around all that `app` does for a request, if it has no other middleware to call.

    What aiohttp does to call the middlewares of an application takes longer than all that ctxdb does for a request
    without database use. So it is told that there are none, where it has only those of ctxdb: `outer` is called with
    the application in the place of a route's handler, and a commit point is of no use where no middleware could learn
    of an error. aiohttp has no public names for this. If a later aiohttp has other names, the application's middlewares
    are called as before. Should they be called inside of `outer` as well, nothing is done twice: a unit of work that is
    opened inside of another one of the same request joins that.

    Whether there are other middlewares, signal handlers and sub-applications, which may have some, is seen by the first
    request: until then, each handler of the start-up may add one.

    Args:
        app: the application, which is being started.
        outer: the outer middleware of ctxdb.
        own: all middlewares and signal handlers of ctxdb.
    """
    handle: _Handle = app._handle  # noqa: SLF001 - see above
    if not (_is_of_aiohttp(handle) and hasattr(app, "_run_middlewares")):
        return
    inside: Any = partial(handle)
    inside.ctxdb_route = Route(handle, is_alone=True, is_quiet=True)
    # ``None`` before the first request.
    is_enclosed: bool | None = None

    def handle_request(request: web.Request) -> Awaitable[web.StreamResponse]:
        nonlocal is_enclosed
        if is_enclosed is None:
            is_enclosed = _has_nothing_else(app, own)
            if is_enclosed:
                app._run_middlewares = False  # noqa: SLF001 - see above
        return outer(request, inside) if is_enclosed else handle(request)

    # In Python's development mode, aiohttp warns of attributes that are set on an application.
    object.__setattr__(app, "_handle", handle_request)


def _is_of_aiohttp(handle: Any) -> bool:
    """Return whether `handle` is aiohttp's own method: what Sentry puts in its place has to see failed commits."""
    return type(handle) is MethodType and handle.__func__.__module__ == web.Application.__module__


def _has_nothing_else(app: web.Application, own: tuple[object, ...]) -> bool:
    others: list[object] = [*app.middlewares, *app.on_response_prepare]
    # Only routers and resources that are known to lead to no sub-application will do. Those of other classes, also of
    # derived ones, may lead to applications with middlewares of their own.
    return (
        all(each in own for each in others)
        and type(app.router) is web.UrlDispatcher
        and all(type(resource) in _WITHOUT_SUBAPPLICATIONS for resource in app.router.resources())
    )
