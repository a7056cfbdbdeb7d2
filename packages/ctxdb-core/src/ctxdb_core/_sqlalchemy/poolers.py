"""Recognises a pooler between this process and PostgreSQL, where a session's settings may reach other programs.

A connection is given the number of its server process when it starts (PostgreSQL, "BackendKeyData"), to cancel queries
by. A pooler gives its clients numbers of its own, as it has to pass on their requests to cancel. Where that number is
not the one of the process that answers, there is a pooler in between: that much is certain. Whether it pools sessions
or transactions cannot be told, so transactions are assumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core._sqlalchemy.private import replace_isolation_level, wrap_in_dialect

__all__ = [
    "is_behind_pooler",
    "is_known_to_be_pooled",
    "make_read_only",
    "skip_savepoints_in_autocommit",
    "tell_wrong_settings",
]

logger = logging.getLogger("ctxdb")

_BEHIND_POOLER = "ctxdb.behind_pooler"


def is_behind_pooler(connection: Connection) -> bool:
    """Return whether what a session sets on `connection` may reach another program's; asks the server once.

    Only connections in autocommit need the question: a setting that is local to a transaction reaches no other program.
    """
    info = connection.info
    if _BEHIND_POOLER not in info:
        pid = _number_of(connection.connection.driver_connection)
        answer = None if pid is None else connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        info[_BEHIND_POOLER] = answer != pid
    return bool(info[_BEHIND_POOLER])


def is_known_to_be_pooled(connection: Connection) -> bool:
    """Return whether `connection` is a read-only one behind a pooler, which has transactions instead of autocommit."""
    return not connection.closed and not connection.invalidated and bool(connection.info.get(_BEHIND_POOLER))


def _number_of(driver_connection: Any) -> int | None:
    """Return the number by which a driver's connection cancels queries."""
    if hasattr(driver_connection, "get_server_pid"):
        number: int = driver_connection.get_server_pid()
        return number
    pgconn = getattr(driver_connection, "pgconn", None)
    # Libpq has no answer for a connection that is closed.
    return None if pgconn is None or driver_connection.closed else pgconn.backend_pid


# --- read-only engines ------------------------------------------------------------------------------------------------


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
        has_autocommit = dbapi_connection.driver_connection in own_server
        set_isolation_level(dbapi_connection, level if level != "AUTOCOMMIT" or has_autocommit else "READ COMMITTED")

    def make_connection_read_only(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        _set_transactions_read_only(dialect, dbapi_connection, is_on=True)
        number = _number_of(dbapi_connection.driver_connection)
        answer = _ask(
            dbapi_connection,
            f"SELECT CASE WHEN pg_backend_pid() = {number or 0} "
            "THEN set_config('default_transaction_read_only', 'on', false) END",
        )
        dbapi_connection.commit()
        record.info[_BEHIND_POOLER] = answer != "on"
        if answer == "on":
            own_server.add(dbapi_connection.driver_connection)
            _set_transactions_read_only(dialect, dbapi_connection, is_on=False)
            dialect.set_isolation_level(dbapi_connection, "AUTOCOMMIT")

    replace_isolation_level(dialect, set_level)
    skip_savepoints_in_autocommit(dialect)
    event.listen(engine.sync_engine, "connect", make_connection_read_only)


def skip_savepoints_in_autocommit(dialect: Dialect) -> None:
    """Let a block that would go on behind a savepoint go on without one where a read-only connection is in autocommit.

    PostgreSQL refuses a savepoint outside of a transaction. There is nothing to undo, and an error ends nothing.
    """

    def unless_in_autocommit(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(connection: Connection, name: str) -> None:
            dbapi_connection: Any = connection.connection.dbapi_connection
            if not dialect.detect_autocommit_setting(dbapi_connection):
                original(connection, name)

        return run

    for name in ("do_savepoint", "do_rollback_to_savepoint", "do_release_savepoint"):
        wrap_in_dialect(dialect, name, unless_in_autocommit)


def _set_transactions_read_only(dialect: Dialect, dbapi_connection: Any, *, is_on: bool) -> None:
    postgresql: Any = dialect
    # To psycopg, None is the server's own default; asyncpg knows no such thing, and says nothing of it in BEGIN.
    postgresql.set_readonly(dbapi_connection, True if is_on else None)


def _ask(dbapi_connection: Any, query: str) -> Any:
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(query)
        return cursor.fetchone()[0]
    finally:
        cursor.close()


# --- settings of drivers ----------------------------------------------------------------------------------------------


def tell_wrong_settings(engine: AsyncEngine) -> None:
    """Log a warning if the first connection of `engine` leads to a pooler, and its driver is set up for a server."""
    sync_engine = engine.sync_engine
    if engine.dialect.name != "postgresql":
        return
    first = _FirstConnection(engine.dialect.driver)
    event.listen(sync_engine, "do_connect", first.note_arguments)
    event.listen(sync_engine, "connect", first.look)


class _FirstConnection:
    """Looks at the first connection of an engine."""

    def __init__(self, driver: str) -> None:
        self._driver = driver
        self._has_looked = False
        self._arguments: dict[str, Any] = {}

    def note_arguments(self, dialect: object, record: object, arguments: object, options: dict[str, Any]) -> None:
        if not self._has_looked:
            self._arguments = dict(options)

    def look(self, dbapi_connection: Any, record: object) -> None:
        if self._has_looked:
            return
        self._has_looked = True
        wrong = self._wrong_settings(dbapi_connection)
        self._arguments = {}
        number = _number_of(getattr(dbapi_connection, "driver_connection", None))
        if not wrong or number is None:
            return
        try:
            answer = _ask(dbapi_connection, "SELECT pg_backend_pid()")
            dbapi_connection.rollback()
        except Exception:
            logger.debug("It could not be found out whether there is a pooler", exc_info=True)
            dbapi_connection.rollback()
            return
        if answer != number:
            logger.warning(
                "There is a pooler between this process and PostgreSQL: it has given the connection the number %s, and "
                "server process %s answers. If it pools transactions, %s: statements are prepared on one of the "
                "server's connections and looked for on another. See docs/behind-a-pooler.md; a pooler that pools "
                "sessions, or knows prepared statements (PgBouncer from 1.21 with max_prepared_statements), needs "
                "nothing.",
                number,
                answer,
                wrong,
            )

    def _wrong_settings(self, dbapi_connection: Any) -> str:
        if self._driver == "asyncpg":
            given = self._arguments
            wanted = []
            if given.get("statement_cache_size") != 0:
                wanted.append("`statement_cache_size=0`")
            if given.get("prepared_statement_cache_size") != 0:
                wanted.append("`prepared_statement_cache_size=0`")
            if given.get("prepared_statement_name_func") is None:
                wanted.append("a `prepared_statement_name_func` that makes unique names")
            return f"asyncpg's `connect_args` need {', '.join(wanted)}" if wanted else ""
        driver_connection = dbapi_connection.driver_connection
        if getattr(driver_connection, "prepare_threshold", None) is not None:
            return "psycopg's `connect_args` need `prepare_threshold=None`"
        return ""
