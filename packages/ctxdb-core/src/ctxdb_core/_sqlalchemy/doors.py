"""Functions for the doors of several sessions at once; a session without a door is passed over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.door import Door, Refuse, StatementObserver
from ctxdb_core._sqlalchemy.guarded_session import door_of
from ctxdb_core._sqlalchemy.private import is_committing

__all__ = ["interrupt_call", "is_busy", "is_held", "observe_statements", "prepare_next_call", "wait_for_calls"]


def is_busy(session: AsyncSession) -> bool:
    """Return whether a call of `session` is under way."""
    door = door_of(session)
    return door is not None and door.is_busy


def is_held(session: AsyncSession) -> bool:
    """Return whether the running code has taken the turn of `session`."""
    door = door_of(session)
    return door is not None and door.is_held()


def interrupt_call(session: AsyncSession, refuse: Refuse) -> None:
    """Stop the call that another task has under way on `session`: it ends by the error that `refuse` raises.

    A COMMIT that was sent is seen through, as its outcome would be unknown.
    """
    door = door_of(session)
    if door is not None and not is_committing(session.sync_session):
        door.interrupt(refuse)


async def wait_for_calls(sessions: Iterable[AsyncSession]) -> None:
    """Wait until the calls of `sessions` that are under way, or wait for their turn, have ended."""
    # Meanwhile, a task may open another session, or close one: the calls of a new session are not waited for.
    for door in list(_doors(sessions)):
        if door.is_busy:
            async with door.turn():
                pass


def observe_statements(sessions: Iterable[AsyncSession], observer: StatementObserver) -> None:
    """Have `observer` called before each further statement of `sessions`."""
    # A loop of its own, as the generator of `_doors` costs more and each request that has used a session comes here.
    for session in sessions:
        door = door_of(session)
        if door is not None:
            door.observer = observer


def prepare_next_call(sessions: Iterable[AsyncSession], prepare: Callable[[], Awaitable[object]] | None) -> None:
    """Have the next call of each of `sessions` await `prepare` first; ``None`` takes that back."""
    for door in _doors(sessions):
        door.prepare_next_call(prepare)


def _doors(sessions: Iterable[AsyncSession]) -> Iterator[Door]:
    return (door for session in sessions if (door := door_of(session)) is not None)
