"""A driver's connection that the user's code has taken: in the transaction from the first call, and not beyond its end.

``(await (await session.connection()).get_raw_connection()).driver_connection`` is asyncpg's own connection, for
``copy_records_to_table`` and for cursors of its own. Two things go wrong if the driver's connection is handed out as it
is. SQLAlchemy begins the transaction with its own first statement, so the work that the driver does before that is
committed at once. And a driver connection that is kept for longer than the transaction reaches into the transaction of
another request.

So the transaction is begun when the session's connection is asked for. The user's code gets a stand-in, which refuses
each call once the connection was given back: for asyncpg, its own proxy for connections of a pool
(``PoolConnectionProxy``); for psycopg, an object that shares the state of its connection. Cursors, prepared statements
and transactions that were made by the stand-in refuse their calls, too.

SQLAlchemy does not see the statements that the driver makes. One that fails, and whose error is swallowed, has aborted
the transaction all the same; so the server is asked before the commit of a transaction whose connection was lent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import ref

from sqlalchemy import Connection
from sqlalchemy.pool import ConnectionPoolEntry

from ctxdb_core._sqlalchemy.failed_transactions import check_transaction
from ctxdb_core._sqlalchemy.private import (
    ConnectionFairy,
    begin_asyncpg_transaction,
    forget_prepared_statements,
    lend_asyncpg_connection,
    lend_psycopg_connection,
    listen_once,
    pool_of,
    take_back_asyncpg_connection,
    take_back_psycopg_connection,
)

__all__ = ["lend_driver_connection"]

_LOAN = "ctxdb.loan"
_BORROWER = "ctxdb.borrower"
"""The `Connection` whose transaction the driver's connection is in, by a weak reference."""


def lend_driver_connection(connection: Connection) -> None:
    """Begin the transaction of `connection` on the server, and lend the driver's connection for as long as it lasts."""
    driver = connection.dialect.driver
    if driver not in _LENDERS:
        return
    if driver == "asyncpg":
        # psycopg needs no help: it sends BEGIN by itself before the first statement.
        begin_asyncpg_transaction(connection)
    pooled: Any = connection.connection
    # A connection that was detached from its pool has no record there. It belongs to the code that has detached it.
    if type(pooled) is ConnectionFairy and pooled.record_info is not None:
        # The pool makes another `ConnectionFairy` at each check-out, so the class of this one can be changed.
        pooled.__class__ = _LentConnection
        pooled.record_info[_BORROWER] = ref(connection)


class _LentConnection(ConnectionFairy):
    """A pooled connection whose driver connection is taken back when it returns to the pool."""

    __slots__ = ()

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # SQLAlchemy's is a property as well
        info = self.record_info
        if info is None:
            # The connection was detached from its pool, and belongs to the caller from then on.
            return super().driver_connection
        if _LOAN not in info:
            driver_connection = super().driver_connection
            lender = _lender_of(driver_connection)
            if lender is None:
                return driver_connection
            lend, take_back = lender
            info[_LOAN] = (lend(driver_connection), take_back)
            if (borrower := info[_BORROWER]()) is not None:
                listen_once(borrower, "commit", check_transaction)
            listen_once(pool_of(self), "checkin", _take_back)
        return info[_LOAN][0]


def _lender_of(driver_connection: object) -> _Lender | None:
    # Applications derive classes of their own from the driver's.
    names = (cls.__module__.partition(".")[0] for cls in type(driver_connection).__mro__)
    return next((_LENDERS[name] for name in names if name in _LENDERS), None)


def _take_back(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    loan, take_back = record.record_info.pop(_LOAN, (None, None)) if record.record_info else (None, None)
    if take_back is not None:
        take_back(loan, dbapi_connection)


def _take_back_asyncpg(loan: Any, dbapi_connection: Any) -> None:
    take_back_asyncpg_connection(loan)
    if dbapi_connection is not None:
        # SQLAlchemy's own prepared statements are refused from now on as well.
        forget_prepared_statements(dbapi_connection)


def _take_back_psycopg(loan: Any, dbapi_connection: Any) -> None:
    take_back_psycopg_connection(loan)


_Lender: TypeAlias = tuple[Callable[[Any], Any], Callable[[Any, Any], None]]

_LENDERS: dict[str, _Lender] = {
    "asyncpg": (lend_asyncpg_connection, _take_back_asyncpg),
    "psycopg": (lend_psycopg_connection, _take_back_psycopg),
}
_LENDERS["psycopg_async"] = _LENDERS["psycopg"]
