"""`Observer`: follows the sessions of one `DBConnect`, for its listeners and its limit for holding connections."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import ref

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._databases.database import Database
from ctxdb_core._databases.hold import Hold
from ctxdb_core._databases.url import without_secrets
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.session_factory import guarded

__all__ = ["EventTypes", "Observer", "note_commit", "note_error"]

logger = logging.getLogger("ctxdb")


Event = TypeVar("Event")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTypes(Generic[Event]):
    """The types of the events that listeners are told of (`ctxdb_core.events` says what they hold).

    An event names its `DBConnect`, whose module has these types and imports this one.
    """

    session_opened: Callable[..., Event]
    transaction_begun: Callable[..., Event]
    transaction_committed: Callable[..., Event]
    transaction_rolled_back: Callable[..., Event]
    session_closed: Callable[..., Event]


class Observer(Generic[Event]):
    """Follows the sessions that it is given."""

    def __init__(self, limit: float | None, events: EventTypes[Event]) -> None:
        if limit is not None:
            _listen_to_sessions()
        self.limit = limit
        """For how many seconds a transaction may hold its connection without a warning; ``None`` for ever."""
        self._events = events
        self._lock = threading.Lock()
        self._registrations: tuple[_Registration[Event], ...] = ()

    def add(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Tell `listener` of the sessions that are opened from now on; return what ends that."""
        _listen_to_sessions()
        registration = _Registration(listener)
        with self._lock:
            self._registrations = (*self._registrations, registration)

        def remove() -> None:
            registration.active = False
            with self._lock:
                self._registrations = tuple(each for each in self._registrations if each is not registration)

        return remove

    def follow(self, session: AsyncSession, db: Database, host: str) -> None:
        """Follow a session that `db` has just made on `host`."""
        if not self._registrations and self.limit is None:
            return
        record = _Record(db, without_secrets(host), self._registrations, self._events, self.limit)
        sync_session = guard_of(guarded(session))
        sync_session.info[_RECORD] = record
        if self._registrations:
            record.open()
            sync_session.on_end = record.close


class _Registration(Generic[Event]):
    __slots__ = ("active", "listener")

    def __init__(self, listener: Callable[[Event], object]) -> None:
        self.listener = listener
        self.active = True


class _Transaction:
    """What is known of a transaction that is under way."""

    __slots__ = ("begun", "committed", "ended", "hold", "of")

    def __init__(self, of: SessionTransaction, hold: Hold | None) -> None:
        self.of = ref(of)
        self.begun = time.perf_counter()
        self.hold = hold
        self.committed = False
        self.ended: float | None = None
        """When the database had ended it, although it may still have the connection."""


