"""Logs: the unit of work as fields of log records, and a record of how each one ended.

The fields are attributes of `logging.LogRecord`, as ``extra=`` makes them:

- ``ctxdb_unit``: the id of the unit of work, as in the response's ``x-ctxdb-unit`` where the inspector is mounted;
- ``ctxdb_request``: method and path of its request, without the query; ``None`` outside of requests;
- ``ctxdb_outcome``: ``committed``, ``rolled_back`` or ``commit_failed``;
- ``ctxdb_held``: for how many seconds it, or the transaction that is warned of, has held connections;
- ``ctxdb_transactions``: how many transactions it has had;
- ``ctxdb_duration``: for how many seconds it lasted;
- ``ctxdb_status``: the status of its response, where an ASGI adapter tells it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableMapping
from time import perf_counter
from typing import Any

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._telemetry.units import FollowedTransaction, FollowedUnit, Outcome, UnitFollower
from ctxdb_core._units.log_fields import UnitFields
from ctxdb_core._units.unit import running_unit

__all__ = ["UnitFields", "add_unit_fields", "log_units"]

_TOLD: dict[Outcome | None, str] = {
    "committed": "committed",
    "rolled_back": "rolled back",
    "commit_failed": "commit failed",
    None: "ended within a transaction",
}


def log_units(*dbs: DBConnect, logger: logging.Logger | None = None, level: int = logging.INFO) -> Callable[[], None]:
    """Log how each unit of work ends that has taken a connection of `dbs`, with the fields of this module.

    A transaction outside of any unit of work is logged by itself.

    Args:
        *dbs: the databases.
        logger: the logger; by default, ``ctxdb.units``.
        level: the level of the records; the record of a failed commit is a warning at least.

    Returns:
        A function without arguments that ends the logging.

    Raises:
        ArgumentTypeError: there is no database, or one is no `DBConnect` (a ``TypeError``, too).
    """
    return _UnitLog(dbs, logging.getLogger("ctxdb.units") if logger is None else logger, level).stop


def add_unit_fields(logger: Any, name: str, event_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add ``ctxdb_unit`` and ``ctxdb_request`` to an event of structlog: a processor.

    Nothing is added outside of units of work, and to an event that has them already.
    """
    if "ctxdb_unit" not in event_dict and (unit := running_unit()) is not None:
        event_dict["ctxdb_unit"] = unit.id
        event_dict["ctxdb_request"] = unit.request
    return event_dict


class _UnitLog(UnitFollower):
    """Writes the records."""

    def __init__(self, dbs: Iterable[DBConnect], logger: logging.Logger, level: int) -> None:
        self._logger = logger
        self._level = level
        super().__init__(dbs)

    def transaction_ends(self, transaction: FollowedTransaction) -> None:
        if transaction.unit is None:
            self._log(
                "a transaction outside of a unit of work",
                transaction.outcome,
                transaction.held,
                {"ctxdb_unit": None, "ctxdb_request": None, "ctxdb_duration": transaction.duration},
            )

    def unit_ends(self, unit: FollowedUnit) -> None:
        self._log(
            unit.request or f"unit {unit.id}",
            unit.outcome,
            unit.held,
            {
                "ctxdb_unit": unit.id,
                "ctxdb_request": unit.request,
                "ctxdb_transactions": unit.transactions,
                "ctxdb_duration": perf_counter() - unit.started,
                "ctxdb_status": unit.status,
            },
        )

    def _log(self, what: str, outcome: Outcome | None, held: float, fields: dict[str, Any]) -> None:
        level = max(self._level, logging.WARNING) if outcome == "commit_failed" else self._level
        self._logger.log(
            level,
            "%s: %s, held a connection for %.1f ms",
            what,
            _TOLD[outcome],
            held * 1e3,
            extra={**fields, "ctxdb_outcome": outcome, "ctxdb_held": held},
        )
