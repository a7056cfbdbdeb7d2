"""Functions on the doors of several sessions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._sqlalchemy.door import StatementObserver
from ctxdb_core._sqlalchemy.sessions import door_of

__all__ = [
    "StatementObserver",
    "check_statements",
    "is_busy",
    "observe_statements",
    "prepare_next_call",
    "wait_for_statements",
]


def is_busy(session: AsyncSession) -> bool:
    """Return whether a call of `session` is under way."""
    door = door_of(session)
    return door is not None and door.is_busy


async def wait_for_statements(sessions: Iterable[AsyncSession]) -> None:
    """Wait until the calls of `sessions` that are under way, or wait for their turn, have ended."""
    for session in sessions:
        door = door_of(session)
        if door is not None and door.is_busy:
            async with door.turn():
                pass


def observe_statements(sessions: Iterable[AsyncSession], observer: StatementObserver) -> None:
    """Have `observer` called before each further statement of `sessions`."""
    for session in sessions:
        if (door := door_of(session)) is not None:
            door.observer = observer


def check_statements(session: AsyncSession, check: Callable[[], None]) -> None:
    """Have `check` called before each further statement of `session`: it may refuse it."""
    if (door := door_of(session)) is not None:
        door.check = check


def prepare_next_call(sessions: Iterable[AsyncSession], prepare: Callable[[], Awaitable[object]] | None) -> None:
    """Have the next call of each of `sessions` await `prepare` first; ``None`` takes that back."""
    for session in sessions:
        if (door := door_of(session)) is not None:
            door.prepare_next_call(prepare)
