"""The private names of SQLAlchemy and of drivers that ctxdb uses; no other module in the workspace calls one.

Three more are methods that `GuardedSession` overrides: ``_autobegin_t``, ``_expunge_states`` and ``_identity_lookup``.

Checked on SQLAlchemy 2.0.55 and 2.1.9, on asyncpg 0.32, on psycopg 3.3, on asyncmy 0.2.18 and on aiomysql 0.3.2.
`tests/core/test_private_names.py` fails where another version has changed one of them; it is run on the lowest version
that is supported and on the newest. `tests/mariadb` tests the private names of asyncmy and aiomysql.
"""

from __future__ import annotations

import asyncio
import copy
import socket
import sys
from asyncio import Future
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy.engine import ChunkedIteratorResult
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstanceState, ORMExecuteState, Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState, _new_sessionid, _sessions
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.pool import _ConnectionFairy as ConnectionFairy
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_only

T = TypeVar("T")

__all__ = [
    "BufferedRowCursorFetchStrategy",
    "ConnectionFairy",
    "FirstStatement",
    "InPlaceDispatch",
    "PoolNumbers",
    "SessionPattern",
    "asyncpg_adapter_that_begins",
    "begin_asyncpg_transaction",
    "begin_without_statement",
    "call_on_return",
    "calls_on_return",
    "changed_in",
    "changed_states",
    "close_psycopg_cursor",
    "commit_values",
    "connection_of_context",
    "connections_of",
    "copy_engine",
    "deleted_in",
    "driver_cursor_of",
    "end_without_restoring",
    "error_that_has_undone",
    "fetch_asyncpg_row",
    "flushes_before",
    "follow_dialect",
    "follow_handing_out",
    "follow_parts",
    "follow_raw_connection",
    "forget_block",
    "forget_prepared_statements",
    "give_own_dictionaries",
    "has_committed",
    "has_to_flush",
    "innermost_block",
    "is_at_rest",
    "is_committing",
    "is_flushing",
    "isolation_level_on_connect",
    "lend_asyncpg_connection",
    "lend_psycopg_connection",
    "listen_first",
    "listen_once",
    "listeners_of",
    "number_of_savepoint",
    "pass_on_failed_connect",
    "pending_states",
    "pool_numbers",
    "pool_of",
    "psycopg_adapter_that_executes",
    "psycopg_connection_that_stops",
    "raise_translated",
    "read_psycopg_answer",
    "replace_commit",
    "replace_connect",
    "replace_connection_class",
    "replace_isolation_level",
    "replace_raw_connection",
    "replace_terminate",
    "request_asyncpg_cancellation",
    "savepoints_set_on",
    "seed_dispatch",
    "set_warning_of_changes",
    "swap_asyncpg_connections",
    "swap_connection",
    "take_back_asyncpg_connection",
    "take_back_psycopg_connection",
    "transport_of",
    "wrap_in_dialect",
]

_new = object.__new__


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


def flushes_before(query: ORMExecuteState) -> bool:
    """Return whether a query is executed after a flush of what was changed: in the middle of a flush, it is not."""
    session, options = query.session, query.load_options
    return session.autoflush and not session._flushing and options._autoflush  # noqa: SLF001 - see the module


def has_to_flush(session: Session) -> bool:
    """Return whether a flush has something to do, as far as can be told without a look at each object."""
    return bool(session._new or session._deleted or session.identity_map._modified)  # noqa: SLF001 - see the module


def has_committed(session: Session) -> bool:
    """Return whether the session's transaction was committed and has not ended: a listener of the commit has failed."""
    transaction = session.get_transaction()
    return transaction is not None and transaction._state is SessionTransactionState.COMMITTED  # noqa: SLF001 - see the module


def is_committing(session: Session) -> bool:
    """Return whether the COMMIT of the session's transaction has been sent, or is about to be; or it has failed."""
    transaction = session.get_transaction()
    return transaction is not None and transaction._state is SessionTransactionState.PREPARED  # noqa: SLF001 - see the module


def is_at_rest(session: Session) -> bool:
    """Return whether the session has no transaction, and a flush would have nothing to do."""
    # One expression, as each request that has used a session asks several times.
    return not (
        session._transaction is not None  # noqa: SLF001 - see the module
        or session._new  # noqa: SLF001 - see the module
        or session._deleted  # noqa: SLF001 - see the module
        or session.identity_map._modified  # noqa: SLF001 - see the module
    )


def changed_states(session: Session) -> set[InstanceState[Any]]:
    """Return the very set in which the session keeps the persistent objects that were changed."""
    return session.identity_map._modified  # noqa: SLF001 - see the module


def pending_states(session: Session) -> Collection[InstanceState[Any]]:
    """Return the objects that were added to the session and not written yet."""
    return session._new.keys()  # noqa: SLF001 - see the module


def set_warning_of_changes(session: Session, *, enabled: bool) -> bool:
    """Have SQLAlchemy warn of objects that are added while it flushes, or not; return whether it has done so."""
    warns, session._warn_on_events = session._warn_on_events, enabled  # noqa: SLF001 - see the module
    return warns


