"""How the transactions of several sessions end together: prepared, then committed one after the other, or rolled back.

What can fail before anything stands is done first, in `prepare`: the user's `before_commit`, and the flush of each
session. A commit that fails afterwards has the sessions that come after it rolled back, and its error names the
databases that had been committed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias

from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.arguments import awaitable_of
from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._databases.url import pool_name
from ctxdb_core._sqlalchemy.doors import wait_for_calls
from ctxdb_core._sqlalchemy.failed_transactions import refuse_if_failed
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.private import has_committed
from ctxdb_core._sqlalchemy.task_blocks import release_blocks
from ctxdb_core._transactions.rollback_only import refuse_if_rollback_only
from ctxdb_core._units import session_end
from ctxdb_core._units.session_end import in_transaction

__all__ = ["BeforeCommit", "Sessions", "commit_in_order", "is_in_before_commit", "prepare", "roll_back"]

BeforeCommit: TypeAlias = Callable[[Any], Awaitable[object]]
"""Awaited with each session that is about to be committed; an error of it rolls the unit of work back.

The session is of the class that its `DBConnect` makes. Which that is, no adapter knows: hence ``Any``.
"""

Sessions: TypeAlias = Mapping[DBConnect, AsyncSession]
"""The sessions of a unit of work, in the order in which they were opened."""

_preparing: ContextVar[Sessions | None] = ContextVar("ctxdb_preparing", default=None)
"""The sessions whose unit of work has called the `before_commit` that the running code is part of."""


def is_in_before_commit(sessions: Sessions | None = None) -> bool:
    """Return whether the running code is part of a `before_commit`: what it commits itself is not prepared so again.

    Args:
        sessions: whether it is part of that of the unit of work which has these; by default, of any.
    """
    preparing = _preparing.get()
    return preparing is not None and (sessions is None or preparing is sessions)


async def prepare(
    sessions: Sessions,
    dbs: Collection[DBConnect] | None,
    before_commit: BeforeCommit | None,
    undone: Collection[DBConnect] = (),
) -> None:
    """Do all that may take its time, fail or be cancelled while nothing has been committed yet.

    Args:
        sessions: those of the unit of work; `before_commit` may open more of them.
        dbs: where a commit is to come; everywhere by default.
        before_commit: the user's hook; ``None`` if there is none, or nothing to be asked about.
        undone: where no commit is to come after all, as what was open there has been rolled back.

    Raises:
        BaseException: why nothing can be committed.
    """
    await wait_for_calls(sessions.values())
    if before_commit is None and len(sessions) < 2:
        return
    if dbs is None:
        for session in sessions.values():
            release_blocks(session.sync_session)
    prepared = set(undone)
    # The hook may open sessions of its own, or write on others.
    while pending := [db for db, session in affected(sessions, dbs) if db not in prepared and in_transaction(session)]:
        for db in pending:
            prepared.add(db)
            if db not in sessions:
                # The hook, or another task, has closed it.
                continue
            session = sessions[db]
            if before_commit is not None:
                token = _preparing.set(sessions)
                try:
                    await awaitable_of(before_commit(session), before_commit, "`before_commit`")
                finally:
                    _preparing.reset(token)
            if len(sessions) > 1:
                # A commit that is going to be refused is refused before the first commit of any session.
                refuse_if_rollback_only(session.sync_session)
                await session.flush()
                await refuse_if_failed(session)


async def commit_in_order(sessions: Sessions, dbs: Collection[DBConnect] | None) -> None:
    """Commit what is open, in the order in which the sessions were opened.

    Raises:
        BaseException: the first error of a commit; everything that was not committed has been rolled back.
    """
    committed: list[DBConnect] = []
    for db, session in affected(sessions, dbs):
        if not in_transaction(session):
            continue
        try:
            # A commit that the user asks for expires objects; the commit at the end of a request does not.
            await (session_end.commit(session) if dbs is None else session.commit())
        except BaseException as exc:
            guard = guard_of(session)
            _name_committed(exc, db, committed, sessions, stands=has_committed(guard) or guard.has_ended_by_commit)
            await roll_back(sessions, dbs, exc)
            raise
        committed.append(db)


async def roll_back(sessions: Sessions, dbs: Collection[DBConnect] | None, error: BaseException | None) -> None:
    """Roll back what is open because of `error`, if there is one: a failure is attached to that, or else logged."""
    for db, session in affected(sessions, dbs):
        await session_end.roll_back(session, error, db)
        if dbs is None:
            # The unit itself has rolled back, for a response. From now on the objects are read to be logged, say.
            guard_of(session).show_kept()


def affected(sessions: Sessions, dbs: Collection[DBConnect] | None) -> list[tuple[DBConnect, AsyncSession]]:
    """Return the databases out of `dbs` on which there is a session, and that; all of these if `dbs` is ``None``.

    It is a list of its own, as tasks may open and close sessions while others are committed.
    """
    return list(sessions.items()) if dbs is None else [(db, sessions[db]) for db in dbs if db in sessions]


def _name_committed(
    error: BaseException, failed: DBConnect, committed: list[DBConnect], sessions: Sessions, *, stands: bool
) -> None:
    """Have `error` name the databases that were committed before it.

    Args:
        error: what the commit on `failed` has raised.
        failed: the database that was to be committed next.
        committed: those that were committed before that.
        sessions: the sessions on all of them.
        stands: whether the commit on `failed` has succeeded as well, so that only a listener of it has failed.
    """
    if not committed:
        return
    names = [repr(db) for db in (failed, *committed)]
    if len(set(names)) < len(names):
        # They are on one host.
        names = [_with_database(db, sessions.get(db)) for db in (failed, *committed)]
    what = "a listener of the commit" if stands else "the commit"
    before = ", ".join(names[1:])
    message = f"ctxdb: {what} on {names[0]} failed after the one on {before} had succeeded; the rest was rolled back"
    error.add_note(message)
    if isinstance(error, StatementError):
        # SQLAlchemy's own errors show a detail in their text, too.
        error.add_detail(message)


def _with_database(db: DBConnect, session: AsyncSession | None) -> str:
    bind = None if session is None else session.sync_session.bind
    return repr(db) if bind is None else f"{db!r} ({pool_name(bind.engine.url)})"
