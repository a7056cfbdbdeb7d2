"""`Transaction`: what a session takes for its own, on a shared connection."""

from __future__ import annotations

from ctxdb_core.testing._settings import Settings


class Transaction:
    """What a session takes for its transaction: a savepoint of the shared connection.

    Args:
        autocommit: whether each statement is a transaction of its own.
        read_only: whether writes are refused.
        lenient: whether it lets others go first also when it has written: they see what it wrote, and it cannot undo
            that any more. The transaction of a test's session is lenient.
        settings: the settings that are in force for it.
    """

    def __init__(self, *, autocommit: bool, read_only: bool, lenient: bool, settings: Settings) -> None:
        self.autocommit = autocommit
        self.read_only = read_only
        self.lenient = lenient
        self.settings = settings
        self.savepoint: str | None = None
        """The name of its savepoint, as long as that is open."""
        self.inside: tuple[Transaction, ...] = ()
        """The other transactions that were open in its task, or in a task that started it, at its last statement."""
        self.task: object = None
        """The task that made its last statement."""
        self.last = ""
        """What its last statement was, for the errors that name it."""
        self.wrote = False
        self.failed = False
        """Whether a statement has failed, so that PostgreSQL refuses all others."""
        self.savepoints: list[str] = []
        """The savepoints of the session's own that are open."""
        self.locked = False
        """Whether it has taken locks, which keep others out until it ends."""
        self.within: list[str] = []
        """What others have committed inside of it: a roll-back to its savepoint would undo that."""
        self.committed = False
        """Whether it was committed, and its savepoint waits for the end of savepoints that were set after it."""
        self.over = False
        self.undone = False
        """Whether it was undone together with the transaction whose savepoint is around its own."""
        self.interrupted = False
        """Whether the statement has waited for its turn until its time was up."""
        self.overdue = False
        """Whether it has waited in vain for transactions that began after it."""

    @property
    def gives_way(self) -> bool:
        """Whether its savepoint can be released for others: there is nothing that it could still want to undo."""
        return not self.savepoints and (self.failed or self.lenient or not (self.wrote or self.locked))

    def __str__(self) -> str:
        return f"the one of {self.last!r}"
