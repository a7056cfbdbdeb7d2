"""All that is used of SQLAlchemy beyond its public names, and nothing else in the workspace uses any of it.

Checked on SQLAlchemy 2.0.55 and 2.1.9. `tests/core/test_private_names.py` fails where another version has changed one
of them; it is run on the lowest version that is supported and on the newest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, Dialect, Engine
from sqlalchemy.orm import InstanceState, Session, SessionTransaction
from sqlalchemy.pool import Pool, PoolProxiedConnection
from sqlalchemy.pool.base import _ConnectionRecord

__all__ = [
    "asyncpg_adapter_that_begins",
    "begin_without_statement",
    "commit_values",
    "connections_of",
    "deleted_in",
    "forget_block",
    "innermost_block",
    "is_flushing",
    "isolation_level_on_connect",
    "pass_on_failed_connect",
    "pool_of",
    "replace_commit",
    "replace_connect",
    "replace_isolation_level",
    "replace_raw_connection",
    "replace_terminate",
    "seed_dispatch",
    "swap_driver_connections",
]


# --- sessions ---------------------------------------------------------------------------------------------------------


def innermost_block(session: Session) -> Any:
    """Return the transaction or savepoint whose ``with`` block the code is in, the innermost; ``None`` outside of any.

    SQLAlchemy refuses each statement inside of a block whose transaction has ended already.
    """
    return session._trans_context_manager  # noqa: SLF001 - see the module


def forget_block(session: Session) -> None:
    """Let the code in a ``with`` block of the session go on, although the block's transaction was ended from outside.

    The end of the block does nothing any more.
    """
    if session._trans_context_manager is not None and not session.in_transaction():  # noqa: SLF001 - see the module
        session._trans_context_manager = None  # noqa: SLF001 - see the module


def is_flushing(session: Session) -> bool:
    """Return whether the session is in the middle of a flush."""
    return session._flushing  # noqa: SLF001 - see the module


def begin_without_statement(session: Session) -> None:
    """Have the session begin a transaction as its next statement would: `Session.begin` would claim its commit."""
    session._autobegin_t()  # noqa: SLF001 - see the module


def connections_of(transaction: SessionTransaction) -> set[Connection]:
    """Return the connections that a transaction has taken: none, if nothing of it has reached the database yet."""
    return {each[0] for each in transaction._connections.values()}  # noqa: SLF001 - see the module


def seed_dispatch(session: Session) -> None:
    """Give a new session its empty listeners at once.

    SQLAlchemy makes the object that keeps the listeners of one session anew for each, and has it miss each event once:
    11 times in a request of one SELECT, 16 times in one of an INSERT.
    """
    dispatch: Any = session.dispatch
    vars(dispatch).update(dispatch._empty_listeners)  # noqa: SLF001 - see the module


# --- objects of the ORM -----------------------------------------------------------------------------------------------


def deleted_in(session: Session) -> list[InstanceState[Any]]:
    """Return the states of the objects that the open transaction has deleted, which a roll-back brings back."""
    transaction = session.get_transaction()
    return [] if transaction is None else list(transaction._deleted)  # noqa: SLF001 - see the module


def commit_values(state: InstanceState[Any], values: Mapping[str, Any]) -> None:
    """Give an object `values` as if they had just been loaded."""
    state.dict.update(values)
    state._commit(state.dict, values)  # noqa: SLF001 - see the module


# --- engines, dialects, pools -----------------------------------------------------------------------------------------


def isolation_level_on_connect(dialect: Dialect) -> str | None:
    """Return the ``isolation_level`` that an engine was created with; ``None`` for the database's own default."""
    level: str | None = dialect._on_connect_isolation_level  # noqa: SLF001 - see the module
    return level


def pool_of(connection: PoolProxiedConnection, default: Pool) -> Pool:
    """Return the pool that a connection goes back to, which may be another one than the engine's own."""
    pool: Pool = getattr(connection, "_pool", default)
    return pool


def pass_on_failed_connect(pool: Pool) -> None:
    """Let the next task that waits for a connection of `pool` open one itself, as another task has failed to.

    A pool at its limit lets tasks wait until a connection is given back. One that could not be opened leaves a place
    free, and nobody would be told.
    """
    counting: Any = pool
    queue = getattr(getattr(pool, "_pool", None), "_queue", None)
    if not isinstance(queue, asyncio.Queue):
        return
    waiting: Any = queue
    if any(not getter.done() for getter in waiting._getters) and counting._inc_overflow():  # noqa: SLF001 - see the module
        counting._pool.put_nowait(_ConnectionRecord(pool, connect=False))  # noqa: SLF001 - see the module


def replace_terminate(dialect: Dialect, terminate: Callable[[Callable[[Any], None], Any], None]) -> None:
    """Have `terminate` called in the place of ``Dialect.do_terminate``, with that and a connection; once for a dialect.

    SQLAlchemy gives a connection up by it, and has no event for that.
    """
    _replace(dialect, "do_terminate", terminate)


def replace_connect(dialect: Dialect, connect: Callable[..., Any]) -> None:
    """Have `connect` called in the place of ``Dialect.connect``, with that and its arguments; once for a dialect.

    Of the event ``do_connect``, only one listener can open the connection.
    """
    _replace(dialect, "connect", connect)


def replace_raw_connection(engine: Engine, take: Callable[[Callable[[], Any]], Any]) -> None:
    """Have `take` called in the place of ``Engine.raw_connection``, with that; once for an engine.

    There is no event before a connection is waited for.
    """
    _replace(engine, "raw_connection", take)


def replace_commit(dialect: Dialect, commit: Callable[..., None]) -> None:
    """Have `commit` called in the place of ``Dialect.do_commit``, with that and a connection; once for a dialect.

    There is an event before a commit, and none that would see its error whatever the error is.
    """
    _replace(dialect, "do_commit", commit)


def replace_isolation_level(dialect: Dialect, set_level: Callable[..., None]) -> None:
    """Have `set_level` called in the place of ``Dialect.set_isolation_level``, with that, a connection and the level.

    SQLAlchemy asks a new server for its version before any listener of a user's can set the level of the connection.
    """
    _replace(dialect, "set_isolation_level", set_level)


def asyncpg_adapter_that_begins(cls: type, begin: Callable[[Any, Callable[[], Awaitable[None]]], Any]) -> type:
    """Return a class, derived from SQLAlchemy's adapter of asyncpg, that has `begin` awaited to begin a transaction.

    `begin` is given the adapter, and what sends BEGIN. An adapter may be made one of the class by ``__class__``.
    """
    adapter: Any = cls
    start = adapter._start_transaction  # noqa: SLF001 - see the module

    def start_transaction(self: Any) -> Any:
        return begin(self, partial(start, self))

    return type(cls.__name__, (cls,), {"__slots__": (), "_start_transaction": start_transaction})


def swap_driver_connections(adapter: Any, other: Any) -> None:
    """Let two of SQLAlchemy's adapters of asyncpg, neither of which is in a transaction, change their connections."""
    for name in ("_connection", "_prepared_statement_cache", "_invalidate_schema_cache_asof"):
        mine, others = getattr(adapter, name), getattr(other, name)
        setattr(adapter, name, others)
        setattr(other, name, mine)


def _replace(owner: object, name: str, replacement: Callable[..., Any]) -> None:
    attributes = vars(owner)
    if name not in attributes:
        original = getattr(owner, name)
        attributes[name] = lambda *args, **kwargs: replacement(original, *args, **kwargs)
