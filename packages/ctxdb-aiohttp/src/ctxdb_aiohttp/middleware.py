"""The two middlewares that `setup` puts around those of an application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from ctxdb_aiohttp.exchange import UNSTARTED, Exchange, Opened, exchange_of
from ctxdb_aiohttp.handler_response import HandlerResponse
from ctxdb_aiohttp.late_response import LateResponse
from ctxdb_aiohttp.response import check_response, is_complete
from ctxdb_aiohttp.route import Route, find_route
from ctxdb_aiohttp.signal import note_response
from ctxdb_aiohttp.writer import start_over
from ctxdb_core.adapters import (
    FINISHING,
    SAFE_METHODS,
    BeforeCommit,
    ReadsFrom,
    RequestPolicy,
    RequestUnit,
    begin,
    finalize,
    follow_calls,
)

__all__ = ["Deadline", "commit_point", "placed_commit_point", "unit_of_work"]

Deadline: TypeAlias = Callable[[web.Request], float | None]
"""Given a request: when its last statement has to be done, on the event loop's clock."""


def unit_of_work(
    before_commit: BeforeCommit | None,
    commits: RequestPolicy,
    statement_timeout: float | None,
    deadline: Deadline | None,
    reads_from: ReadsFrom | None,
) -> Middleware:
    """Return the outermost middleware, which gives each request a unit of work.

    Args:
        before_commit: awaited with each session that is about to be committed.
        commits: given the status of the response and the request: whether to commit.
        statement_timeout: how many seconds each statement of a request may take.
        deadline: when its last one has to be done.
        reads_from: maps a database to the one that requests by safe methods read from in its place.
    """
    has_options = not (statement_timeout is None and deadline is None and reads_from is None)

    def begin_with_options(request: web.Request) -> RequestUnit | None:
        return begin(
            before_commit=before_commit,
            statement_timeout=statement_timeout,
            deadline=None if deadline is None else deadline(request),
            reads_from=None if reads_from is None or _may_write(request) else reads_from,
        )

    @web.middleware
    async def open_unit(request: web.Request, handler: Handler) -> web.StreamResponse:
        writer: Any = request.writer
        outer = None if getattr(writer, "ctxdb_exchange", None) is None else exchange_of(request)
        if outer is not None:
            if not outer.unit.closed and not _is_left_to_aiohttp(outer):
                return await handler(request)
            # A middleware outside of this one tries again.
            await outer.end(commit=False)
        unit = begin_with_options(request) if has_options else begin(before_commit=before_commit)
        if unit is None:
            return await handler(request)
        unit.origin = request
        opened: Opened = (unit, commits)
        writer.ctxdb_exchange = opened
        try:
            try:
                route: Route = handler.ctxdb_route  # type: ignore[attr-defined]  # `find_route` has put it there
            except AttributeError:
                route = find_route(handler, request, note_response, (commit_point, placed_commit_point))
            if not route.is_alone:
                follow_calls(unit)
            response = await route.call(request)
        except web.HTTPException as exc:
            exchange = _exchange_with(unit, commits, request)
            # A response like any other, unless one has begun.
            if exchange.phase in UNSTARTED:
                await _end(exchange, request, exc, route)
            else:
                await _fail(exchange, request, exc, route)
            raise
        except BaseException as exc:
            await _fail(_exchange_with(unit, commits, request), request, exc, route)
            raise
        # If the writer leads to something else, more was done than to handle the request.
        if writer.ctxdb_exchange is opened and route.is_quiet and is_complete(response):
            if unit.finish_idle():
                writer.ctxdb_exchange = None
                unit.leave()
                return response
            if route.is_alone:
                await _end_at_once(unit, commits, request, response, route)
                return response
        await _end(_exchange_with(unit, commits, request), request, response, route)
        return response

    return open_unit


def _may_write(request: web.Request) -> bool:
    """Return whether a request may change something: by its method, or as the handshake of a websocket."""
    asks_for_websocket = request.headers.get(hdrs.UPGRADE, "").strip().lower() == "websocket"
    return asks_for_websocket or request.method not in SAFE_METHODS


def _exchange_with(unit: RequestUnit, commits: RequestPolicy, request: web.Request) -> Exchange:
    """Return the exchange of `request` that has `unit`."""
    exchange = exchange_of(request)
    if exchange is None or exchange.unit is not unit:
        # The unit was ended further in or further out, where a middleware has tried again meanwhile.
        return Exchange(unit, commits, request.writer)
    return exchange


def _is_left_to_aiohttp(exchange: Exchange) -> bool:
    return exchange.watched is not None and isinstance(exchange.watched.delivery, LateResponse)


async def _end_at_once(
    unit: RequestUnit, commits: RequestPolicy, request: web.Request, response: web.StreamResponse, route: Route
) -> None:
    """End the unit of work of a request that needs no exchange: `response` is whole, and no middleware has its say.

    Raises:
        BaseException: why it could not be ended; the response must not be sent.
    """
    writer: Any = request.writer
    try:
        commit = bool(unit.sessions or unit.hooks) and commits(response.status, request)
        if commit:
            check_response(response)
        writer.ctxdb_exchange = None
        if not commit:
            # The calls of other tasks may end before the roll-back; the end of the unit stops them.
            await finalize(unit, commit=False, last=False)
        await finalize(unit, commit=commit)
    except BaseException as exc:
        exchange = _exchange_with(unit, commits, request)
        exchange.refuse(response, exc)
        await _fail(exchange, request, exc, route)
        raise


async def _end(exchange: Exchange, request: web.Request, response: object, route: Route) -> None:
    """End the transactions as `response` demands, which the middlewares have made of it all.

    Raises:
        BaseException: why they could not be ended; the response must not be sent.
    """
    try:
        if exchange.phase in UNSTARTED:
            # A response that is whole is sent when all is over. Its commit and the end of the unit are one step: what
            # other tasks of the request do behind the commit cannot make an error of the response.
            is_last = route.is_quiet and is_complete(response)
            await exchange.settle(request, response, last=is_last)
            if not is_last:
                exchange.watch(LateResponse(exchange, request))
        elif exchange.watched is not None and isinstance(exchange.watched.delivery, HandlerResponse):
            await exchange.watched.delivery.finish(response)
        else:
            await exchange.end(commit=exchange.phase in FINISHING)
    except BaseException as exc:
        await _fail(exchange, request, exc, route)
        raise


async def _fail(exchange: Exchange, request: web.Request, error: BaseException, route: Route) -> None:
    """Roll back for an error that no middleware has answered."""
    if exchange.phase in UNSTARTED or not exchange.writer.output_size:
        # A response may have been prepared, of which nothing has left aiohttp's buffer.
        start_over(exchange.writer)
    is_answered = isinstance(error, Exception) and exchange.phase in UNSTARTED
    if is_answered and not route.is_quiet and not exchange.unit.closed:
        await exchange.roll_back(error)
        # aiohttp answers the error, and the application's signal handlers may use the database then.
        exchange.watch(LateResponse(exchange, request))
    else:
        await exchange.end(commit=False, error=error)


def _commit_point() -> Middleware:
    @web.middleware
    async def commit_success(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = exchange_of(request)
        if exchange is None:
            return await handler(request)
        if exchange.attempts:
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
            await exchange.commit_success(request, response)
        finally:
            exchange.attempts += 1
        return response

    return commit_success


commit_point: Middleware = _commit_point()
"""Commits a success where the handler returns it, so that all other middlewares learn of a commit that fails."""

placed_commit_point: Middleware = _commit_point()
"""The same at a place that the user has chosen: it stays there."""
