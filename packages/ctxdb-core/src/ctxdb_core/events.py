"""What a `DBConnect` tells its listeners: each session and each transaction, how long it lasted, and how it ended.

DBEvent
├── SessionOpened             a session was made
├── TransactionBegun          it has taken a connection
├── TransactionCommitted      the commit has succeeded, and the connection is back in the pool
├── TransactionRolledBack     nothing of it stands, and the connection is back in the pool
└── SessionClosed             the session was closed

Between its first and its last event, a session has any number of transactions, one after the other. Savepoints are
parts of theirs, and tell nothing. Durations are in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sqlalchemy import Connection

__all__ = [
    "DBEvent",
    "EventListener",
    "SessionClosed",
    "SessionOpened",
    "TransactionBegun",
    "TransactionCommitted",
    "TransactionRolledBack",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DBEvent:
    """The base of all events."""

    db: Any = field(repr=False)
    """The `DBConnect` of the session. Its module imports this one, so the type cannot be named here."""
    host: str
    """The host that the session is on, also after `DBConnect.change_host`; without any password."""
    session_id: int
    """The same for all events of a session; no other session of this process has it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionOpened(DBEvent):
    """A session was made; or one that had been closed is being used again."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransactionBegun(DBEvent):
    """A transaction has taken its connection: sent before its first statement is."""

    connection: Connection = field(repr=False)
    """The connection. The transaction owns it: a listener must make no statement on it, and must not keep it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransactionCommitted(DBEvent):
    """A transaction was committed; sent once its connection was given back."""

    duration: float
    """From its begin until the database had committed."""
    connection_held: float
    """From its begin until the connection was given back."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransactionRolledBack(DBEvent):
    """A transaction ended without a commit; sent once its connection was given back, or thrown away."""

    duration: float
    """From its begin until it was rolled back."""
    connection_held: float
    """From its begin until the connection was given back."""
    commit_failed: bool
    """Whether a commit was tried."""
    error: BaseException | None = field(repr=False)
    """What the code has raised, or the commit, where ctxdb knows it. Its traceback keeps the code's variables alive."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionClosed(DBEvent):
    """A session was closed."""

    duration: float
    """Since the session was opened."""
    transactions: int
    """How many transactions the session has had."""
    connection_held: float
    """How long the session had a connection, all of its transactions together."""


EventListener: TypeAlias = Callable[[DBEvent], object]
"""Called with each event, in the task that causes it; it must not wait for anything, and its errors are only logged."""
