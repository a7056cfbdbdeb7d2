"""Begins a transaction for an `on_begin`, also where the database is in autocommit.

On PostgreSQL, ``SET LOCAL`` and ``set_config(..., true)`` end with their transaction. In autocommit, each statement is
a transaction: the statement after them would be executed without the role or the tenant, and without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.binds import begun_connections, is_autocommit, is_read_only
from ctxdb_core.errors import TransactionRequiredError

__all__ = ["begin_transaction", "with_transaction"]

# A level other than AUTOCOMMIT, by which a transaction begins. Read-only connections behind a pooler have it as well.
_LEVEL = {"isolation_level": "READ COMMITTED"}

_NO_TRANSACTION = (
    "`on_begin` sets what lasts as long as a transaction, and each statement is committed by itself here (autocommit): "
    "the next one would be executed without it. Nothing was executed. Use a database without autocommit; or "
    "`DBConnect.from_url(url, read_only=True)`, which begins transactions where an `on_begin` needs them."
)


async def begin_transaction(session: AsyncSession) -> None:
    """Begin a transaction of `session`, where its database is in autocommit because nothing is written there.

    Raises:
        TransactionRequiredError: the database is in autocommit, and may be written to.
    """
    if begun := begun_connections(session):
        if any(map(_is_in_autocommit, begun)):
            raise TransactionRequiredError(_NO_TRANSACTION)
        return
    options = with_transaction(session, {})
    if options:
        await session.connection(execution_options=options)


def with_transaction(session: AsyncSession, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return connection `options` for a transaction that `session` is about to begin, with a level if it needs one.

    Raises:
        TransactionRequiredError: as `begin_transaction`.
    """
    try:
        bind = session.sync_session.get_bind()
    except UnboundExecutionError:
        # The session has no engine of its own, but one for each mapped class (`binds`).
        return options
    if isinstance(bind, Connection) or "isolation_level" in options or not _is_in_autocommit(bind):
        return options
    if not is_read_only(bind):
        raise TransactionRequiredError(_NO_TRANSACTION)
    return {**_LEVEL, **options}


def _is_in_autocommit(bind: Any) -> bool:
    # Other databases have no settings that end with a transaction.
    return bind.dialect.name == "postgresql" and is_autocommit(bind)