def begin_without_statement(session: Session) -> None:
    """Have the session begin a transaction as its next statement would: `Session.begin` would claim its commit."""
    session._autobegin_t()  # noqa: SLF001 - see the module


def error_that_has_undone(transaction: SessionTransaction) -> BaseException | None:
    """Return the error of the flush that has rolled back a transaction, or a savepoint, which has not ended yet."""
    if transaction._state is not SessionTransactionState.DEACTIVE:  # noqa: SLF001 - see the module
        return None
    return transaction._rollback_exception  # noqa: SLF001 - see the module


def end_without_restoring(session: Session) -> None:
    """End the open transaction and its savepoints as a roll-back does, and leave all objects as they are.

    What was added, changed or deleted, and not flushed, is written by the next flush.
    """
    while session._transaction is not None:  # noqa: SLF001 - see the module
        session._transaction.close()  # noqa: SLF001 - see the module


def connections_of(transaction: SessionTransaction) -> set[Connection]:
    """Return the connections that a transaction has taken: none, if nothing of it has reached the database yet."""
    return {each[0] for each in transaction._connections.values()}  # noqa: SLF001 - see the module


def seed_dispatch(session: Session) -> None:
    """Give a new session its empty listeners at once.

    SQLAlchemy makes the object that keeps the listeners of one session anew for each, with a slot for each event, and
    has it miss each event once: 6 times in a request of one SELECT, 14 times in one that adds an object.
    """
    dispatch: Any = session.dispatch
    with suppress(_CannotBeCopiedError):
        _seed(dispatch, _listeners_of(dispatch))


def _listeners_of(dispatch: Any) -> Sequence[Any]:
    """Return the empty listeners of the events that a session asks for in most requests."""
    listeners: dict[str, Any] = dispatch._empty_listeners  # noqa: SLF001 - see the module
    try:
        return [listeners[name] for name in _FREQUENT_EVENTS]
    except KeyError:
        raise _CannotBeCopiedError from None


_FREQUENT_EVENTS = (
    "do_orm_execute",
    "after_transaction_create",
    "after_begin",
    "before_attach",
    "after_attach",
    "transient_to_pending",
    "loaded_as_persistent",
    "before_flush",
    "after_flush",
    "pending_to_persistent",
    "after_flush_postexec",
    "before_commit",
    "after_commit",
    "after_transaction_end",
)


def _seed(dispatch: Any, listeners: Sequence[Any]) -> None:
    # By their names, in the order of `_FREQUENT_EVENTS`: a loop with `setattr` takes fifteen times as long.
    (
        dispatch.do_orm_execute,
        dispatch.after_transaction_create,
        dispatch.after_begin,
        dispatch.before_attach,
        dispatch.after_attach,
        dispatch.transient_to_pending,
        dispatch.loaded_as_persistent,
        dispatch.before_flush,
        dispatch.after_flush,
        dispatch.pending_to_persistent,
        dispatch.after_flush_postexec,
        dispatch.before_commit,
        dispatch.after_commit,
        dispatch.after_transaction_end,
    ) = listeners


class SessionPattern:
    """Makes sessions like a constructor does, of the values that are the same in all of them.

    The two constructors of a session check and store some 25 values, of which all but a few are the same for each
    session of a session maker.

    Args:
        construct: makes a session by the constructors.
    """

    __slots__ = (
        "_async_class",
        "_async_dicts",
        "_async_values",
        "_identity_map",
        "_listeners",
        "_sync_class",
        "_sync_dicts",
        "_sync_others",
        "_sync_values",
    )

    def __init__(self, construct: Callable[[], AsyncSession]) -> None:
        session, other = construct(), construct()
        sync_session: Any = session.sync_session
        self._async_class: type[AsyncSession] = type(session)
        self._sync_class: type[Session] = type(sync_session)
        self._identity_map: type[Any] = type(sync_session.identity_map)
        values, self._async_dicts = _in_common(session, other, {"_proxied", "sync_session"})
        self._async_values = tuple(values.items())
        known = {"_deleted", "_new", "hash_key", "identity_map"}
        values, self._sync_dicts = _in_common(sync_session, other.sync_session, known)
        try:
            self._sync_values = tuple(values.pop(name) for name in _SHARED)
        except KeyError:
            raise _CannotBeCopiedError from None
        self._sync_others = tuple(values.items())
        # A session has its dispatch from when it is first asked for.
        self._listeners = _listeners_of(sync_session.dispatch)

    @classmethod
    def of(cls, construct: Callable[[], AsyncSession]) -> SessionPattern | None:
        """Return a pattern of the sessions that `construct` makes; ``None`` if they have more than can be copied."""
        try:
            return cls(construct)
        except _CannotBeCopiedError:
            return None

    def __call__(self) -> AsyncSession:
        """Return a new session."""
        sync_session: Any = _new(self._sync_class)
        # By their names, in the order of `_SHARED`: a loop takes as long as the constructor. And not by the session's
        # ``__dict__``: see `InPlaceDispatch`.
        (
            sync_session.bind,
            sync_session._flushing,  # noqa: SLF001 - see the module
            sync_session._warn_on_events,  # noqa: SLF001
            sync_session._transaction,  # noqa: SLF001
            sync_session._nested_transaction,  # noqa: SLF001
            sync_session.autobegin,
            sync_session.autoflush,
            sync_session.expire_on_commit,
            sync_session.enable_baked_queries,
            sync_session._close_state,  # noqa: SLF001
            sync_session.join_transaction_mode,
            sync_session.twophase,
            sync_session._query_cls,  # noqa: SLF001
        ) = self._sync_values
        for name, value in self._sync_others:
            setattr(sync_session, name, value)
        for name in self._sync_dicts:
            setattr(sync_session, name, {})
        sync_session._new, sync_session._deleted = {}, {}  # noqa: SLF001
        sync_session.identity_map = self._identity_map()
        sync_session.hash_key = key = _new_sessionid()
        _sessions[key] = sync_session
        _seed(sync_session.dispatch, self._listeners)
        session: Any = _new(self._async_class)
        for name, value in self._async_values:
            setattr(session, name, value)
        for name in self._async_dicts:
            setattr(session, name, {})
        # SQLAlchemy finds the asynchronous session by the synchronous one.
        session.sync_session = session._proxied = session._assign_proxied(sync_session)  # noqa: SLF001
        return session  # type: ignore[no-any-return]  # of `_async_class`


