"""Keeps a session's statements and the ends of its transactions apart, whichever tasks they come from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from typing import Any, TypeAlias
from weakref import ref

from greenlet import getcurrent, greenlet  # what SQLAlchemy's asyncio extra is made of
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

__all__ = [
    "StatementGate",
    "StatementObserver",
    "check_statements",
    "close_gates",
    "is_busy",
    "observe_statements",
    "open_gates",
    "wait_for_statements",
]

POLL_SECONDS = 0.001

StatementObserver: TypeAlias = Callable[[Session, Any], None]
"""Called with the session and the statement, if that is known: a flush does not tell."""

# Who is ending a transaction here: inherited by the tasks that a session class may do it in.
_ending: ContextVar[object] = ContextVar("ctxdb_ending", default=None)


class StatementGate:
    """Stands in for the ``get_bind`` of one session, which is asked before each connection is taken for a statement.

    A session serves one task at a time. But where a middleware hands the response on through a queue (Starlette's
    BaseHTTPMiddleware), the body of a streamed response runs while its start is still on the way: what it asks of the
    session meets the commit. So the commit waits for the statement that is under way, and the next one for the commit.
    """

    __slots__ = ("_closed_by", "_get_bind", "_opened", "_session", "_statement", "check", "observer")

    def __init__(self, session: AsyncSession, observer: StatementObserver | None = None) -> None:
        self.observer = observer
        """Called before each statement, in the task that makes it."""
        self.check: Callable[[], None] | None = None
        """Called before each statement, to refuse it by an error."""
        self._session = session.sync_session
        self._get_bind = self._session.get_bind
        self._closed_by: object = None
        self._opened: asyncio.Event | None = None
        self._statement: ref[greenlet] | None = None
        self._session.get_bind = self  # type: ignore[method-assign]  # on this one object only

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        # A plain call, outside of SQLAlchemy's greenlets, takes no connection.
        if getattr(current, "__sqlalchemy_greenlet_provider__", False):
            if self._closed_by is not None and self._closed_by is not _ending.get():
                if self._opened is None:
                    self._opened = asyncio.Event()
                await_only(self._opened.wait())
                # The session may be closed by now, and refuse.
                return self._session.get_bind(*args, **kwargs)
            if self.check is not None:
                self.check()
            self._statement = ref(current)
            if self.observer is not None:
                self.observer(self._session, kwargs.get("clause"))
        return self._get_bind(*args, **kwargs)

    @property
    def is_busy(self) -> bool:
        """Whether a statement is under way, or the end of a transaction."""
        if self._closed_by is not None:
            return True
        statement = None if self._statement is None else self._statement()
        return statement is not None and not statement.dead

    def close(self, closed_by: object) -> None:
        """Let the statements of others than `closed_by` wait."""
        self._closed_by = closed_by

    def open(self) -> None:
        """Let them go on."""
        self._closed_by = None
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.set()


def is_busy(session: AsyncSession) -> bool:
    """Return whether a statement of `session` is under way, or the end of a transaction."""
    gate = session.sync_session.get_bind
    return isinstance(gate, StatementGate) and gate.is_busy


async def wait_for_statements(sessions: Iterable[AsyncSession]) -> None:
    """Wait until no statement of `sessions` is under way, and no end of a transaction."""
    for session in sessions:
        gate = session.sync_session.get_bind
        # A greenlet tells nobody that it has ended.
        while isinstance(gate, StatementGate) and gate.is_busy:  # noqa: ASYNC110 - see above
            await asyncio.sleep(POLL_SECONDS)


def observe_statements(sessions: Iterable[AsyncSession], observer: StatementObserver) -> None:
    """Have `observer` called before each further statement of `sessions`."""
    for session in sessions:
        gate = session.sync_session.get_bind
        if isinstance(gate, StatementGate):
            gate.observer = observer


def check_statements(session: AsyncSession, check: Callable[[], None]) -> None:
    """Have `check` called before each further statement of `session`: it may refuse it."""
    gate = session.sync_session.get_bind
    if isinstance(gate, StatementGate):
        gate.check = check


def close_gates(sessions: Iterable[AsyncSession]) -> Token[object]:
    """Let other tasks' statements on `sessions` wait for what the current task is going to do."""
    closed_by = object()
    for session in sessions:
        gate = session.sync_session.get_bind
        if isinstance(gate, StatementGate):
            gate.close(closed_by)
    return _ending.set(closed_by)


def open_gates(sessions: Iterable[AsyncSession], token: Token[object]) -> None:
    """Undo the `close_gates` that returned `token`."""
    _ending.reset(token)
    for session in sessions:
        gate = session.sync_session.get_bind
        if isinstance(gate, StatementGate):
            gate.open()
