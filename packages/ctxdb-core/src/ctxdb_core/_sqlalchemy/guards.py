"""Puts all guards on an engine; each guard has a module of its own."""

from __future__ import annotations

from weakref import WeakSet

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core._sqlalchemy.cancelled_queries import keep_cancellation_at_pool, stop_cancelled_queries
from ctxdb_core._sqlalchemy.connection_context import connect_without_hidden_variables
from ctxdb_core._sqlalchemy.cursors import follow_cursors
from ctxdb_core._sqlalchemy.failed_transactions import detect_silent_rollback
from ctxdb_core._sqlalchemy.lost_commits import call_lost_commits_unknown
from ctxdb_core._sqlalchemy.poolers import tell_wrong_settings
from ctxdb_core._sqlalchemy.private import replace_connection_class
from ctxdb_core._sqlalchemy.savepoints import begin_before_savepoints
from ctxdb_core._sqlalchemy.stale_connections import replace_closed_connections

__all__ = ["teach"]

_taught: WeakSet[Engine] = WeakSet()


def teach(bind: Engine | Connection) -> None:
    """Teach an engine, or that of a connection, what every engine of a `DBConnect` is taught; once for each engine.

    An engine that sessions choose by a ``get_bind`` or ``binds`` of their own is taught when it is first seen. The
    guards stay on it.
    """
    sync_engine = bind.engine
    if sync_engine in _taught:
        return
    _taught.add(sync_engine)
    if not sync_engine.dialect.is_async:
        # SQLAlchemy refuses a synchronous engine to an asynchronous session.
        return
    replace_connection_class(sync_engine)
    engine = AsyncEngine(sync_engine)
    connect_without_hidden_variables(engine)
    replace_closed_connections(engine)
    stop_cancelled_queries(engine)
    keep_cancellation_at_pool(engine)
    detect_silent_rollback(engine)
    call_lost_commits_unknown(engine)
    begin_before_savepoints(engine)
    follow_cursors(engine)
    tell_wrong_settings(engine)
