"""Counts what an attempt has committed: only an attempt that has committed nothing is made again."""

from __future__ import annotations

import threading
from collections import Counter
from contextvars import ContextVar
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from ctxdb_core._databases.url import without_secrets
from ctxdb_core._sqlalchemy.binds import is_autocommit, is_read_only

__all__ = ["Attempt", "current_attempt", "watch_engines"]


class Attempt:
    """One run of a unit of work that may be run again.

    Args:
        outer: the attempt that this one is a part of: what is committed here is committed there, too.
    """

    def __init__(self, outer: Attempt | None) -> None:
        self.outer = outer
        self._commits: Counter[str] = Counter()
        self._last: WeakSet[Connection] = WeakSet()
        """The connections on which a COMMIT was the last thing to be sent: it may yet be refused."""

    @property
    def committed(self) -> list[str]:
        """The addresses of the databases on which something was committed."""
        return [address for address, number in self._commits.items() if number]

    def note(self, connection: Connection) -> None:
        """Take note of a COMMIT that is about to be sent, or of a statement that is committed by itself."""
        if connection not in self._last:
            self._last.add(connection)
            self._commits[_address(connection)] += 1

    def forget(self, connection: Connection) -> None:
        """Note that the database has refused the COMMIT that was sent last."""
        if connection in self._last:
            self._last.remove(connection)
            self._commits[_address(connection)] -= 1

    def go_on(self, connection: Connection) -> None:
        """Note that the COMMIT that was sent last has succeeded, as another transaction begins."""
        self._last.discard(connection)


current_attempt: ContextVar[Attempt | None] = ContextVar("ctxdb_attempt", default=None)
"""The attempt of the running code. Tasks inherit it: what they commit meanwhile counts."""

_lock = threading.Lock()


def watch_engines() -> None:
    """Listen to all engines of the process, once: each COMMIT is counted, by a session or a bare connection.

    A transaction outside of any attempt pays for two look-ups of a context variable.
    """
    with _lock:
        if not event.contains(Engine, "commit", _commit):
            event.listen(Engine, "begin", _begin)
            event.listen(Engine, "handle_error", _handle_error)
            event.listen(Engine, "commit_twophase", _commit_twophase)
            event.listen(Engine, "commit", _commit)


def _begin(connection: Connection) -> None:
    attempt = current_attempt.get()
    while attempt is not None:
        attempt.go_on(connection)
        if is_autocommit(connection) and not is_read_only(connection):
            attempt.note(connection)
        attempt = attempt.outer


def _commit(connection: Connection) -> None:
    attempt = current_attempt.get()
    # A read-only transaction leaves nothing behind that a second attempt would find.
    if attempt is None or is_read_only(connection):
        return
    while attempt is not None:
        attempt.note(connection)
        attempt = attempt.outer


def _commit_twophase(connection: Connection, xid: object, is_prepared: bool) -> None:  # noqa: FBT001 - as it is called
    _commit(connection)


def _handle_error(context: ExceptionContext) -> None:
    # There is no event for a COMMIT that has succeeded, only for one that is about to be sent.
    attempt, connection = current_attempt.get(), context.connection
    if connection is None or context.statement is not None or is_autocommit(connection):
        return
    while attempt is not None:
        attempt.forget(connection)
        attempt = attempt.outer


def _address(connection: Connection) -> str:
    return without_secrets(connection.engine.url.render_as_string())
