"""`retry_on_conflict`: a unit of work that is run again when the database could not serialize it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from ctxdb_core._blocks.attempt import Attempt, current_attempt, watch_engines
from ctxdb_core._blocks.entry import beside
from ctxdb_core._databases.arguments import check_function
from ctxdb_core._sqlalchemy.mysql_errors import CONFLICTS as MYSQL_CONFLICTS
from ctxdb_core._sqlalchemy.mysql_errors import error_number
from ctxdb_core._units.unit import UnitOfWork, inherited_before_commit, opened
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError, CtxDBError, MissingExtraError

if TYPE_CHECKING:
    from tenacity.stop import StopBaseT
    from tenacity.wait import WaitBaseT

__all__ = ["is_conflict", "retry_on_conflict"]

logger = logging.getLogger("ctxdb")

P = ParamSpec("P")
R = TypeVar("R")

# serialization_failure and deadlock_detected (PostgreSQL, "Error Codes").
_CONFLICTS = {"40001", "40P01"}

# SQLITE_BUSY, which is the lower byte of its extended codes (SQLite, "Result Codes").
_SQLITE_BUSY = 5

_LONGEST_WAIT_SECONDS = 2.0


def is_conflict(error: BaseException) -> bool:
    """Return whether `error` comes from a conflict with another transaction, so that another try may well succeed.

    A serialization failure or a deadlock (SQLSTATE 40001, 40P01), SQLite's "database is locked", or a deadlock, a lock
    wait time-out or a changed record of MySQL's and MariaDB's (1213, 1205, 1020). `error` may be such an error itself,
    or have one as its cause, its context, or a member of its group.
    """
    for each in _origins(error, set()):
        # An error of SQLAlchemy's holds the driver's error, which holds the code under a name of the driver's.
        if (getattr(each, "sqlstate", None) or getattr(each, "pgcode", None)) in _CONFLICTS:
            return True
        if getattr(each, "sqlite_errorcode", 0) & 0xFF == _SQLITE_BUSY or error_number(each) in MYSQL_CONFLICTS:
            return True
    return False


@overload
def retry_on_conflict(fn: Callable[P, Awaitable[R]], /) -> Callable[P, Coroutine[Any, Any, R]]: ...


@overload
def retry_on_conflict(
    *, attempts: int | StopBaseT = 5, wait: float | WaitBaseT = 0.05
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]]: ...


def retry_on_conflict(
    fn: Callable[P, Awaitable[R]] | None = None, /, *, attempts: int | StopBaseT = 5, wait: float | WaitBaseT = 0.05
) -> Callable[P, Coroutine[Any, Any, R]] | Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Decorate an async function to be run again when its transaction conflicts with another one.

    Each attempt has a unit of work of its own, which is committed when the function returns: a conflict that shows at
    the COMMIT counts as well. So does an error of `ctxdb_pgstatus` that is ``retryable``, such as a lost connection.
    Inside of a request, too, the function has neither the request's session nor its transaction; nor may it wait for
    locks that these hold.

    It is not run again once anything of the attempt was committed: early, on one of several databases, or in
    transactions of its own (``run_in_new_ctx``, ``transactional(db, "requires_new")``, a connection of an engine). Then
    the error surfaces with a note that says so. What is committed past SQLAlchemy is not seen.

    A cancelled task makes no further attempt.

    Needs the extra ``retry``: ``pip install 'ctxdb-core[retry]'``.

    Args:
        fn: the function, where the decorator is used without parentheses.
        attempts: how many attempts there may be, the first one included; or one of tenacity's ``stop_...``.
        wait: how many seconds to wait, at most, before the second attempt. The limit doubles for each further attempt,
            up to two seconds; the wait within it is random, so that transactions which have conflicted do not do so
            again. Or one of tenacity's ``wait_...``.

    Raises:
        MissingExtraError: tenacity is not installed (an ``ImportError``, too).
        ValueError: `attempts` is less than 1, or `wait` less than 0.
        TypeError: what is decorated is no async function; `attempts` or `wait` is neither a number nor a function.
        BaseException: what the last attempt raised.
    """
    try:
        import tenacity  # noqa: PLC0415 - an extra: the core depends on SQLAlchemy alone
    except ImportError as exc:
        raise MissingExtraError(
            "retry_on_conflict needs tenacity, which is not installed: `pip install 'ctxdb-core[retry]'`.",
            name="tenacity",
        ) from exc
    if isinstance(attempts, int):
        if attempts < 1:
            raise ArgumentValueError(f"attempts={attempts}: give 1 or more; the first attempt counts.")
        attempts = tenacity.stop_after_attempt(attempts)
    if isinstance(wait, int | float):
        if not wait >= 0:
            raise ArgumentValueError(f"wait={wait}: give seconds, 0 or more.")
        wait = tenacity.wait_random_exponential(multiplier=wait, max=max(wait, _LONGEST_WAIT_SECONDS))
    check_function(attempts, "`attempts`, if it is no number")
    check_function(wait, "`wait`, if it is no number")
    stop, backoff = attempts, wait
    watch_engines()

    def decorate(fn: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        if not inspect.iscoroutinefunction(fn):
            raise ArgumentTypeError(
                f"{fn!r} is no async function: only what is awaited inside of an attempt is part of it. Write it with "
                "`async def`."
            )

        @functools.wraps(fn)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            conflict: Exception | None = None

            async def attempt() -> R:
                nonlocal conflict
                try:
                    with _watched() as may_be_repeated:
                        unit = UnitOfWork(inherited_before_commit())
                        unit.note_is_block()
                        unit.share_statement_timeout(beside().around)
                        async with opened(unit):
                            return await fn(*args, **kwargs)
                except Exception as exc:
                    conflict = exc if may_be_repeated(exc) else None
                    raise

            def log(state: tenacity.RetryCallState) -> None:
                logger.info(
                    "Attempt %d of %s met a conflict: the next one begins in %.3f seconds",
                    state.attempt_number,
                    getattr(fn, "__qualname__", fn),
                    state.upcoming_sleep,
                    exc_info=conflict,
                )

            retrying = tenacity.AsyncRetrying(
                stop=stop,
                wait=backoff,
                retry=tenacity.retry_if_exception(lambda exc: exc is conflict),
                before_sleep=log,
                sleep=asyncio.sleep,
                reraise=True,
            )
            try:
                return await retrying(attempt)
            except Exception as exc:
                if exc is conflict:
                    number = retrying.statistics.get("attempt_number")
                    exc.add_note(f"ctxdb: not run again, as this was attempt {number}, and the last one allowed")
                raise
            finally:
                conflict = None

        return run

    return decorate if fn is None else decorate(fn)


@contextmanager
def _watched() -> Iterator[Callable[[Exception], bool]]:
    """Watch an attempt; yield a function that tells whether an error of the attempt allows for another attempt."""
    attempt = Attempt(current_attempt.get())
    task = asyncio.current_task()
    cancellations = 0 if task is None else task.cancelling()

    def may_be_repeated(error: Exception) -> bool:
        if not (is_conflict(error) or _is_retryable(error)):
            return False
        if attempt.committed:
            names = ", ".join(attempt.committed)
            error.add_note(f"ctxdb: not run again, as this attempt had committed something on {names}")
            return False
        # The end of a transaction is completed although its task was cancelled: the error of that end comes first.
        if task is not None and task.cancelling() > cancellations:
            error.add_note("ctxdb: not run again, as the task was cancelled")
            return False
        return True

    token = current_attempt.set(attempt)
    try:
        yield may_be_repeated
    finally:
        current_attempt.reset(token)


def _is_retryable(error: Exception) -> bool:
    # Not what `error` was raised from: a commit may be unconfirmed because of an error that is retryable by itself.
    return isinstance(error, CtxDBError) and getattr(error, "retryable", False)


def _origins(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _origins(each, seen)
        orig = getattr(error, "orig", None)
        if isinstance(orig, BaseException):
            yield from _origins(orig, seen)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
