"""Sentry: what happens to a request's transactions, as breadcrumbs and on its trace, with ``ctxdb-core[sentry]``."""

from __future__ import annotations

from collections.abc import Callable

import sentry_sdk

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._telemetry.units import FollowedTransaction, FollowedUnit, UnitFollower
from ctxdb_core.events import TransactionBegun

__all__ = ["instrument"]


def instrument(*dbs: DBConnect) -> Callable[[], None]:
    """Tell Sentry of all work on `dbs` from now on.

    - Each begin and each end of a transaction is a breadcrumb of the category ``ctxdb``: an error is shown with what
      was committed and what was rolled back before it.
    - The tag ``ctxdb.unit`` is the id of the unit of work, on errors and on the trace.
    - The trace of a request has the tag ``ctxdb.outcome``, and ``ctxdb.connection.held`` in seconds among its data.

    No text of a statement or of an error is sent.

    Args:
        *dbs: the databases.

    Returns:
        A function without arguments that ends the instrumentation.

    Raises:
        ArgumentTypeError: there is no database, or one is no `DBConnect` (a ``TypeError``, too).
    """
    return _Sentry(dbs).stop


class _Sentry(UnitFollower):
    def unit_begins(self, unit: FollowedUnit) -> None:
        sentry_sdk.set_tag("ctxdb.unit", unit.id)

    def transaction_begins(self, transaction: FollowedTransaction, event: TransactionBegun) -> None:
        sentry_sdk.add_breadcrumb(
            category="ctxdb", type="query", message="transaction begun", data={"host": transaction.host}
        )

    def transaction_ends(self, transaction: FollowedTransaction) -> None:
        data = {"host": transaction.host, "outcome": transaction.outcome, "held": transaction.held}
        if transaction.error is not None:
            data["error"] = type(transaction.error).__name__
        sentry_sdk.add_breadcrumb(
            category="ctxdb",
            type="query",
            level="error" if transaction.outcome == "commit_failed" else "info",
            message=f"transaction {transaction.outcome.replace('_', ' ')}",
            data=data,
        )

    def unit_ends(self, unit: FollowedUnit) -> None:
        if unit.outcome is None:
            return
        trace = sentry_sdk.get_current_scope().transaction
        if trace is not None:
            trace.set_tag("ctxdb.outcome", unit.outcome)
            trace.set_data("ctxdb.connection.held", unit.held)
