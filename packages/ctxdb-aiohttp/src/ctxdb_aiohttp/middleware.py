"""The two middlewares that `setup` puts around those of an application."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ctxdb_aiohttp.exchange import Exchange, current_exchange
from ctxdb_core import BeforeCommit, CommitPolicy, begin

__all__ = ["Deadline", "commit_point", "unit_of_work"]


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
        exchange = Exchange(unit, commit_policy, request)
        try:
            try:
                response = await handler(request)
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


@web.middleware
async def commit_point(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Commit a success where the handler returns it, so that the other middlewares learn of a commit that fails."""
    exchange = current_exchange.get(None)
    if exchange is None or exchange.writer is not request.writer:
        return await handler(request)
    if exchange.attempted:
        await exchange.begin_attempt()
    try:
        try:
            response = await handler(request)
        except web.HTTPException as exc:
            await exchange.commit_success(request, exc)
            raise
        if exchange.has_work:
            await exchange.commit_success(request, response)
    finally:
        exchange.attempted = True
    return response
