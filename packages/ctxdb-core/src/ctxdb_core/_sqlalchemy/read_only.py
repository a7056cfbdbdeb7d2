"""Engines of PostgreSQL on which each query is one round trip, as they are in autocommit, and nothing can be written.

Two kinds of connections have transactions all the same:

- Those behind a pooler, where what is set for the session would be another client's in the next moment. Each of their
  transactions begins by BEGIN READ ONLY.
- Those from which a result is read bit by bit (`session.stream()`), as PostgreSQL has cursors in transactions only.
  They have autocommit again when they are given back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, event
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core._sqlalchemy.poolers import BEHIND_POOLER, ask, number_of
from ctxdb_core._sqlalchemy.private import call_on_return, replace_isolation_level, wrap_in_dialect

__all__ = ["has_transactions", "make_read_only", "skip_savepoints_in_autocommit"]

_SKIPPED_SAVEPOINTS = "ctxdb.skipped_savepoints"
"""Where the ``info`` of a connection has the names of savepoints that were not set.

The names begin anew with each use of the connection.
"""


def has_transactions(connection: Connection) -> bool:
    """Return whether a read-only connection has transactions instead of autocommit."""
    if connection.dialect.name != "postgresql" or connection.closed or connection.invalidated:
        return False
    return not connection.dialect.detect_autocommit_setting(_dbapi_connection(connection))


def make_read_only(engine: AsyncEngine) -> None:
    """Have PostgreSQL refuse writes on `engine`, which was created with autocommit.

    Nothing is sent as a start-up parameter, which poolers refuse, or are told to ignore. A new connection asks for the
    setting by its first query, under the condition that its own server process answers. Behind a pooler, the setting
    would be another client's in the next moment, so there each transaction begins by BEGIN READ ONLY.
    """
    own_server: WeakSet[Any] = WeakSet()
    dialect = engine.dialect

    def set_level(set_isolation_level: Callable[[Any, str], None], dbapi_connection: Any, level: str) -> None:
        # Until the server is known to be the connection's own, each query runs in a transaction, which no pooler
        # divides: asyncpg sends a query in two parts.
        if level == "AUTOCOMMIT" and dbapi_connection.driver_connection not in own_server:
            level = "READ COMMITTED"
        set_isolation_level(dbapi_connection, level)

    def make_connection_read_only(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        _set_transactions_read_only(dialect, dbapi_connection, is_on=True)
        number = number_of(dbapi_connection.driver_connection)
        answer = ask(
            dbapi_connection,
            f"SELECT CASE WHEN pg_backend_pid() = {number or 0} "
            "THEN set_config('default_transaction_read_only', 'on', false) END",
        )
        dbapi_connection.commit()
        record.info[BEHIND_POOLER] = answer != "on"
        if answer == "on":
            own_server.add(dbapi_connection.driver_connection)
            _set_transactions_read_only(dialect, dbapi_connection, is_on=False)
            dialect.set_isolation_level(dbapi_connection, "AUTOCOMMIT")

    made_by = dialect.execution_ctx_cls
    dialect.execution_ctx_cls = type(made_by.__name__, (_Execution, made_by), {})
    replace_isolation_level(dialect, set_level)
    skip_savepoints_in_autocommit(dialect)
    event.listen(engine.sync_engine, "connect", make_connection_read_only)


def skip_savepoints_in_autocommit(dialect: Dialect) -> None:
    """Let a block that would go on behind a savepoint go on without one where a read-only connection is in autocommit.

    PostgreSQL refuses a savepoint outside of a transaction. There is nothing to undo, and an error ends nothing.
    """

    def set_savepoint(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(connection: Connection, name: str) -> None:
            skipped = _skipped_savepoints(connection)
            if dialect.detect_autocommit_setting(_dbapi_connection(connection)):
                skipped.add(name)
            else:
                skipped.discard(name)
                original(connection, name)

        return run

    def roll_back(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(connection: Connection, name: str) -> None:
            if name not in _skipped_savepoints(connection):
                original(connection, name)
            elif not dialect.detect_autocommit_setting(dbapi_connection := _dbapi_connection(connection)):
                # The block has begun a transaction, which its error may have aborted.
                dbapi_connection.rollback()

        return run

    def release(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(connection: Connection, name: str) -> None:
            if name not in _skipped_savepoints(connection):
                original(connection, name)

        return run

    wrap_in_dialect(dialect, "do_savepoint", set_savepoint)
    wrap_in_dialect(dialect, "do_rollback_to_savepoint", roll_back)
    wrap_in_dialect(dialect, "do_release_savepoint", release)


def _skipped_savepoints(connection: Connection) -> set[str]:
    skipped: set[str] = connection.info.setdefault(_SKIPPED_SAVEPOINTS, set())
    return skipped


def _dbapi_connection(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def _set_transactions_read_only(dialect: Dialect, dbapi_connection: Any, *, is_on: bool) -> None:
    postgresql: Any = dialect
    # To psycopg, None is the server's own default; asyncpg knows no such thing, and says nothing of it in BEGIN.
    postgresql.set_readonly(dbapi_connection, True if is_on else None)


class _Execution(DefaultExecutionContext):
    """The execution of a statement; this class comes before the dialect's own."""

    def create_server_side_cursor(self) -> Any:
        _leave_autocommit(self.root_connection)
        return super().create_server_side_cursor()


def _leave_autocommit(connection: Connection) -> None:
    """Let the next statement on `connection` begin a transaction, and have autocommit back with its return."""
    dialect, dbapi_connection = connection.dialect, _dbapi_connection(connection)
    if not dialect.detect_autocommit_setting(dbapi_connection):
        return
    call_on_return(connection, dialect.reset_isolation_level)
    dialect.set_isolation_level(dbapi_connection, "READ COMMITTED")
