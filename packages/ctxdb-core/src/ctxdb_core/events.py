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

from ctxdb_core._databases.connect import (
    DBEvent,
    EventListener,
    SessionClosed,
    SessionOpened,
    TransactionBegun,
    TransactionCommitted,
    TransactionRolledBack,
)

__all__ = [
    "DBEvent",
    "EventListener",
    "SessionClosed",
    "SessionOpened",
    "TransactionBegun",
    "TransactionCommitted",
    "TransactionRolledBack",
]
