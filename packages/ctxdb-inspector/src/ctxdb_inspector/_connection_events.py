"""`follow_connections`: notes each connection that an application takes, its statements, its end and its return."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from ctxdb_core.adapters import (
    UnitOfWork,
    acquiring_instruction,
    calls_on_return,
    connection_of_context,
    listeners_of,
    running_unit,
    wrap_in_dialect,
)
from ctxdb_inspector._pool_track import PoolTrack
from ctxdb_inspector._records import LONGEST_STATEMENT, HoldRecord, describe

__all__ = ["Follower", "follow_connections"]


class Follower(Protocol):
    """What is told of connections that are taken and given back."""

    def follow_unit(self, unit: UnitOfWork, hold: HoldRecord, opened: float | None) -> None:
        """Follow a unit of work that has taken its first connection.

        Args:
            unit: the unit of work. Its watcher is found by this follower, from now on.
            hold: what is known of the connection.
            opened: when the unit has opened its first session, if it has.
        """

    def note_peak(self, pool: PoolTrack, now: float) -> None:
        """Note that more connections are in use than at any time since the last sample."""

    def sample(self) -> None:
        """Sample the pools, as the time for that has come."""


def follow_connections(engine: AsyncEngine, pool: PoolTrack, follower: Follower) -> None:
    """Have all that becomes of the connections of an engine noted, from now on.

    Args:
        engine: whose connections.
        pool: where what is known of each connection is kept while it is in use.
        follower: is told of units of work, and of the highest number of connections in use.
    """
    # Closures, and few attributes that are looked up: these run for each statement of the application. What is
    # shown is put together when somebody looks.
    held, hold_of, now = pool.held, pool.held.get, perf_counter

    def checkout(dbapi_connection: object, entry: ConnectionPoolEntry, proxy: object) -> None:
        hold = held[dbapi_connection] = HoldRecord()
        hold.pool = pool
        hold.taken = now()
        hold.place = acquiring_instruction()
        hold.statements = hold.settled = 0
        calls_on_return(entry).append(checkin)
        unit = running_unit()
        if unit is not None:
            registration = unit.registration
            record: Any = None if registration is None else registration.watchers.get(follower)
            if record is None:
                follower.follow_unit(unit, hold, None if registration is None else registration.opened)
            else:
                hold.unit = record
                record.add(hold)
        if len(held) > pool.peak:
            follower.note_peak(pool, hold.taken)

    def checkin(dbapi_connection: object) -> None:
        hold = held.pop(dbapi_connection, None)
        if hold is not None:
            # The two refer to each other until now; when they are forgotten, nothing has to look for cycles.
            hold.unit = None
            hold.returned = returned = now()
            if returned >= pool.next_sample:
                follower.sample()

    def lose(dbapi_connection: object, entry: object, exception: object = None) -> None:
        # What was invalidated or detached is not given back.
        checkin(dbapi_connection)

    def share(dbapi_connection: object, entry: ConnectionPoolEntry, proxy: object) -> None:
        # All have one connection, as with a database in memory: it goes from one to the next.
        checkin(dbapi_connection)
        checkout(dbapi_connection, entry, proxy)

    def execute(original: Callable[..., None]) -> Callable[..., None]:
        def execute(cursor: Any, statement: str, parameters: Any, context: ExecutionContext | None = None) -> None:
            # SQLAlchemy asks the server of a new engine before any connection is taken, and without a context.
            hold = None if context is None else hold_of(connection_of_context(context))
            if hold is None:
                original(cursor, statement, parameters, context)
                return
            hold.statement = statement if len(statement) <= LONGEST_STATEMENT else statement[:LONGEST_STATEMENT]
            hold.statements += 1
            hold.running_since = now()
            try:
                original(cursor, statement, parameters, context)
            finally:
                hold.running_since = None

        return execute

    def execute_no_params(original: Callable[..., None]) -> Callable[..., None]:
        follow = execute(lambda cursor, statement, _, context: original(cursor, statement, context))
        return lambda cursor, statement, context=None: follow(cursor, statement, (), context)

    def commit(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def commit(connection: Any) -> None:
            hold = hold_of(connection.dbapi_connection)
            if hold is None:
                original(connection)
                return
            hold.commit_at = now()
            hold.outcome = "committing"
            original(connection)
            hold.outcome = "committed"
            hold.settled = hold.statements

        return commit

    def rollback(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def rollback(connection: Any) -> None:
            hold = hold_of(connection.dbapi_connection)
            # A pool also rolls back what it is given; nothing has begun then.
            if hold is not None and hold.statements > hold.settled:
                hold.settled = hold.statements
                hold.commit_at = hold.commit_at or now()
                if hold.outcome != "commit failed":
                    hold.outcome = "rolled back"
            original(connection)

        return rollback

    def handle_error(context: ExceptionContext) -> None:
        conn = context.connection
        hold = None if conn is None or conn.invalidated or conn.closed else hold_of(conn.connection.dbapi_connection)
        if hold is not None:
            hold.running_since = None
            hold.error = describe(context.sqlalchemy_exception or context.original_exception)
            if hold.outcome == "committing":
                hold.outcome = "commit failed"

    sync_engine = engine.sync_engine
    # An engine for another event loop has the listeners of the first one, and several databases may have one pool.
    if not any(getattr(each, "follower", None) is follower for each in listeners_of(sync_engine.pool, "checkout")):
        take = share if isinstance(sync_engine.pool, StaticPool) else checkout
        take.follower = follower  # type: ignore[attr-defined]  # type checkers know no attributes of functions
        event.listen(sync_engine, "checkout", take)
        event.listen(sync_engine, "invalidate", lose)
        event.listen(sync_engine, "detach", lose)
    event.listen(sync_engine, "handle_error", handle_error)
    dialect = sync_engine.dialect
    if dialect not in pool.dialects:
        pool.dialects.add(dialect)
        wrap_in_dialect(dialect, "do_execute", execute)
        wrap_in_dialect(dialect, "do_executemany", execute)
        wrap_in_dialect(dialect, "do_execute_no_params", execute_no_params)
        wrap_in_dialect(dialect, "do_commit", commit)
        wrap_in_dialect(dialect, "do_rollback", rollback)
