"""Recognises a pooler between this process and PostgreSQL, where a session's settings may reach other programs.

A connection is given the number of its server process when it starts (PostgreSQL, "BackendKeyData"), to cancel queries
by. A pooler gives its clients numbers of its own, as it has to pass on their requests to cancel. Where that number is
not the one of the process that answers, there is a pooler in between: that much is certain. Whether it pools sessions
or transactions cannot be told, so transactions are assumed.
"""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["BEHIND_POOLER", "ask", "is_behind_pooler", "number_of", "tell_wrong_settings"]

logger = logging.getLogger("ctxdb")

BEHIND_POOLER = "ctxdb.behind_pooler"
"""Where the ``info`` of a connection says whether it leads to a pooler, if that is known."""


def is_behind_pooler(connection: Connection) -> bool:
    """Return whether what a session sets on `connection` may reach another program's; asks the server once.

    Only connections in autocommit need the question: a setting that is local to a transaction reaches no other program.
    """
    info = connection.info
    if BEHIND_POOLER not in info:
        pid = number_of(connection.connection.driver_connection)
        answer = None if pid is None else connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        info[BEHIND_POOLER] = answer != pid
    return bool(info[BEHIND_POOLER])


def number_of(driver_connection: Any) -> int | None:
    """Return the number by which a driver's connection cancels queries."""
    if hasattr(driver_connection, "get_server_pid"):
        number: int = driver_connection.get_server_pid()
        return number
    pgconn = getattr(driver_connection, "pgconn", None)
    # Libpq has no answer for a connection that is closed.
    return None if pgconn is None or driver_connection.closed else pgconn.backend_pid


def ask(dbapi_connection: Any, query: str) -> Any:
    """Return the first column of the first row of a query."""
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
        number = number_of(getattr(dbapi_connection, "driver_connection", None))
        if not wrong or number is None:
            return
        try:
            answer = ask(dbapi_connection, "SELECT pg_backend_pid()")
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