_SHARED = (
    "bind",
    "_flushing",
    "_warn_on_events",
    "_transaction",
    "_nested_transaction",
    "autobegin",
    "autoflush",
    "expire_on_commit",
    "enable_baked_queries",
    "_close_state",
    "join_transaction_mode",
    "twophase",
    "_query_cls",
)
"""Attributes that the synchronous sessions of a session maker share, in each version of SQLAlchemy."""


class _CannotBeCopiedError(Exception):
    """A session has a value of its own, or lacks one, other than this module knows it."""


def _in_common(one: object, other: object, known: set[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the values that two new sessions share, and the names under which each has an empty dict of its own.

    Args:
        one: a session.
        other: another one.
        known: the names of what else each session has for itself.
    """
    values, others = vars(one), vars(other)
    own = [name for name, value in values.items() if others.get(name) is not value]
    dicts = tuple(name for name in own if name not in known and type(values[name]) is dict and not values[name])
    if values.keys() != others.keys() or set(own) - set(dicts) != known:
        raise _CannotBeCopiedError
    return {name: value for name, value in values.items() if name not in own}, dicts


class InPlaceDispatch:
    """Gives each object its dispatch of events like SQLAlchemy's descriptor, but as a plain attribute.

    SQLAlchemy's descriptor stores the dispatch by way of ``__dict__``. CPython keeps the attributes of an object in
    the object itself until its ``__dict__`` is asked for. From then on it keeps them in a dictionary, and takes two to
    four times as long for each of them, up to Python 3.12. An object that serves a single request has its dispatch
    asked for at once, and its attributes some hundred times after that.

    Args:
        cls: the class of SQLAlchemy's that has the events.
    """

    def __init__(self, cls: Any) -> None:
        self._dispatch = cls.dispatch

    def __get__(self, instance: Any, owner: object) -> Any:
        if instance is None:
            return self._dispatch
        instance.dispatch = dispatch = self._dispatch._for_instance(instance)  # noqa: SLF001 - see the module
        return dispatch


class InPlaceConnection(Connection):
    """A connection that keeps its attributes in itself."""

    dispatch = InPlaceDispatch(Connection)


class ListenedConnection(InPlaceConnection):
    """A connection for engines with listeners of `engine_connect`: if one fails, it holds no place in the pool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except BaseException as exc:
            # A listener of `engine_connect` has failed, such as the one by which SQLAlchemy sets the isolation level of
            # an engine's options. Nobody gets this object, so nobody would give the connection back. What state the
            # listener has left it in is not known.
            taken = getattr(self, "_dbapi_connection", None)
            if taken is not None:
                taken.invalidate(exc)
            raise


def replace_connection_class(engine: Engine) -> None:
    """Have an engine hand out connections of a class of this module, unless it has another class already."""
    if engine._connection_cls is Connection:  # noqa: SLF001 - see the module
        # An engine whose options name an isolation level has a listener that sets it.
        listened = bool(engine.dispatch.engine_connect)
        engine._connection_cls = ListenedConnection if listened else InPlaceConnection  # noqa: SLF001


def give_own_dictionaries(engine: Engine) -> None:
    """Have a new engine and its pool keep their attributes each in a dictionary of its own.

    They have been asked for their ``__dict__`` (see `InPlaceDispatch`). CPython has these dictionaries share their keys
    with those of other objects of the class, and takes twice as long for an attribute in such a dictionary. Nobody else
    may use the engine yet, who could change an attribute meanwhile.
    """
    for each in (engine, engine.pool):
        each.__dict__ = {**vars(each)}


def listen_once(target: Any, name: str, listener: Callable[..., object]) -> None:
    """Have `listener` called at an event of one pool, connection or session, unless it is already.

    `event.contains` is no help: it looks for the ``id`` of the target. SQLAlchemy copies the listeners of a disposed
    pool to its successor, and keeps them known by the ``id`` of the disposed pool. A new pool may get that ``id``, and
    would be taken for a pool that has the listeners.
    """
    if listener not in tuple(getattr(target.dispatch, name)):
        event.listen(target, name, listener)


# --- objects of the ORM -----------------------------------------------------------------------------------------------


def deleted_in(transaction: SessionTransaction) -> list[InstanceState[Any]]:
    """Return the states of the objects that were deleted in an open transaction, or behind an open savepoint."""
    return list(transaction._deleted)  # noqa: SLF001 - see the module


def changed_in(transaction: SessionTransaction) -> Collection[InstanceState[Any]]:
    """Return the states of the objects that were flushed as changed in an open transaction, or behind a savepoint."""
    return transaction._dirty  # noqa: SLF001 - see the module; a mapping with weak keys


def follow_parts(
    result: ChunkedIteratorResult[Any], around: Callable[[Iterator[Sequence[Any]]], Iterator[Sequence[Any]]]
) -> None:
    """Replace the iterator that makes the parts of a result of the ORM by what `around` returns for it.

    A part is made when it is read: its rows are fetched, and the objects are filled.
    """
    read = result.chunks
    result.chunks = lambda size: around(read(size))
    result.iterator = chain.from_iterable(result.chunks(result._yield_per))  # noqa: SLF001 - see the module


def commit_values(state: InstanceState[Any], values: Mapping[str, Any]) -> None:
    """Give an object `values` as if they had just been loaded."""
    state.dict.update(values)
    state._commit(state.dict, values)  # noqa: SLF001 - see the module


# --- savepoints -------------------------------------------------------------------------------------------------------


def savepoints_set_on(connection: Connection) -> int:
    """Return how many savepoints have been set on a connection: SQLAlchemy numbers them."""
    number: int = getattr(connection, "_Connection__savepoint_seq")  # noqa: B009 - Python mangles such a name
    return number


def number_of_savepoint(name: str) -> int:
    """Return the number of the savepoint of that name, as `savepoints_set_on` counts them."""
    return int(name.rpartition("_")[2])


# --- engines, dialects, pools -----------------------------------------------------------------------------------------


def isolation_level_on_connect(dialect: Dialect) -> str | None:
    """Return the ``isolation_level`` that an engine was created with; ``None`` for the database's own default."""
    level: str | None = dialect._on_connect_isolation_level  # noqa: SLF001 - see the module
    return level


def pool_of(connection: PoolProxiedConnection, default: Pool | None = None) -> Pool:
    """Return the pool that a connection goes back to, which may be another one than the engine's own."""
    pool: Any = getattr(connection, "_pool", default)
    return pool  # type: ignore[no-any-return]  # `_pool` is a pool as well


class PoolNumbers(NamedTuple):
    """How many connections of a pool there are, and may be; ``None`` is no limit."""

    in_use: int
    idle: int
    waiting: int
    limit: int | None
    idle_limit: int | None


def pool_numbers(pool: Pool) -> PoolNumbers:
    """Return what a pool holds, and how many tasks wait for it; zeros for the kinds of pools that do not count."""
    if not isinstance(pool, QueuePool):
        return PoolNumbers(0, 0, 0, None, None)
    # SQLAlchemy has no limit for an overflow of -1, nor for a size of 0.
    size, overflow = pool.size(), pool._max_overflow  # noqa: SLF001 - see the module
    limit = None if overflow < 0 or size == 0 else size + overflow
    getters: Collection[Future[Any]] = ()
    if isinstance(pool, AsyncAdaptedQueuePool):
        # The queue is made when it is first used.
        queue: Any = vars(pool._pool).get("_queue")  # noqa: SLF001 - see the module
        getters = () if queue is None else tuple(queue._getters)  # noqa: SLF001 - see the module
    waiting = sum(not getter.done() for getter in getters)
    return PoolNumbers(pool.checkedout(), pool.checkedin(), waiting, limit, size or None)


def pass_on_failed_connect(pool: Pool) -> None:
    """Let the next task that waits for a connection of `pool` open one itself, as another task has failed to.

    A pool at its limit lets tasks wait until a connection is given back. A connection that could not be opened leaves a
    place free, and SQLAlchemy wakes no task for it. A pool whose tasks wait on another event loop is left alone.
    """
    counting: Any = pool
    loop = asyncio.get_running_loop()
    queue = getattr(getattr(pool, "_pool", None), "_queue", None)
    if not isinstance(queue, asyncio.Queue):
        return
    waiting: Any = queue
    is_waited_for = any(each.get_loop() is loop and not each.done() for each in tuple(waiting._getters))  # noqa: SLF001 - see the module
    # In a full queue, there is a record for each of the tasks that were woken just now, which will pass a failure on.
    if is_waited_for and not queue.full() and counting._inc_overflow():  # noqa: SLF001 - see the module
        counting._pool.put_nowait(_ConnectionRecord(pool, connect=False))  # noqa: SLF001 - see the module


def replace_terminate(dialect: Dialect, terminate: Callable[[Callable[[Any], None], Any], None]) -> None:
    """Have `terminate` called in the place of ``Dialect.do_terminate``, with that and a connection; once for a dialect.

    SQLAlchemy gives a connection up by it, and has no event for that.
    """
    _replace(dialect, "do_terminate", terminate)


def replace_connect(dialect: Dialect, connect: Callable[..., Any]) -> None:
    """Have `connect` called in the place of ``Dialect.connect``, with that and its arguments; once for a dialect.

    The event ``do_connect`` does not do: only one of its listeners can open the connection.
    """
    _replace(dialect, "connect", connect)


def follow_dialect(dialect: Dialect, name: str, around: Callable[..., Any]) -> None:
    """Have `around` called in the place of a method of the dialect, with that and its arguments.

    For ``do_execute`` and its like, ``do_commit`` and ``do_rollback``. The events of an engine tell the same, but are
    dear: SQLAlchemy makes the object that keeps the listeners of one connection anew for each. Unlike with the other
    functions here, several may follow one dialect.
    """
    # No function of Python's comes between: these run for each statement.
    wrap_in_dialect(dialect, name, lambda original: partial(around, original))


def wrap_in_dialect(dialect: Dialect, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of the dialect by the function that `wrap` returns for it: `follow_dialect` for a closure.

    A closure costs half of what a partial function does that calls one of Python's.
    """
    vars(dialect)[name] = wrap(getattr(dialect, name))


connection_of_context: Callable[[Any], Any] = attrgetter("_dbapi_connection.dbapi_connection")
"""Given an `ExecutionContext`, returns what a pool's events call the connection.

The public way, ``context.root_connection.connection``, is a property: twice the cost, for each statement.
"""


calls_on_return: Callable[[Any], deque[Callable[[Any], object]]] = attrgetter("finalize_callback")
"""Given a pool's record of a connection, returns what is called with that when it is given back, once: append to it.

The event ``checkin`` costs five times as much. Like it, this is told of no connection that was invalidated or detached:
there are events for these.
"""


def call_on_return(connection: Connection, callback: Callable[[Any], object]) -> None:
    """Have `callback` called with the connection of the driver when the pool has it back, after its reset, once."""
    record: Any = connection.connection._connection_record  # noqa: SLF001 - see the module
    calls_on_return(record).append(callback)


def listeners_of(target: Any, name: str) -> list[Callable[..., Any]]:
    """Return the listeners of an event of an engine or of a pool, with those that it has inherited from another one."""
    return list(getattr(target.dispatch, name))


def replace_raw_connection(engine: Engine, take: Callable[[Callable[[], Any]], Any]) -> None:
    """Have `take` called in the place of ``Engine.raw_connection``, with that; once for an engine.

    There is no event before a connection is waited for.
    """
    _replace(engine, "raw_connection", take)


def follow_raw_connection(engine: Engine, around: Callable[[Callable[[], Any]], Any]) -> None:
    """Have `around` called in the place of ``Engine.raw_connection``, with that.

    Unlike with `replace_raw_connection`, several may follow one engine.
    """
    vars(engine)["raw_connection"] = partial(around, engine.raw_connection)


def swap_connection(connection: Connection, take: Callable[[], PoolProxiedConnection]) -> None:
    """Give the pool's connection of `connection` back, and go on with the one that `take` returns.

    There is no public way to it. The caller knows that the open transaction has nothing on its connection that another
    one would not have.
    """
    own: Any = connection
    old, own._dbapi_connection = connection.connection, None  # noqa: SLF001 - see above
    old.close()
    own._dbapi_connection = take()  # noqa: SLF001 - see above


def listen_first(engine: Engine, name: str, listener: Callable[..., object]) -> None:
    """Listen to an event of an engine, before the listeners that it has.

    ``event.listen(..., insert=True)`` does not do it: the events of engines drop the argument.
    """
    event.listen(engine, name, listener)
    listeners = getattr(engine.dispatch, name).listeners
    listeners.appendleft(listeners.pop())


def copy_engine(engine: Engine) -> Engine:
    """Return an engine like `engine`, with a pool of its own, which is still to be taught.

    What was put in the place of ``raw_connection`` is not copied: it takes connections from the pool of `engine`.
    """
    other = copy.copy(engine)
    vars(other).pop("raw_connection", None)
    other.pool = engine.pool.recreate()
    return other


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


def _replace(owner: object, name: str, replacement: Callable[..., Any]) -> None:
    attributes = vars(owner)
    if name not in attributes:
        original = getattr(owner, name)
        attributes[name] = lambda *args, **kwargs: replacement(original, *args, **kwargs)


def driver_cursor_of(adapted: Any) -> Any:
    """Return the driver's cursor in SQLAlchemy's adapter; ``None`` where it has none."""
    return getattr(adapted, "_cursor", None)


# --- asyncpg ----------------------------------------------------------------------------------------------------------


def asyncpg_adapter_that_begins(
    cls: type, begin: Callable[[Any, Callable[[], Awaitable[None]]], Any], note_handed_out: Callable[[Any], None]
) -> type:
    """Return a class, derived from SQLAlchemy's adapter of asyncpg, that has `begin` awaited to begin a transaction.

    An adapter becomes one of the derived class by an assignment to its ``__class__``.

    Args:
        cls: the class of the adapter.
        begin: given the adapter and the function that sends BEGIN. It may exchange the driver's connection of the
            adapter. In autocommit it is awaited before each statement, and nothing is sent by that function.
        note_handed_out: called with an adapter whose driver's connection is given to code.
    """
    adapter: Any = cls
    start = adapter._start_transaction  # noqa: SLF001 - see the module
    # SQLAlchemy 2.0 names the class in the method that makes cursors.
    names_class = hasattr(cls, "_cursor_cls")
    made_as: Any = adapter._cursor_cls if names_class else sys.modules[cls.__module__].AsyncAdapt_asyncpg_cursor  # noqa: SLF001

    def start_transaction(self: Any) -> Any:
        return begin(self, partial(start, self))

    async def execute_many(self: Any, *args: Any) -> Any:
        # The cursor keeps the driver's connection that it was made with, so the transaction has to begin before.
        adapted = self._adapt_connection
        await _begin_asyncpg_transaction(adapted)
        self._connection = adapted._connection  # noqa: SLF001 - see the module
        return await made_as._executemany(self, *args)  # noqa: SLF001 - see the module

    cursor_class = _derived(made_as, {"_executemany": execute_many})

    def cursor(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = adapter.cursor(self, *args, **kwargs)
        if type(made) is made_as:
            made.__class__ = cursor_class
        return made

    making: dict[str, Any] = {"_cursor_cls": cursor_class} if names_class else {"cursor": cursor}
    return _derived(cls, {"_start_transaction": start_transaction, **making, **_handing_out(cls, note_handed_out)})


def _derived(cls: type, attributes: dict[str, Any]) -> type:
    """Return a class that objects of `cls` can be made one of: it has their layout, and other `attributes`."""
    return type(cls.__name__, (cls,), {"__slots__": (), **attributes})


def _handing_out(cls: type, note: Callable[[Any], None]) -> dict[str, Any]:
    """Return what has `note` called with an adapter that hands out the driver's connection, on which code may act."""
    adapter: Any = cls

    def driver_connection(self: Any) -> Any:
        note(self)
        return adapter.driver_connection.fget(self)

    def run_async(self: Any, fn: Callable[[Any], Awaitable[Any]]) -> Any:
        note(self)
        return adapter.run_async(self, fn)

    return {"note_handed_out": note, "driver_connection": property(driver_connection), "run_async": run_async}


def follow_handing_out(dialect: Dialect) -> None:
    """Have it noted, too, if pooled connections hand out the driver's connection of an adapter of a derived class.

    They ask the dialect for it, which passes the adapter's property by.
    """
    follow_dialect(dialect, "get_driver_connection", _hand_out)


def _hand_out(get_driver_connection: Callable[[Any], Any], adapter: Any) -> Any:
    cls: Any = type(adapter)
    if hasattr(cls, "note_handed_out"):
        cls.note_handed_out(adapter)
    return get_driver_connection(adapter)


def swap_asyncpg_connections(adapter: Any, other: Any) -> None:
    """Exchange the connections of two of SQLAlchemy's adapters of asyncpg, neither of which is in a transaction."""
    for name in ("_connection", "_prepared_statement_cache", "_invalidate_schema_cache_asof"):
        mine, others = getattr(adapter, name), getattr(other, name)
        setattr(adapter, name, others)
        setattr(other, name, mine)


def begin_asyncpg_transaction(connection: Connection) -> None:
    """Begin the transaction on the server, which SQLAlchemy does together with its first statement; in a greenlet."""
    adapted: Any = connection.connection.dbapi_connection
    if adapted._transaction is not None:  # noqa: SLF001 - see the module
        return

    try:
        await_only(_begin_asyncpg_transaction(adapted))
    except BaseException as exc:  # noqa: BLE001 - raised as SQLAlchemy raises the errors of its own statements
        connection._handle_dbapi_exception(exc, "BEGIN", None, None, None)  # noqa: SLF001 - see the module


async def _begin_asyncpg_transaction(adapted: Any) -> None:
    async with adapted._execute_mutex:  # noqa: SLF001 - see the module
        if adapted._transaction is None:  # noqa: SLF001 - see the module
            await adapted._start_transaction()  # noqa: SLF001 - see the module


def fetch_asyncpg_row(adapted: Any, query: str) -> Any:
    """Return the first row of a query, or ``None``, with errors raised as SQLAlchemy's adapter raises them."""
    try:
        return await_only(adapted._connection.fetchrow(query))  # noqa: SLF001 - see the module
    except Exception as exc:  # noqa: BLE001 - raised as another one
        adapted._handle_exception(exc)  # noqa: SLF001 - see the module


def request_asyncpg_cancellation(connection: Any) -> None:
    """Have a task of asyncpg's ask the server to stop the query of `connection`."""
    connection._cancel_current_command(asyncio.get_running_loop().create_future())  # noqa: SLF001 - see the module


def lend_asyncpg_connection(connection: Any) -> Any:
    """Return a stand-in of a connection that passes calls on until it is taken back."""
    # No dependency of ours: the driver has been imported by the code that has made the connection.
    PoolConnectionProxy = sys.modules["asyncpg.pool"].PoolConnectionProxy  # noqa: N806 - as it is called there
    if isinstance(connection, PoolConnectionProxy):
        # The engine takes its connections out of a pool of asyncpg's own.
        return connection
    proxy = PoolConnectionProxy(None, connection)
    # When a connection drops its caches, it asks its proxy for the pool: this proxy has none.
    connection._set_proxy(None)  # noqa: SLF001 - see the module
    return proxy


def take_back_asyncpg_connection(proxy: Any) -> None:
    """Have a stand-in, and all cursors, prepared statements and transactions made by it, refuse every further call."""
    if proxy._holder is None and (connection := proxy._detach()) is not None:  # noqa: SLF001 - see the module
        connection._pool_release_ctr += 1  # noqa: SLF001 - see the module


def forget_prepared_statements(adapted: Any) -> None:
    """Have SQLAlchemy prepare its statements anew on a connection of asyncpg's."""
    cache = adapted._prepared_statement_cache  # noqa: SLF001 - see the module
    if cache is not None:
        cache.clear()


# --- psycopg ----------------------------------------------------------------------------------------------------------


def psycopg_adapter_that_executes(cls: type, execute: Callable[[FirstStatement], Any]) -> type:
    """Return a class, derived from SQLAlchemy's adapter of psycopg, that has `execute` called for its first statement.

    An adapter becomes one of the derived class by an assignment to its ``__class__``, and one of `cls` again as soon as
    it makes a cursor, or code is given the driver's connection.
    """
    made_by: Any = cls
    cursors: dict[type, tuple[type, tuple[str, ...]]] = {}

    def own_class(self: Any) -> None:
        self.__class__ = cls

    def cursor(self: Any, *args: Any) -> Any:
        own_class(self)
        made = made_by.cursor(self, *args)
        made_as = type(made)
        if made_as not in cursors:
            cursors[made_as] = _cursor_with_first_statement(made_as, execute), _slots_of(made)
        first_class, slots = cursors[made_as]
        first: Any = _new(first_class)
        _copy(made, first, slots)
        first.first = FirstStatement(self, first, partial(made_by.cursor, self, *args), slots)
        return first

    return _derived(cls, {"cursor": cursor, **_handing_out(cls, own_class)})


def _cursor_with_first_statement(cls: Any, execute: Callable[[FirstStatement], Any]) -> type:
    def executing(name: str) -> Callable[..., Any]:
        original = getattr(cls, name)

        def execute_statement(self: Any, *args: Any, **kwargs: Any) -> Any:
            first, self.first = self.first, None
            if first is None:
                return original(self, *args, **kwargs)
            first.execute = partial(original, self, *args, **kwargs)
            return execute(first)

        return execute_statement

    methods = {name: executing(name) for name in ("execute", "executemany")}
    return type(cls.__name__, (cls,), {"__slots__": ("first",), **methods})


def _slots_of(value: Any) -> tuple[str, ...]:
    names = chain.from_iterable(vars(cls).get("__slots__", ()) for cls in type(value).__mro__)
    return tuple(name for name in names if hasattr(value, name))


def _copy(source: object, target: object, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(target, name, getattr(source, name))


class FirstStatement:
    """The first statement that SQLAlchemy's adapter of psycopg executes.

    Args:
        adapter: SQLAlchemy's adapter of the connection.
        cursor: SQLAlchemy's adapter of the cursor that executes it.
        make_cursor: makes another one.
        slots: the names of the cursor's attributes.
    """

    __slots__ = ("_adapter", "_cursor", "_make_cursor", "_slots", "execute")

    def __init__(self, adapter: Any, cursor: Any, make_cursor: Callable[[], Any], slots: tuple[str, ...]) -> None:
        self._adapter = adapter
        self._cursor = cursor
        self._make_cursor = make_cursor
        self._slots = slots
        self.execute: Callable[[], Any]
        """Executes the statement."""

    @property
    def connection(self) -> Any:
        """The driver's connection."""
        return self._adapter._connection  # noqa: SLF001 - see the module

    @property
    def may_have_been_sent(self) -> bool:
        """Whether more than BEGIN may have been sent: psycopg sets the query of its cursor when BEGIN was answered."""
        return self._cursor._cursor._query is not None  # noqa: SLF001 - see the module

    def swap_connections(self, other: Any) -> None:
        """Exchange the connections of the adapter and of `other`, neither of which has begun a transaction."""
        mine, others = self._adapter._connection, other._connection  # noqa: SLF001 - see the module
        for name in ("autocommit", "isolation_level", "read_only", "deferrable"):
            value = getattr(mine, name)
            if getattr(others, name) != value:
                await_only(getattr(others, f"set_{name}")(value))
        self._adapter._connection, other._connection = others, mine  # noqa: SLF001 - see the module
        self._cursor.close()
        _copy(self._make_cursor(), self._cursor, self._slots)


def psycopg_connection_that_stops(cls: type, stop: Callable[[Any], Awaitable[None]]) -> type:
    """Return a class, derived from a class of psycopg's connections, that has `stop` awaited to stop a cancelled query.

    A connection becomes one of the derived class by an assignment to its ``__class__``. After `stop`, which has to read
    the answer or to close the connection, the cancelled call ends. In a pipeline, psycopg goes on with it.
    """

    async def try_cancel(self: Any, *, timeout: float = 5.0) -> None:
        # The call that was cancelled is a generator in the frame of psycopg's `wait`, which goes on with it after this
        # function. Other callers of this function have no such generator.
        call = sys._getframe(1).f_locals.get("gen")  # noqa: SLF001 - see the module
        await stop(self)
        if call is not None and not self.pgconn.pipeline_status:
            # If the call was cancelled while its transaction began, it would send its statement now.
            call.close()

    pipeline_of: Any = getattr(cls, "_pipeline_nolock", None)

    @asynccontextmanager
    async def pipeline_nolock(self: Any) -> AsyncIterator[Any]:
        # The pipeline of `executemany`. Where it is interrupted while it begins, psycopg leaves it open and raises an
        # `AssertionError`: SQLAlchemy would not know of the interruption, and would keep the connection.
        try:
            async with pipeline_of(self) as pipeline:
                yield pipeline
        except AssertionError as exc:
            if exc.__context__ is None or isinstance(exc.__context__, Exception):
                raise
            raise exc.__context__ from None

    attributes: dict[str, Any] = {"__module__": cls.__module__, "_try_cancel": try_cancel}
    if pipeline_of is not None:
        attributes["_pipeline_nolock"] = pipeline_nolock
    return type(cls.__name__, (cls,), attributes)


async def read_psycopg_answer(connection: Any) -> None:
    """Send the rest of the command that is under way on a connection of psycopg, and read its answer to the end.

    Nothing else is sent. In a pipeline, this returns as soon as the server sends something; with COPY, before the data.
    """
    # This package does not depend on psycopg, which has imported both for the connection.
    generators, waiting = sys.modules["psycopg.generators"], sys.modules["psycopg.waiting"]

    def until_readable() -> Generator[Any, Any, None]:
        while not (yield waiting.WAIT_R):
            pass

    pgconn = connection.pgconn
    reading = until_readable() if pgconn.pipeline_status else generators.execute(pgconn)
    # A descriptor of its own for the same socket: another task may close the connection meanwhile, and the event loop
    # would go on listening to a number that the next connection gets.
    with socket.fromfd(pgconn.socket, socket.AF_INET, socket.SOCK_STREAM) as own:
        await waiting.wait_async(reading, own.fileno(), interval=1.0)


def close_psycopg_cursor(adapted: Any) -> None:
    """Close psycopg's cursor in SQLAlchemy's adapter, and nothing on the server; do nothing for other drivers."""
    cursor = driver_cursor_of(adapted)
    if type(cursor).__module__.partition(".")[0] == "psycopg":
        cursor._close()  # noqa: SLF001 - see the module


def lend_psycopg_connection(connection: Any) -> Any:
    """Return a stand-in of a connection, of a derived class and with the very same state, until it is taken back.

    Cursors, transactions and pipelines that are made by the stand-in ask it for all that they do.
    """
    cls = type(connection)
    if cls not in _psycopg_loans:
        # Both classes have the same layout, so a stand-in of the first can be turned into one of the second.
        lent = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__del__": _delete_nothing})
        refusing = type(cls.__name__, (lent,), {"__module__": cls.__module__, "__getattribute__": _refuse_attribute})
        _psycopg_loans[cls] = (lent, refusing)
    loan: Any = object.__new__(_psycopg_loans[cls][0])
    loan.__dict__ = connection.__dict__
    return loan


def take_back_psycopg_connection(loan: Any) -> None:
    """Have a stand-in, and all cursors, transactions and pipelines made by it, refuse every further call."""
    for lent, refusing in _psycopg_loans.values():
        if type(loan) is lent:
            loan.__class__ = refusing


_psycopg_loans: dict[type, tuple[type, type]] = {}
"""For each class of connections, that of their stand-ins, and that of stand-ins which were taken back."""


def _delete_nothing(self: Any) -> None:
    """Stand in for the method that warns when an open connection is deleted: the pool has this connection still."""


def _refuse_attribute(self: Any, name: str) -> Any:
    if name.startswith("__"):
        return object.__getattribute__(self, name)
    raise sys.modules["psycopg"].InterfaceError(
        "This connection was released back to the pool, as its transaction has ended: it may serve another one. Ask "
        "the session for its connection in each transaction."
    )


# --- asyncpg, asyncmy, aiomysql ---------------------------------------------------------------------------------------


def raise_translated(adapted: Any, error: Exception) -> None:
    """Raise an `error` of asyncpg as SQLAlchemy raises it from that driver: as the DBAPI's error of its kind."""
    adapted._handle_exception(error)  # noqa: SLF001 - there is no public name for it


def transport_of(connection: Any) -> asyncio.BaseTransport | None:
    """Return what a connection of asyncpg, asyncmy or aiomysql sends by; ``None`` where the driver has changed."""
    transport = getattr(connection, "_transport", None)
    if transport is None:
        transport = getattr(getattr(connection, "_writer", None), "transport", None)
    return transport
