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

_Handle: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def enclose(app: web.Application, outer: Middleware, own: tuple[object, ...]) -> None:
    """Have `outer` called around all that `app` does for a request, if it has no other middleware to call.

    What aiohttp does to call the middlewares of an application takes longer than all that ctxdb does for a request
    without database use. So it is told that there are none, where it has only those of ctxdb: `outer` is called with
    the application in the place of a route's handler, and a commit point is of no use where no middleware could learn
    of an error. aiohttp has no public names for this. Where it has others one day, its middlewares are called as ever,
    also if they are called beside `outer`: the inner one of two units of work joins the outer one.

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
    return (
        all(each in own for each in others)
        # A sub-application is what the resource tells of that aiohttp makes for it.
        and not any("app" in resource.get_info() for resource in app.router.resources())
    )
