"""The two middlewares that `setup` puts around those of an application."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, TypeAlias

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ctxdb_aiohttp.exchange import Exchange, current_exchange
from ctxdb_core import BeforeCommit, CommitPolicy, begin
from ctxdb_core.adapters import follow_calls

__all__ = ["Deadline", "commit_point", "placed_commit_point", "unit_of_work"]


Deadline: TypeAlias = Callable[[web.Request], float | None]
"""Given a request: when its last statement has to be done, on the event loop's clock."""


def unit_of_work(
    before_commit: BeforeCommit | None,
    commit_policy: CommitPolicy,
    statement_timeout: float | None,
    deadline: Deadline | None,
) -> Middleware:
    """Return the outermost middleware, which gives each request a unit of work.

    Args:
        before_commit: awaited with each session that is about to be committed.
        commit_policy: given the status of the response: whether to commit.
        statement_timeout: how many seconds each statement of a request may take.
        deadline: when its last one has to be done.
    """

    @web.middleware
    async def open_unit(request: web.Request, handler: Handler) -> web.StreamResponse:
        outer = current_exchange.get(None)
        if outer is not None and outer.writer is request.writer:
            if not outer.is_over:
                return await handler(request)
            # A middleware outside of this one tries again.
            await outer.end(commit=False)
        unit = begin(
            before_commit=before_commit,
            statement_timeout=statement_timeout,
            deadline=None if deadline is None else deadline(request),
        )
        if unit is None:
            return await handler(request)
        follow_calls(unit)
        exchange = Exchange(unit, commit_policy, request)
        try:
            try:
                # aiohttp makes these once for each route.
                inner = handler.ctxdb_inner  # type: ignore[attr-defined]
            except AttributeError:
                inner = _note_inner(handler, request)
            try:
                response = await (inner or handler)(request)
            except web.HTTPException as exc:
                if not exchange.started:
                    await exchange.respond(request, exc)
                raise
            if not exchange.end_idle(response):
                await exchange.respond(request, response)
        except BaseException as exc:
            if not exchange.is_over:
                await exchange.fail(exc)
            raise
        return response

    return open_unit


def _commit_point() -> Middleware:
    @web.middleware
    async def commit_success(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = current_exchange.get(None)
        if exchange is None or exchange.writer is not request.writer:
            return await handler(request)
        if exchange.attempted:
            await exchange.begin_attempt()
        calls = follow_calls(exchange.unit)
        call = calls.begin()
        try:
            try:
                try:
                    response = await handler(request)
                finally:
                    calls.end(call)
            except web.HTTPException as exc:
                await exchange.commit_success(request, exc)
                raise
            if exchange.has_work:
                await exchange.commit_success(request, response)
        finally:
            exchange.attempted = True
        return response

    return commit_success


commit_point = _commit_point()
"""Commits a success where the handler returns it, so that all other middlewares learn of a commit that fails."""

placed_commit_point = _commit_point()
"""The same at a place that the user has chosen: it stays there."""


def _note_inner(handler: Any, request: web.Request) -> Handler | None:
    """Return what to call instead of `handler`, if anything, and remember that beside it."""
    # The one for an unknown path is made anew each time, and its error commits nothing.
    if type(handler) is not partial or request.match_info.http_exception is not None:
        return None
    handler.ctxdb_inner = inner = _with_commit_point(handler, request.match_info.handler)  # type: ignore[attr-defined]
    return inner


def _with_commit_point(handler: Handler, route_handler: Handler) -> Handler | None:
    """Return `handler` with one more commit point next to the handler of the route.

    Middlewares of a sub-application are further in than all of those that the application around it has, and it has a
    list of its own, which is frozen. So are those that were added to ours when it had taken its places.

    Args:
        handler: the handler of the route in its middlewares, as aiohttp wraps one into the other.
        route_handler: the handler of the route.

    Returns:
        ``None`` where there is one already, where the user has chosen a place, or if `handler` is made otherwise: old
        middlewares cannot be seen through.
    """
    middlewares: list[Middleware] = []
    each: Any = handler
    while each != route_handler:
        if type(each) is not partial or each.args or each.keywords.keys() != {"handler"}:
            return None
        middlewares.append(each.func)
        each = each.keywords["handler"]
    points = [middleware for middleware in middlewares if middleware in (commit_point, placed_commit_point)]
    if points[-1:] != [commit_point] or middlewares[-1] is commit_point:
        return None
    inner = route_handler
    for middleware in (commit_point, *reversed(middlewares)):
        inner = update_wrapper(partial(middleware, handler=inner), inner)
    return inner
