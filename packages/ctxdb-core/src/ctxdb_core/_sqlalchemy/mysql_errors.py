"""The numbers of MySQL's and MariaDB's errors, which asyncmy and aiomysql pass on."""

from __future__ import annotations

from sqlalchemy import Dialect

__all__ = [
    "CONFLICTS",
    "CONNECTION_KILLED",
    "LOCK_WAIT_TIMEOUT",
    "NO_SUCH_SAVEPOINT",
    "ROLLED_BACK",
    "SERVER_GONE",
    "SERVER_SHUTDOWN",
    "error_number",
    "is_mysql",
]

SERVER_SHUTDOWN = 1053
"""ER_SERVER_SHUTDOWN."""
LOCK_WAIT_TIMEOUT = 1205
"""ER_LOCK_WAIT_TIMEOUT."""
NO_SUCH_SAVEPOINT = 1305
"""ER_SP_DOES_NOT_EXIST, by which MySQL and MariaDB refuse an unknown savepoint."""
CONNECTION_KILLED = 1927
"""MariaDB's ER_CONNECTION_KILLED."""
SERVER_GONE = 2006
"""CR_SERVER_GONE_ERROR: nothing could be sent any more."""

ROLLED_BACK = frozenset({1213, 1020, 1206})
"""Errors of a statement by which InnoDB has rolled back the whole transaction.

ER_LOCK_DEADLOCK, ER_CHECKREAD (MariaDB with ``innodb_snapshot_isolation``), ER_LOCK_TABLE_FULL.
"""

CONFLICTS = frozenset({1213, 1020, LOCK_WAIT_TIMEOUT})
"""Errors that come from another transaction's work."""

_DRIVERS = ("aiomysql", "asyncmy", "pymysql")


def is_mysql(dialect: Dialect) -> bool:
    """Return whether `dialect` is MySQL's or MariaDB's, which is named by the URL."""
    return dialect.name in ("mysql", "mariadb")


def error_number(error: BaseException | None) -> int | None:
    """Return the number of an error of these drivers; ``None`` if it has none, or is an error of other code."""
    if error is None or type(error).__module__.partition(".")[0] not in _DRIVERS:
        return None
    number = error.args[0] if error.args else None
    return number if isinstance(number, int) else None
