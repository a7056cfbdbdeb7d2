"""What every engine is taught, each guard in a module of its own."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine

from ctxdb_core._sqlalchemy.cancelled_queries import keep_cancellation_at_pool, stop_cancelled_queries
from ctxdb_core._sqlalchemy.cursors import follow_cursors
from ctxdb_core._sqlalchemy.failed_transactions import trust_no_failed_transaction
from ctxdb_core._sqlalchemy.lost_commits import call_lost_commits_unknown
from ctxdb_core._sqlalchemy.poolers import tell_wrong_settings
from ctxdb_core._sqlalchemy.savepoints import begin_before_savepoints
from ctxdb_core._sqlalchemy.stale_connections import replace_closed_connections

__all__ = ["guard"]


def guard(engine: AsyncEngine) -> None:
    """Teach `engine` all that ctxdb relies on. The guards stay on it; a second call changes nothing."""
    replace_closed_connections(engine)
    stop_cancelled_queries(engine)
    keep_cancellation_at_pool(engine)
    trust_no_failed_transaction(engine)
    call_lost_commits_unknown(engine)
    begin_before_savepoints(engine)
    follow_cursors(engine)
    tell_wrong_settings(engine)
