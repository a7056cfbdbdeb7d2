"""The life of a unit of work: `begin` and `finalize` for adapters, context managers and functions for everyone else."""

from __future__ import annotations

import asyncio
import inspect
from asyncio import _get_running_loop  # for implementers of event loops, and what costs the least
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

from ctxdb_core._databases.arguments import check_function
from ctxdb_core._shield import run_to_completion
from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.generator_blocks import seat
from ctxdb_core._units.reading import ReadsFrom
from ctxdb_core._units.request_unit import RequestUnit
from ctxdb_core._units.session_end import report
from ctxdb_core._units.settings import NO_SETTINGS, UnitSettings
from ctxdb_core._units.unit import UnitOfWork, current_unit, inherited_before_commit, opened
from ctxdb_core._units.unit_sessions import NO_SESSIONS_YET
from ctxdb_core._wording import type_of
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError

__all__ = [
    "before_gather",
    "begin",
    "finalize",
    "gather_in_new_ctx",
    "is_context_initiated",
    "is_inside",
    "new_db_ctx",
    "run_in_new_ctx",
    "unit_of_work",
]

T = TypeVar("T")
P = ParamSpec("P")

REQUEST_KEY = "ctxdb.unit_of_work"
"""Where an adapter records the unit of work in what its framework keeps for one request, such as an ASGI scope."""


def begin(
    request: MutableMapping[str, Any] | None = None,
    *,
    before_commit: BeforeCommit | None = None,
    statement_timeout: float | None = None,
    deadline: float | None = None,
    reads_from: ReadsFrom | None = None,
) -> RequestUnit | None:
    """Open a unit of work for a request and make it the current one; each call needs its `finalize`.

    Args:
        request: a mapping that lives exactly as long as the request, for instance its ASGI scope. An adapter that is
            installed twice finds in it that an outer one is at work.
        before_commit: awaited with each session that is about to be committed.
        statement_timeout: how many seconds each statement may take; see `set_statement_timeout`.
        deadline: when the last of them has to be done, on the event loop's clock.
        reads_from: for databases, the one whose sessions the unit has in their place: for a request that only reads
            (see `SAFE_METHODS`).

    Raises:
        ValueError: `statement_timeout` is not positive.

    Returns:
        The unit, or ``None`` where an outer adapter of this request, or a test harness, ends the unit of work: then
        just call the application. A unit that was merely inherited through contextvars is never joined.
    """
    if before_commit is not None:
        check_function(before_commit, "`before_commit`")
    # Most requests find nothing at all: these two looks spare them the closer one.
    if (request is not None or current_unit.get(None) is not None) and outer_unit(request) is not None:
        return None
    unit: RequestUnit = RequestUnit()
    unit.sessions, unit.loop = NO_SESSIONS_YET, _get_running_loop()
    unit.hooks = unit.registration = unit.calls = None
    if before_commit is None and statement_timeout is None and deadline is None and reads_from is None:
        unit.settings = NO_SETTINGS
    else:
        unit.settings = UnitSettings(before_commit, _statement_timeout(statement_timeout, deadline), reads_from)
    unit.origin = request
    if request is not None:
        request[REQUEST_KEY] = unit
    unit.enter()
    return unit


def _statement_timeout(seconds: float | None, deadline: float | None) -> StatementTimeout | None:
    return None if seconds is None and deadline is None else StatementTimeout(seconds, deadline)


def outer_unit(request: MutableMapping[str, Any] | None) -> UnitOfWork | None:
    """Return the open unit of work that belongs to this very request, or that a test harness shares; else ``None``."""
    unit: UnitOfWork | None = None if request is None else request.get(REQUEST_KEY)
    if unit is None or unit.closed:
        unit = current_unit.get(None)
        if unit is None or not unit.shared or unit.closed:
            return None
        # A server that runs on a thread of its own inherits the test's unit, whose connection serves another loop.
        unit.check_usable()
    return unit


async def finalize(
    unit: UnitOfWork,
    *,
    commit: bool,
    last: bool = True,
    ends_body: bool = False,
    error: BaseException | None = None,
) -> None:
    """End the transactions of a unit of work, and with `last` the unit itself.

    Call it with ``last=False`` before the first byte of the response leaves: connections go back to the pool, while
    sessions stay usable for a streamed body or a background task. Call it again, with ``last=True``, when the request
    is over. It runs to its end even if the task is cancelled meanwhile.

    Args:
        unit: what `begin` returned.
        commit: whether to commit (see `ctxdb_core.policy`) or to roll back.
        last: whether to close every session and hand out none from now on.
        ends_body: with ``last=False``, whether the body of the response has been made: a result of ``stream()`` that
            is open still, in a transaction that has written, is no error then.
        error: the exception that the adapter is about to raise; further errors are attached to it.

    Raises:
        AbandonedWorkError: a handler goes on that a middleware has given up on (see `follow_calls`), and what was to be
            committed cannot be told from its work. It was rolled back, and the unit has ended.
        OpenCursorError: with ``last=False``, as `UnitOfWork.commit`.
        BaseException: the error of a commit, or of `before_commit`. Everything that could be was rolled back, and the
            success that was about to be sent must not be sent.
    """
    try:
        if unit.closed:
            return
        if isinstance(unit, RequestUnit) and unit.calls is not None and unit.calls.are_given_up():
            await unit.calls.finish(unit, commit=commit, error=error)
        elif last:
            if not unit.finish_idle():
                await unit.finish(commit=commit, error=error)
        elif commit:
            await unit.commit(ends_body=ends_body)
        else:
            await unit.roll_back(error)
    finally:
        if last:
            unit.leave()


