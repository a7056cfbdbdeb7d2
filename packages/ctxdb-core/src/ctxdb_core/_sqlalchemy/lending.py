"""A driver's connection that the user's code has taken: in the transaction from the first call, and not beyond its end.

``(await (await session.connection()).get_raw_connection()).driver_connection`` is asyncpg's own connection, for
``copy_records_to_table`` and for cursors of its own. Two things go wrong with it by itself. SQLAlchemy begins the
transaction with its own first statement, so that what the driver is told before that is committed at once. And a driver
connection that is kept for longer than the transaction reaches into the transaction of another request.

So `begin_on_server` begins the transaction when the session's connection is asked for; and what is handed out is
asyncpg's own stand-in for connections of a pool (``PoolConnectionProxy``), which refuses each call once the connection
was given back. Cursors, prepared statements and transactions that were made by it refuse theirs, too.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core._sqlalchemy.private import (
    ConnectionFairy,
    begin_asyncpg_transaction,
    forget_prepared_statements,
    lend_asyncpg_connection,
    listen_once,
    pool_of,
    take_back_asyncpg_connection,
)

__all__ = ["lend_driver_connection"]

_LOAN = "ctxdb.loan"


def lend_driver_connection(connection: Connection) -> None:
    """Begin the transaction of `connection` on the server, and lend the driver's connection for as long as it lasts."""
    if connection.dialect.driver != "asyncpg":
        # psycopg begins by itself before anything that it sends.
        return
    begin_asyncpg_transaction(connection)
    pooled: Any = connection.connection
    if type(pooled) is ConnectionFairy:
        # An object of this one loan: the pool makes another one each time.
        pooled.__class__ = _LentConnection


class _LentConnection(ConnectionFairy):
    """A pooled connection whose driver connection is taken back when it returns to the pool."""

    __slots__ = ()

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # SQLAlchemy's is a property as well
        info = self.record_info
        if info is None:
            # It was detached from its pool, and is nobody else's from then on.
            return super().driver_connection
        if _LOAN not in info:
            info[_LOAN] = lend_asyncpg_connection(super().driver_connection)
            listen_once(pool_of(self), "checkin", _take_back)
        return info[_LOAN]


def _take_back(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    loan = record.record_info.pop(_LOAN, None) if record.record_info else None
    if loan is not None:
        take_back_asyncpg_connection(loan)
        if dbapi_connection is not None:
            # SQLAlchemy's own prepared statements are refused from now on as well.
            forget_prepared_statements(dbapi_connection)
