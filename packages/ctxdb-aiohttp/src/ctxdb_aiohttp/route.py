"""`Route`: what is to be called for a request inside of the outermost middleware, found out once for each route."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

__all__ = ["Route", "find_route"]


@dataclass(frozen=True, slots=True)
class Route:
    """The handler of a route in its middlewares."""

    call: Handler
    """What to call: the handler of the route itself, where no middleware of the application is around it."""
    is_alone: bool
    """Whether no middleware is around the handler: then no code can try again, answer errors, or give up on it."""
    is_quiet: bool
    """Whether the application has no handlers of its own for ``on_response_prepare``, which could use the database."""


def find_route(
    handler: Any, request: web.Request, signal_handler: object, commit_points: tuple[Middleware, Middleware]
) -> Route:
    """Return the route of `handler`, and remember it beside the handler, which aiohttp makes once for each route.

    Args:
        handler: what the outermost middleware is to call, as aiohttp wraps one middleware into the other.
        request: a request for it.
        signal_handler: the adapter's own for ``on_response_prepare``.
        commit_points: the inner middleware next to the handler, and that at a place which the user has chosen.
    """
    match = request.match_info
    is_quiet = all(other is signal_handler for app in match.apps for other in app.on_response_prepare)
    # The handler for an unknown path is made anew each time, and its error commits nothing.
    if type(handler) is not partial or handler is match.handler or match.http_exception is not None:
        return Route(handler, is_alone=False, is_quiet=is_quiet)
    middlewares = _middlewares_of(handler, match.handler)
    if middlewares is not None and all(middleware in commit_points for middleware in middlewares):
        route = Route(match.handler, is_alone=True, is_quiet=is_quiet)
    else:
        call = _with_commit_point(handler, match.handler, middlewares or [], commit_points)
        route = Route(call, is_alone=False, is_quiet=is_quiet)
    handler.ctxdb_route = route  # type: ignore[attr-defined]  # partials take attributes
    return route


def _middlewares_of(handler: Any, route_handler: Handler) -> list[Middleware] | None:
    """Return the middlewares between `handler` and `route_handler`, the outermost first.

    Returns:
        ``None`` if `handler` is made otherwise than by aiohttp today: old middlewares cannot be seen through.
    """
    middlewares: list[Middleware] = []
    while handler != route_handler:
        if type(handler) is not partial or handler.args or handler.keywords.keys() != {"handler"}:
            return None
        middlewares.append(handler.func)
        handler = handler.keywords["handler"]
    return middlewares


def _with_commit_point(
    handler: Handler,
    route_handler: Handler,
    middlewares: list[Middleware],
    commit_points: tuple[Middleware, Middleware],
) -> Handler:
    """Return `handler` with one more commit point next to the handler of the route, if it needs one there.

    Middlewares of a sub-application are further in than all of those that the application around it has, and it has a
    list of its own, which is frozen. So are middlewares that were added after `setup` had taken its places. A place
    that the user has chosen is kept.
    """
    commit_point, _ = commit_points
    points = [middleware for middleware in middlewares if middleware in commit_points]
    if points[-1:] != [commit_point] or middlewares[-1] is commit_point:
        return handler
    for middleware in (commit_point, *reversed(middlewares)):
        route_handler = update_wrapper(partial(middleware, handler=route_handler), route_handler)
    return route_handler
