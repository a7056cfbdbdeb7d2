"""`setup`: the middlewares, signal handlers and clean-up that an application gets, and their places."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from ctxdb_aiohttp.enclosure import enclose
from ctxdb_aiohttp.errors import ApplicationFrozenError
from ctxdb_aiohttp.middleware import Deadline, commit_point, placed_commit_point, unit_of_work
from ctxdb_aiohttp.signal import note_response
from ctxdb_core import ArgumentTypeError, ArgumentValueError, DBConnect, commit_below_400
from ctxdb_core.adapters import (
    BeforeCommit,
    CommitPolicy,
    ReadsFrom,
    RequestPolicy,
    check_function,
    check_reads_from,
    check_statement_timeout,
    close_all,
    type_of,
    with_request,
)

__all__ = ["DATABASES", "setup"]

DATABASES: web.AppKey[tuple[DBConnect, ...]] = web.AppKey("DATABASES", tuple[DBConnect, ...])
"""Where an application keeps the databases that `setup` was given: ``app[DATABASES]``."""


def setup(
    app: web.Application,
    *dbs: DBConnect,
    before_commit: BeforeCommit | None = None,
    commit_policy: CommitPolicy | RequestPolicy = commit_below_400,
    position: int | None = None,
    statement_timeout: float | None = None,
    deadline: Deadline | None = None,
    reads_from: ReadsFrom | None = None,
) -> None:
    """Give each request of `app` and of its sub-applications a unit of work.

    It is committed or rolled back before the first byte of the response leaves. What is done in it afterwards, by a
    handler that streams or by the body of a response, is committed at its end.

    Two middlewares are put around those of `app`, whether these are added before or after this call. The outer one
    opens the unit of work, and decides by the status that the response has in the end. The inner one commits a success
    where the handler returns it: if that fails, the error goes through the middlewares of `app`, and through those of
    its sub-applications, as if the handler had raised it. What they make of a committed success later does not undo it.

    A request that passes through several such pairs, of an application and its sub-application for instance, has one
    unit of work, opened and ended by the outermost.

    Args:
        app: the application, or a sub-application. In one that is going to be a sub-application, the outer middleware
            stays where this call puts it: around those that are there.
        *dbs: closed when the application is cleaned up, also if it fails to start (which aiohttp does not tell
            sub-applications); every one is, also if closing another one fails. A unit of work takes whatever
            `DBConnect` its code asks for: they need not be named here.
        before_commit: awaited with each session that is about to be committed.
        commit_policy: given the status of the response, and the request if it takes two arguments: whether to commit.
        position: the inner middleware's place among those of `app`; by default next to the handler. With 0, all
            middlewares have had their say before anything is committed, and none learns of a commit that fails.
        statement_timeout: how many seconds each statement of a request may take; see
            `ctxdb_core.set_statement_timeout`.
        deadline: given a request: when its last statement has to be done, on the event loop's clock; ``None`` for no
            deadline. Streamed bodies are part of the request.
        reads_from: for databases, the one whose sessions requests by GET, HEAD, OPTIONS and TRACE get in their place:
            ``{master: replica}``. A websocket is opened by a GET, and is left alone.

    Raises:
        ApplicationFrozenError: `app` has been started, or added to another one.
        TypeError: `app` is no application, one of `dbs` is no `DBConnect`, `reads_from` is no mapping of them,
            `commit_policy` is no policy, `before_commit` or `deadline` no function, or `position` or
            `statement_timeout` no number.
        ValueError: `position` is negative, or `statement_timeout` not positive.
    """
    if not isinstance(app, web.Application):
        raise ArgumentTypeError(f"setup() takes a web.Application first, not {type_of(app)}: `setup(app, db)`.")
    for db in dbs:
        if not isinstance(db, DBConnect):
            raise ArgumentTypeError(
                f"setup() takes the application's `DBConnect`s, not {type_of(db)}: make one of a URL by "
                "`DBConnect.from_url(url)`, or of an engine's creator by `DBConnect(engine_creator, host=...)`."
            )
    if position is not None and not isinstance(position, int):
        raise ArgumentTypeError(f"position={position!r}: count the middlewares from the outermost, which is 0.")
    if position is not None and position < 0:
        raise ArgumentValueError(
            f"position={position} is negative: count the middlewares from the outermost, which is 0."
        )
    for name, function in (("`before_commit`", before_commit), ("`deadline`", deadline)):
        if function is not None:
            check_function(function, name)
    check_statement_timeout(statement_timeout)
    if app.on_startup.frozen:
        raise ApplicationFrozenError
    outer = unit_of_work(
        before_commit, with_request(commit_policy), statement_timeout, deadline, check_reads_from(reads_from)
    )
    inner = commit_point if position is None else placed_commit_point

    async def close_databases(app: web.Application) -> None:
        await close_all(*dbs)

    async def close_databases_in_any_case(app: web.Application) -> AsyncIterator[None]:
        yield
        await close_databases(app)

    def take_places() -> None:
        app.middlewares.insert(0, outer)
        app.middlewares.insert(len(app.middlewares) if position is None else position + 1, inner)
        app.on_cleanup.append(close_databases)

    async def take_places_again(app: web.Application) -> None:
        # Middlewares and handlers may have been added meanwhile; not to a sub-application, whose lists are frozen.
        if not app.middlewares.frozen:
            app.middlewares.remove(outer)
            app.middlewares.remove(inner)
            app.on_cleanup.remove(close_databases)
            take_places()
            if deadline is None:
                # A deadline may depend on the route, which is found further in than the application begins.
                enclose(app, outer, own=(outer, inner, note_response))

    take_places()
    app.on_startup.append(take_places_again)
    app.on_response_prepare.insert(0, note_response)
    # Only contexts are cleaned up where the start has failed. They come first, and the signal is for what its other
    # handlers open again.
    app.cleanup_ctx.insert(0, close_databases_in_any_case)
    app[DATABASES] = (*app.get(DATABASES, ()), *dbs)
