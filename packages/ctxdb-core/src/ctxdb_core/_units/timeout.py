"""`set_statement_timeout`: how long the statements of the current unit of work may take."""

from __future__ import annotations

from ctxdb_core._transactions.statement_timeout import StatementTimeout
from ctxdb_core._units.unit import current_unit
from ctxdb_core.errors import ContextNotInitiatedError

__all__ = ["set_statement_timeout"]


async def set_statement_timeout(seconds: float | None = None, *, deadline: float | None = None) -> None:
    """Limit each further statement of the current unit of work, on all of its databases.

    Each transaction tells the server its limit when it begins, for itself alone (``SET LOCAL statement_timeout``: one
    round trip); one that is open is told now. A statement that takes longer fails by the database's own error (SQLSTATE
    57014; on SQLite, it is interrupted), and its transaction can only be rolled back then.

    Args:
        seconds: how long each statement may take; without it, and without a `deadline`, there is no limit any more.
        deadline: when all of them have to be done, on the event loop's clock (``loop.time() + 2.5``). The server is
            told what is left when the transaction begins; once it has passed, no statement is sent.

    Raises:
        ValueError: `seconds` is not positive.
        ContextNotInitiatedError, ContextClosedError: as `ctxdb_core.db_session`.
        DeadlineExceededError: a transaction is open, and the deadline has passed.
        TransactionOptionsError: a transaction is open on a database that has no such limit.
    """
    unit = current_unit.get(None)
    if unit is None:
        raise ContextNotInitiatedError
    await unit.limit_statements(StatementTimeout(seconds, deadline))
