"""Reads from an engine, a connection or a session which isolation level its transactions have, and who began them."""

from __future__ import annotations

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.private import connections_of, isolation_level_on_connect
from ctxdb_core._sqlalchemy.read_only import has_transactions

__all__ = [
    "READ_ONLY_OPTION",
    "begun_connections",
    "is_autocommit",
    "is_bound_to_connection",
    "is_read_only",
    "isolation_level_of",
]

READ_ONLY_OPTION = "ctxdb_read_only"
"""The execution option of engines on which nothing can be written."""


def is_bound_to_connection(session: AsyncSession) -> bool:
    """Return whether `session` takes part in a transaction that other code began."""
    try:
        return isinstance(session.sync_session.get_bind(), Connection)
    except UnboundExecutionError:
        # The session has no engine of its own, but one for each mapped class (`binds`).
        return False


def is_autocommit(bind: Engine | Connection) -> bool:
    """Return whether each statement on `bind` is committed by itself."""
    if isolation_level_of(bind) != "AUTOCOMMIT":
        return False
    return not (isinstance(bind, Connection) and is_read_only(bind) and has_transactions(bind))


def isolation_level_of(bind: Engine | Connection) -> str | None:
    """Return the level that `bind` was given; ``None`` where it is the database's own default."""
    default = isolation_level_on_connect(bind.dialect)
    level: str | None = bind.get_execution_options().get("isolation_level", default)
    return level


def is_read_only(bind: Engine | Connection) -> bool:
    """Return whether ctxdb has made `bind` read-only."""
    return bool(bind.get_execution_options().get(READ_ONLY_OPTION))


def begun_connections(session: AsyncSession) -> set[Connection]:
    """Return the connections that the open transaction has taken: none before its first statement."""
    transaction = session.sync_session.get_transaction()
    if transaction is None:
        return set()
    return connections_of(transaction)