def is_inside(unit: UnitOfWork) -> bool:
    """Return whether the running code is a part of `unit`, or of a unit of work that was opened inside of it."""
    current: object = current_unit.get(None)
    while isinstance(current, UnitOfWork) and current is not unit:
        token = getattr(current, "token", None)
        current = None if token is None else token.old_value
    return current is unit


def is_context_initiated() -> bool:
    """Return whether the running code is inside an open unit of work."""
    unit = current_unit.get(None)
    return unit is not None and not unit.closed


@asynccontextmanager
async def new_db_ctx(
    *,
    before_commit: BeforeCommit | None = None,
    statement_timeout: float | None = None,
    deadline: float | None = None,
) -> AsyncIterator[None]:
    """Open a unit of work of its own for a block of code: a script, a job, a websocket message.

    It is committed at the end of the block, and rolled back if an exception leaves it. Inside another unit of work it
    is independent of that one, and needs a connection of its own: see "A second connection" in docs/transactions.md for
    the size of the pool.

    Args:
        before_commit: awaited with each session that is about to be committed; by default, that of the unit of work
            around this one, if there is any.
        statement_timeout: how many seconds each statement may take; see `set_statement_timeout`.
        deadline: when the last of them has to be done, on the event loop's clock.

    Raises:
        ValueError: `statement_timeout` is not positive.
        BaseException: what the block raised, or the error of a commit.
    """
    if before_commit is not None:
        check_function(before_commit, "`before_commit`")
    unit = UnitOfWork(before_commit or inherited_before_commit())
    if statement_timeout is not None or deadline is not None:
        unit.settings = UnitSettings(unit.settings.before_commit, _statement_timeout(statement_timeout, deadline))
    async with opened(unit, seat(unit)):
        yield


unit_of_work = new_db_ctx
"""The same: the name by which the documentation calls it."""


async def run_in_new_ctx(fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await ``fn(*args, **kwargs)`` in a unit of work of its own: with sessions, a transaction and a commit of its own.

    A request that waits for it while its own transaction holds a connection needs two of them: see "A second
    connection" in docs/transactions.md for the size of the pool.

    Raises:
        TypeError: `fn` is not an async callable.
        BaseException: what `fn` raised, or the error of a commit.
    """
    _check_callable(fn)
    async with opened(UnitOfWork(inherited_before_commit())):
        result = fn(*args, **kwargs)
        if not inspect.isawaitable(result):
            raise ArgumentTypeError(
                f"{fn!r} is no async function: it has returned {type_of(result)}, which cannot be awaited. What it has "
                "done is rolled back. Write it with `async def`."
            )
        return await result


_before_gather: list[Callable[[], object]] = []


def before_gather(callback: Callable[[], object]) -> None:
    """Have `callback` called in each `gather_in_new_ctx`, by its caller's context, before its tasks are started.

    What it sets in a context variable is inherited by the tasks: so they can leave something there for the caller. It
    is for packages that build on this one, is never taken back, and must not raise.
    """
    _before_gather.append(callback)


async def gather_in_new_ctx(*callables: Callable[[], Awaitable[T]], max_concurrent: int | None = None) -> list[T]:
    """Await all `callables` concurrently, each in a unit of work of its own.

    Each holds a connection of its own, beside that of a request which waits for them: see "A second connection" in
    docs/transactions.md for the size of the pool.

    Args:
        *callables: async functions without parameters (`functools.partial` makes them so).
        max_concurrent: how many may run, and hold a connection, at a time; without it, all.

    Returns:
        Their results, in the order of the callables.

    Raises:
        TypeError: one of `callables` is not an async callable, or `max_concurrent` no number.
        ValueError: `max_concurrent` is less than 1.
        BaseException: the first error. The others are cancelled and have rolled back by then; what was committed stays.
    """
    try:
        for fn in callables:
            _check_callable(fn)
    except TypeError:
        for coroutine in filter(inspect.iscoroutine, callables):
            coroutine.close()
        raise
    if max_concurrent is not None and not isinstance(max_concurrent, int):
        raise ArgumentTypeError(
            f"{type_of(max_concurrent)} is given as `max_concurrent`: give a number, or leave it out for no limit."
        )
    if max_concurrent is not None and max_concurrent < 1:
        raise ArgumentValueError(f"max_concurrent is {max_concurrent}: give 1 or more, or leave it out for no limit.")
    slots = asyncio.Semaphore(len(callables) if max_concurrent is None else max_concurrent)

    async def run(fn: Callable[[], Awaitable[T]]) -> T:
        async with slots:
            return await run_in_new_ctx(fn)

    for callback in _before_gather:
        callback()
    tasks = [asyncio.create_task(run(fn)) for fn in callables]
    try:
        return await asyncio.gather(*tasks)
    except BaseException as exc:
        for task in tasks:
            task.cancel()
        await run_to_completion(_wait_for(tasks))
        for task in tasks:
            if not task.cancelled() and (other := task.exception()) is not None:
                report(other, exc, "another of the callables failed as well")
        raise


async def _wait_for(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)


def _check_callable(fn: object) -> None:
    if inspect.iscoroutine(fn):
        fn.close()
        raise ArgumentTypeError(
            "A coroutine was passed where a callable is needed, as it must be called inside of its new context: pass "
            "the function and its arguments, `run_in_new_ctx(fn, 1)` or `gather_in_new_ctx(partial(fn, 1))`."
        )
    if not callable(fn):
        raise ArgumentTypeError(f"{type_of(fn)} is no async function: pass one that returns what is to be awaited.")
