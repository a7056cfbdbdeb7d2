"""Trying a transaction again that the database could not finish, though nothing was wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import DBAPIError

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.1

# Serialization failure and deadlock: PostgreSQL chose this transaction to be undone, so that another one could go on.
_UNDONE_FOR_OTHERS = ("40001", "40P01")


async def retry(work: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `work` returns; call it anew if the database failed it for a reason that may have passed.

    It must be a transaction as a whole, and one that finds out by itself whether it has been committed before: when a
    connection breaks during a commit, nobody can tell.

    Raises:
        Exception: what `work` raised: at once if it is its own fault, and after `ATTEMPTS` calls in any case.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return await work(*args, **kwargs)
        except DBAPIError as exc:
            if not is_transient(exc):
                raise
        await asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    return await work(*args, **kwargs)


def is_transient(error: DBAPIError) -> bool:
    """Return whether the same transaction may succeed the next time: its connection was lost, or it was in the way."""
    return error.connection_invalidated or getattr(error.orig, "sqlstate", None) in _UNDONE_FOR_OTHERS
