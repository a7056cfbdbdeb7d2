"""`IsolationLevel`, and how one transaction is begun with a level of its own, or read-only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from ctxdb_core._sqlalchemy.binds import (
    READ_ONLY_OPTION,
    begun_connections,
    is_autocommit,
    is_bound_to_connection,
    is_read_only,
    isolation_level_of,
)
from ctxdb_core._sqlalchemy.mysql_errors import is_mysql
from ctxdb_core._transactions.undo import undo_on_return
from ctxdb_core.errors import ArgumentValueError, TransactionOptionsError

__all__ = ["NO_OPTIONS", "IsolationLevel", "TransactionOptions"]

IsolationLevel: TypeAlias = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""What one transaction sees of others. Not every database has each level."""

_READ_ONLY_QUERIES = {"postgresql": "SHOW transaction_read_only", "sqlite": "PRAGMA query_only"}

# The databases whose transactions may be read-only, by SQLAlchemy's names. MySQL and MariaDB cannot be asked whether
# the open transaction is.
_READ_ONLY = {"postgresql": "PostgreSQL", "sqlite": "SQLite", "mysql": "MySQL", "mariadb": "MariaDB"}


@dataclass(frozen=True)
class TransactionOptions:
    """What one transaction is begun with. The next one on the same session or connection knows nothing of it.

    A session that is bound to a connection takes part in a transaction that other code began, a test for instance. The
    options of that transaction cannot be chosen any more, so a session of this kind ignores the options.

    Args:
        isolation_level: the database's own default if it is ``None``.
        read_only: have the database refuse writes.

    Raises:
        ValueError: `isolation_level` is not one of `IsolationLevel`.
    """

    isolation_level: IsolationLevel | None = None
    read_only: bool = False

    def __post_init__(self) -> None:
        if self.isolation_level is not None and self.isolation_level not in get_args(IsolationLevel):
            levels = ", ".join(map(repr, get_args(IsolationLevel)))
            raise ArgumentValueError(f"isolation_level={self.isolation_level!r} is not one of {levels}.")

    def __bool__(self) -> bool:
        return self.isolation_level is not None or self.read_only

    def check(self, session: AsyncSession, db: object) -> None:
        """Raise the error that says why no transaction of `session` can have these options, if none can.

        Raises:
            ValueError: the database, or SQLAlchemy's dialect for its driver, does not have the isolation level.
            TransactionOptionsError: the engine is in autocommit, or no transaction of this database can be read-only.
        """
        if is_bound_to_connection(session):
            return
        bind = session.sync_session.get_bind()
        if self.isolation_level is not None:
            if is_autocommit(bind):
                raise TransactionOptionsError(
                    f"On {db!r} each statement is committed by itself (autocommit), so there is no transaction that "
                    "could have an isolation_level. Leave it out, or use a DBConnect without `read_only=True`."
                )
            levels = [level for level in _levels(bind) if level in get_args(IsolationLevel)]
            if self.isolation_level not in levels:
                dialect = f"{bind.dialect.name}+{bind.dialect.driver}"
                raise ArgumentValueError(
                    f"isolation_level={self.isolation_level!r} is not one of {levels}, which {dialect} has."
                )
        if self.read_only and not is_read_only(bind):
            if bind.dialect.name not in _READ_ONLY:
                raise TransactionOptionsError(
                    f"read_only=True is known for {', '.join(_READ_ONLY.values())}, not for {bind.dialect.name}: leave "
                    "it out."
                )
            if is_autocommit(bind):
                raise TransactionOptionsError(
                    f"On {db!r} each statement is committed by itself (autocommit), so there is no transaction that "
                    "could be read-only. Use `DBConnect.from_url(url, read_only=True)`, or no autocommit."
                )

    async def apply(self, session: AsyncSession, db: object) -> None:
        """Begin a transaction with these options; if one is open, see that it has them.

        The connection is taken now: the options are sent along with BEGIN, or right after it.

        Raises:
            TransactionOptionsError: the open transaction has others.
        """
        if not self or is_bound_to_connection(session):
            return
        if begun_connections(session):
            await self._check_open(session, db)
        else:
            await self._begin(session)

    async def _begin(self, session: AsyncSession) -> None:
        bind = session.sync_session.get_bind()
        read_only = self.read_only and not is_read_only(bind)
        # The option also tells `retry_on_conflict` that such a transaction commits nothing.
        options: dict[str, Any] = {READ_ONLY_OPTION: True} if read_only else {}
        # SQLite's transactions have this level anyway, and setting it would change how the driver begins them.
        is_default = bind.dialect.name == "sqlite" and self.isolation_level == (
            isolation_level_of(bind) or "SERIALIZABLE"
        )
        if self.isolation_level is not None and not is_default:
            options["isolation_level"] = self.isolation_level
        # "shared" is what stands in for each driver in a test's shared transaction (`ctxdb_core.testing`), where the
        # server is told nothing that would hold for the test as well.
        if read_only and bind.dialect.name == "postgresql" and bind.dialect.driver in ("asyncpg", "shared"):
            options["postgresql_readonly"] = True
        if not options:
            return
        connection = await session.connection(execution_options=options)
        if read_only and bind.dialect.name == "sqlite":
            assert connection.sync_connection is not None
            undo_on_return(connection.sync_connection, "PRAGMA query_only = OFF")
            await connection.exec_driver_sql("PRAGMA query_only = ON")
        elif read_only and is_mysql(bind.dialect):
            # The driver begins no transaction by itself, as autocommit is off.
            await connection.exec_driver_sql("START TRANSACTION READ ONLY")
        elif read_only and "postgresql_readonly" not in options:
            # SQLAlchemy resets psycopg's option to READ WRITE, not to the server's default: on a hot standby, every
            # later transaction of that connection would fail.
            await connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    async def _check_open(self, session: AsyncSession, db: object) -> None:
        connection = await session.connection()
        if self.isolation_level is not None:
            level = await connection.get_isolation_level()
            if level != self.isolation_level:
                raise TransactionOptionsError(
                    f"isolation_level={self.isolation_level!r} was asked for, but the transaction that is open on "
                    f"{db!r} has {level!r}, which it keeps to its end. {_WAY_OUT}"
                )
        if self.read_only and not await _answers_read_only(connection):
            raise TransactionOptionsError(
                f"read_only=True was asked for, but the transaction that is open on {db!r} may write. {_WAY_OUT}"
            )


NO_OPTIONS = TransactionOptions()

_WAY_OUT = (
    "End it first (`await commit_db_session(db)`, or `current_transaction='commit'`), or leave it alone and run in a "
    "transaction beside it (`run_in_new_ctx`, or `transactional(db, 'requires_new', ...)`)."
)


async def _answers_read_only(connection: AsyncConnection) -> bool:
    assert connection.sync_connection is not None
    if is_read_only(connection.sync_connection):
        return True
    query = _READ_ONLY_QUERIES.get(connection.dialect.name)
    return query is not None and (await connection.exec_driver_sql(query)).scalar() in ("on", 1)


def _levels(bind: Engine | Connection) -> list[str]:
    try:
        return list(bind.dialect.get_isolation_level_values(None))  # type: ignore[arg-type]  # the dialects ignore it
    except NotImplementedError:
        return []
