"""All that is used of SQLAlchemy beyond its public names, and nothing else in the workspace uses any of it.

Checked on SQLAlchemy 2.0.55 and 2.1.9. `tests/core/test_private_names.py` fails where another version has changed one
of them; it is run on the lowest version that is supported and on the newest.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, Dialect, Engine
from sqlalchemy.orm import InstanceState, Session, SessionTransaction
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, PoolProxiedConnection, QueuePool

__all__ = [
    "PoolNumbers",
    "begin_without_statement",
    "commit_values",
    "connections_of",
    "deleted_in",
    "follow_dialect",
    "forget_block",
    "innermost_block",
    "is_flushing",
    "isolation_level_on_connect",
    "pool_numbers",
    "pool_of",
    "replace_connect",
    "replace_raw_connection",
    "replace_terminate",
    "seed_dispatch",
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


class PoolNumbers(NamedTuple):
    """How many connections of a pool there are; ``limit`` is ``None`` without a limit."""

    in_use: int
    idle: int
    waiting: int
    limit: int | None


def pool_numbers(pool: Pool) -> PoolNumbers:
    """Return what a pool holds, and how many tasks wait for it; zeros for the kinds of pools that do not count."""
    if not isinstance(pool, QueuePool):
        return PoolNumbers(0, 0, 0, None)
    # An overflow of -1 is none, and a size of 0 none either.
    size, overflow = pool.size(), pool._max_overflow  # noqa: SLF001 - see the module
    limit = None if overflow < 0 or size == 0 else size + overflow
    getters: Collection[Future[Any]] = ()
    if isinstance(pool, AsyncAdaptedQueuePool):
        # The queue is made when it is first used.
        queue: Any = vars(pool._pool).get("_queue")  # noqa: SLF001 - see the module
        getters = () if queue is None else tuple(queue._getters)  # noqa: SLF001 - see the module
    waiting = sum(not getter.done() for getter in getters)
    return PoolNumbers(pool.checkedout(), pool.checkedin(), waiting, limit)


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


def follow_dialect(dialect: Dialect, name: str, around: Callable[..., Any]) -> None:
    """Have `around` called in the place of a method of the dialect, with that and its arguments.

    For ``do_execute`` and its like, ``do_commit`` and ``do_rollback``. The events of an engine tell the same, but are
    dear: SQLAlchemy makes the object that keeps the listeners of one connection anew for each. Unlike with the other
    functions here, several may follow one dialect.
    """
    original = getattr(dialect, name)
    vars(dialect)[name] = lambda *args, **kwargs: around(original, *args, **kwargs)


def replace_raw_connection(engine: Engine, take: Callable[[Callable[[], Any]], Any]) -> None:
    """Have `take` called in the place of ``Engine.raw_connection``, with that; once for an engine.

    There is no event before a connection is waited for.
    """
    _replace(engine, "raw_connection", take)


def _replace(owner: object, name: str, replacement: Callable[..., Any]) -> None:
    attributes = vars(owner)
    if name not in attributes:
        original = getattr(owner, name)
        attributes[name] = lambda *args, **kwargs: replacement(original, *args, **kwargs)