class _Record(Generic[Event]):
    """What is known of a session. The record has no reference to the session: the two go together."""

    __slots__ = (
        "commit_tried",
        "db",
        "error",
        "events",
        "held",
        "host",
        "limit",
        "opened",
        "registrations",
        "session_id",
        "transaction",
        "transactions",
    )

    def __init__(
        self,
        db: Database,
        host: str,
        registrations: tuple[_Registration[Event], ...],
        events: EventTypes[Event],
        limit: float | None,
    ) -> None:
        self.db = db
        self.host = host
        self.registrations = registrations
        self.events = events
        self.limit = limit
        self.opened: float | None = None
        self.transaction: _Transaction | None = None
        self.commit_tried = False
        """Whether a commit was asked for. Its flush may be the first statement, which takes the connection."""
        self.error: BaseException | None = None

    def tell(self, event_type: Callable[..., Event], **fields: Any) -> None:
        what = event_type(db=self.db, host=self.host, session_id=self.session_id, **fields)
        for registration in self.registrations:
            if registration.active:
                try:
                    registration.listener(what)
                except (Exception, asyncio.CancelledError):
                    # A plain call cannot be cancelled: the error comes from a future that the listener has read.
                    logger.exception("The listener %r failed; %s", registration.listener, what)

    def open(self) -> None:
        self.session_id = next(_session_ids)
        self.opened = time.perf_counter()
        self.transactions = 0
        self.held = 0.0
        self.tell(self.events.session_opened)

    def begin(self, transaction: SessionTransaction, connection: Connection) -> None:
        hold = None
        if self.limit is not None:
            hold = Hold(f"<{type(self.db).__name__} host={self.host!r}>", connection, self.limit)
        self.transaction = _Transaction(transaction, hold)
        if self.registrations:
            if self.opened is None:
                self.open()
            self.transactions += 1
            self.tell(self.events.transaction_begun, connection=connection)

    def end(self) -> None:
        transaction, self.transaction = self.transaction, None
        commit_tried, self.commit_tried = self.commit_tried, False
        # The traceback of the error refers to the session: it is not kept for longer than needed.
        error, self.error = self.error, None
        if transaction is None:
            return
        if transaction.hold is not None:
            transaction.hold.end()
        if not self.registrations:
            return
        now = time.perf_counter()
        duration = (transaction.ended or now) - transaction.begun
        held = now - transaction.begun
        self.held += held
        if transaction.committed:
            self.tell(self.events.transaction_committed, duration=duration, connection_held=held)
        else:
            self.tell(
                self.events.transaction_rolled_back,
                duration=duration,
                connection_held=held,
                commit_failed=commit_tried,
                error=error,
            )

    def close(self) -> None:
        # If the end of the transaction was interrupted, it was not told yet.
        self.end()
        opened, self.opened = self.opened, None
        if opened is not None:
            self.tell(
                self.events.session_closed,
                duration=time.perf_counter() - opened,
                transactions=self.transactions,
                connection_held=self.held,
            )


_session_ids = itertools.count(1)

_RECORD = "ctxdb.record"


def _record_of(session: Session) -> _Record[Any] | None:
    return session.info.get(_RECORD)


def note_error(session: AsyncSession, error: BaseException | None) -> None:
    """Remember why the transaction of `session` is going to be rolled back."""
    if error is not None and (record := _record_of(session.sync_session)) is not None:
        record.error = error


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    # The event also comes for a savepoint, and for each further engine that the transaction uses.
    if transaction.parent is None and (record := _record_of(session)) is not None:
        known = record.transaction
        if known is not None and known.of() is not transaction:
            # The end of the known transaction was interrupted.
            record.end()
        if record.transaction is None:
            record.begin(transaction, connection)


def note_commit(session: AsyncSession) -> None:
    """Note that the transaction of `session` is committed, also if a listener of the user's has failed after that."""
    _after_commit(session.sync_session)


def _before_commit(session: Session) -> None:
    if (record := _record_of(session)) is not None and not session.in_nested_transaction():
        record.commit_tried = True


def _after_commit(session: Session) -> None:
    if (transaction := _transaction_of(session)) is not None:
        transaction.committed = True
        transaction.ended = time.perf_counter()


def _after_rollback(session: Session) -> None:
    if (transaction := _transaction_of(session)) is not None:
        transaction.ended = time.perf_counter()


def _transaction_of(session: Session) -> _Transaction | None:
    # Events tell of transactions alone: the end of a savepoint is not told.
    record = _record_of(session)
    return None if record is None or session.in_nested_transaction() else record.transaction


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None and (record := _record_of(session)) is not None:
        record.end()


_listen_lock = threading.Lock()


def _listen_to_sessions() -> None:
    """Listen to SQLAlchemy's sessions, once and for all.

    Listening to each one would cost it 30 microseconds. From the first listener or limit on, each other session of the
    process pays for a look-up in a dictionary.
    """
    with _listen_lock:
        if not event.contains(Session, "after_begin", _after_begin):
            event.listen(Session, "before_commit", _before_commit)
            event.listen(Session, "after_commit", _after_commit)
            event.listen(Session, "after_rollback", _after_rollback)
            event.listen(Session, "after_transaction_end", _after_transaction_end)
            event.listen(Session, "after_begin", _after_begin)
