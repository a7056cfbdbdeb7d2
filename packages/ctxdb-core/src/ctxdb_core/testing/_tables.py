"""`Tables`: what a `TableCleaner` asks of a database."""

from __future__ import annotations

from ctxdb_core.testing._driver import Driver


class Tables:
    """The tables of one database: which of them have changed, and how they become again what they were.

    Args:
        driver: a connection in autocommit mode, which is kept open: it has copies of rows in temporary tables.
    """

    is_silent = False
    """Whether `restore` fires no trigger, so that nothing has changed again after it."""
    sequences_moved = False
    """Whether sequences were found elsewhere than they were, when `changed` was asked."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    async def remember(self) -> None:
        """Take what is in the tables now for what shall be there."""
        raise NotImplementedError

    async def changed(self) -> list[str]:
        """Return the names of the tables that hold something else."""
        raise NotImplementedError

    async def restore(self, tables: list[str]) -> None:
        """Make `tables`, which have changed, what they were; and all sequences."""
        raise NotImplementedError
