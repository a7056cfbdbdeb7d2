"""The errors of the testing tools."""

from __future__ import annotations

from ctxdb_core.errors import CtxDBError


class SharedTransactionError(CtxDBError):
    """Something was asked of a shared transaction that one connection cannot give.

    Raised where two transactions would have to be open beside each other, where what one session has committed would be
    undone by another one's roll-back, where the connection was lost, and where something gets around the shared
    transaction. The way out: the message says what to change; or test this with real commits (`TableCleaner`, and the
    fixture ``ctxdb_clean_tables``).
    """


class CleanUpError(CtxDBError):
    """The changes of a test could not be undone.

    Raised where tables stay locked by a transaction that the test has left open, and where rows that were there before
    cannot be put back. The way out: the message says which.
    """


class WrongDatabaseError(CleanUpError):
    """A database was to be emptied or dropped that may not be one of tests; nothing was changed in it.

    Raised where nothing marks the database as one of tests, where `create_database` has not made what it was to replace
    or drop, and where sessions of others write to the database. The way out: name the right database, or say that this
    one is for tests; the message says how.
    """
