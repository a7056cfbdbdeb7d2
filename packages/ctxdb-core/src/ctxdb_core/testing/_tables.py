"""`Tables`: what a `TableCleaner` asks of a database."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import URL

from ctxdb_core.testing._driver import Driver
from ctxdb_core.testing._errors import WrongDatabaseError

QUIET_SECONDS = 1.0
"""How long a database must not have been written to before its first clean-up; one in use just now is watched."""


class Tables:
    """The tables of one database: which of them have changed, and how their former rows are restored.

    Args:
        driver: a connection in autocommit mode, which is kept open: it has copies of rows in temporary tables.
    """

    is_silent = False
    """Whether `restore` fires no trigger, so that nothing has changed again after it."""
    sequences_moved = False
    """Whether the last call of `changed` has found a sequence that has moved."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    async def check_for_tests(self, named: Collection[str], url: URL) -> None:
        """Raise `WrongDatabaseError` unless something says that the database is for tests.

        Args:
            named: the names of databases that the user has called tests'.
            url: the address of the database.
        """
        raise NotImplementedError

    async def remember(self) -> None:
        """Remember the present rows of the tables, which `restore` brings back.

        Raises:
            WrongDatabaseError: other sessions write to the tables.
        """
        raise NotImplementedError

    async def check_writers(self, changed: list[str]) -> list[str]:
        """Raise an error if other sessions write to the tables right now; return the tables that have changed."""
        return changed

    def forget(self) -> None:
        """Note that the cleaner's work is over."""

    async def changed(self) -> list[str]:
        """Return the names of the tables whose rows have changed."""
        raise NotImplementedError

    async def restore(self, tables: list[str]) -> None:
        """Restore the former rows of `tables`, which have changed, and all sequences."""
        raise NotImplementedError


def refuse_unmarked(name: str, way_out: str) -> WrongDatabaseError:
    """Return the error for a database that nothing says to be for tests."""
    return WrongDatabaseError(
        f"A TableCleaner empties tables, and nothing says that the database {name!r} is for tests: no word of its "
        f"name begins with 'test'. If it is, say so by `TableCleaner(db, test_databases=[{name!r}])`, for the "
        f"fixture `ctxdb_clean_tables` by a fixture `ctxdb_test_databases` that returns [{name!r}], {way_out}."
    )


def refuse_busy(name: str, who: str) -> WrongDatabaseError:
    """Return the error for a database that others write to."""
    return WrongDatabaseError(
        f"Others are writing to the database {name!r}{who}, and a TableCleaner empties tables. What they write would "
        "be lost: so nothing was cleaned. Give the tests a database of their own, or end what uses this one."
    )
