"""`UnitSessions`: how a unit of work opens its sessions, and which code may use them."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop  # for implementers of event loops, and what costs the least
from collections.abc import Awaitable, Callable
from contextvars import Token
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._sqlalchemy.door import Door, StatementObserver
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.second_connections import note_second_session
from ctxdb_core._sqlalchemy.session_factory import guarded
from ctxdb_core._transactions.statement_timeout import StatementTimeout, limit_open_transaction, limit_statements
from ctxdb_core._units import session_end
from ctxdb_core._units.commit import BeforeCommit
from ctxdb_core._units.registration import Registration
from ctxdb_core._units.settings import NO_SETTINGS, UnitSettings
from ctxdb_core._units.unit_hooks import UnitHooks
from ctxdb_core.errors import ContextClosedError, ContextNotInitiatedError

__all__ = ["NO_SESSIONS_ANY_MORE", "NO_SESSIONS_YET", "CreateSession", "UnitSessions"]

CreateSession: TypeAlias = Callable[[], Awaitable[AsyncSession]]
"""Makes a session, where it is not the `DBConnect` that does."""

NO_SESSIONS_YET: Any = MappingProxyType({})
"""What `sessions` of a unit is before its first one is opened: all units share it, so it cannot be changed."""

NO_SESSIONS_ANY_MORE: dict[DBConnect, AsyncSession] = {}
"""What `sessions` of a unit that has ended is. Never written to: sessions are opened in units that have not."""


class UnitSessions:
    """The sessions that belong together, at most one for each `DBConnect`: the part of a unit of work that opens them.

    Args:
        before_commit: awaited with each session that is about to be committed.
    """

    # These two tell what kind of unit a class is. They are never set on an object.
    shared: ClassVar[bool] = False
    """Whether a middleware may join the unit when it finds it in its context: only a test harness may wish that."""
    autocommit: ClassVar[bool] = False
    """Whether its sessions have no transactions: each statement is committed by itself."""

    sessions: dict[DBConnect, AsyncSession]
    """The sessions that are open, in the order in which they were opened."""
    loop: asyncio.AbstractEventLoop | None
    """The event loop that the unit belongs to, as its connections serve that one alone; ``None`` if none ran."""

    # Each attribute is set when a unit is made: what is found in the class alone is read six times as slowly.
    settings: UnitSettings
    """What the unit was told when it was opened."""
    hooks: UnitHooks | None
    """What the code has asked of the begin and the end of transactions; ``None`` as long as it was nothing."""
    registration: Registration | None
    """What the rest of the process knows of the unit; ``None`` as long as it has no session, watcher or id."""
    token: Token[Any] | None
    """What was current when the unit was entered, and is made current again by `UnitOfWork.leave`."""

    def __init__(self, before_commit: BeforeCommit | None = None) -> None:
        self.sessions = NO_SESSIONS_YET
        self.loop = _get_running_loop()
        self.settings = NO_SETTINGS if before_commit is None else UnitSettings(before_commit)
        self.hooks = self.registration = self.token = None

    @property
    def closed(self) -> bool:
        """Whether the unit of work has ended."""
        return self.sessions is NO_SESSIONS_ANY_MORE

    @property
    def opened(self) -> float | None:
        """When the first session was opened, by `time.perf_counter`; ``None`` before that."""
        return None if self.registration is None else self.registration.opened

    def _registered(self) -> Registration:
        if self.registration is None:
            self.registration = Registration()
        return self.registration

    def of(self, db: DBConnect) -> UnitSessions:
        """Return the unit that answers for `db`: this one, unless it is about another database alone."""
        return self

    async def open_session(self, db: DBConnect, create: CreateSession | None = None) -> AsyncSession:
        """Return the session on `db`, made now if need be.

        Args:
            db: where.
            create: makes the session in the place of `db`; not asked where the unit reads `db` from another database
                (see `source_of`).

        Raises:
            ContextClosedError: the unit of work has ended.
            ContextNotInitiatedError: it belongs to another thread's event loop.
        """
        self.check_usable()
        if db in self.sessions:
            return self.sessions[db]
        source = db if self.settings.reads_from is None else self.source_of(db)
        if source is not db:
            create = None
        session = source.create_session_at_once(self.loop) if create is None else None
        if session is None:
            session = await (create or source.create_session)()
            if self.sessions is NO_SESSIONS_ANY_MORE or db in self.sessions:
                # Meanwhile, the unit has ended, or another of its tasks has made the session.
                await session_end.close(session, None, db)
                return await self.open_session(db)
        self._take(db, session)
        return session

    def source_of(self, db: DBConnect) -> DBConnect:
        """Return the database whose sessions this unit uses where the code asks for `db`.

        That is `db` itself, or a reader in its place (see `UnitSettings.reads_from`). Where a test leads `db` alone to
        another database, such as to the connection that it shares with the application, there is no other reader of
        that.
        """
        reads_from = self.settings.reads_from
        reader = None if reads_from is None else reads_from.get(db)
        return db if reader is None or (db.is_overridden and not reader.is_overridden) else reader

    def create_session_at_once(self, db: DBConnect, create: Callable[[], AsyncSession | None]) -> AsyncSession | None:
        """Return a new session on `db`, to be adopted; ``None`` if making one takes an ``await``.

        Args:
            db: where.
            create: makes the session; not asked where the unit reads `db` from another database (see `source_of`).
        """
        source = self.source_of(db)
        return create() if source is db else source.create_session_at_once(self.loop)

    def adopt_session(self, db: DBConnect, session: AsyncSession) -> AsyncSession:
        """Use a new `session` on `db`, unless the unit has one there already; return the session that it uses.

        Raises:
            ContextClosedError, ContextNotInitiatedError: as `open_session`.
        """
        self.check_usable()
        if db in self.sessions:
            return self.sessions[db]
        self._take(db, session)
        return session

    def _take(self, db: DBConnect, session: AsyncSession) -> None:
        registration = self.registration
        if registration is None:
            self.registration = registration = Registration()
        if registration.opened is None:
            self.sessions = sessions = self._place_of_sessions()
            registration.begin(self, sessions)
        else:
            engine = session.sync_session.bind
            for first in self.sessions.values():
                # Two databases may have one engine, and so take their connections from one pool.
                if isinstance(engine, Engine) and first.sync_session.bind is engine:
                    note_second_session(db, session, first)
        self.prepare_session(db, session)
        self.sessions[db] = session
        if self.token is not None and isinstance(outer := self.token.old_value, UnitSessions):
            outer.note_second_session(db, session)
        if self.hooks is not None and self.hooks.callbacks is not None:
            self.hooks.callbacks.watch_new(db, session)

    def _place_of_sessions(self) -> dict[DBConnect, AsyncSession]:
        """Return where to keep the sessions, when the first one is opened."""
        return {}

    def note_second_session(self, db: DBConnect, session: AsyncSession) -> None:
        """Note that code which this unit may wait for opens a `session` of its own on `db`."""
        if self.sessions is NO_SESSIONS_ANY_MORE or not self.is_on_its_loop():
            return
        unit = self.of(db)
        first = unit.sessions.get(db)
        if first is not None:
            # A reader in the place of `db` has a pool of its own.
            if unit.source_of(db) is db:
                note_second_session(db, session, first)
        elif self.token is not None and isinstance(outer := self.token.old_value, UnitSessions):
            outer.note_second_session(db, session)

    def prepare_session(self, db: DBConnect, session: AsyncSession) -> None:
        """Make a new session one of this unit."""
        guard = guard_of(guarded(session))
        guard.door = Door(self.statement_observer(), self.loop)
        guard.before_close = session_end.may_be_closed
        if self.hooks is not None:
            self.hooks.prepare(db, session)
        if self.settings.statement_timeout:
            limit_statements(session, self.current_statement_timeout)

    def current_statement_timeout(self) -> StatementTimeout | None:
        """Return how long statements may take now; a session asks it at each transaction."""
        return self.settings.statement_timeout

    def share_statement_timeout(self, outer: UnitSessions | None) -> None:
        """Take over the limit of the unit that waits for this one."""
        if outer is not None and not outer.closed:
            self._set_statement_timeout(outer.settings.statement_timeout)

    async def limit_statements(self, timeout: StatementTimeout | None) -> None:
        """Let the statements of the unit take no longer than `timeout` from now on."""
        self.check_usable()
        self._set_statement_timeout(timeout)
        for session in list(self.sessions.values()):
            limit_statements(session, self.current_statement_timeout)
            await limit_open_transaction(session, self.current_statement_timeout)

    def _set_statement_timeout(self, timeout: StatementTimeout | None) -> None:
        if timeout is not self.settings.statement_timeout:
            self.settings = replace(self.settings, statement_timeout=timeout)

    def statement_observer(self) -> StatementObserver | None:
        """Return what is called before each statement of a session that is opened now."""
        return None

    def is_on_its_loop(self) -> bool:
        """Return whether the running code is on the event loop, and so on the thread, that the unit belongs to."""
        return self.loop is _get_running_loop()

    def check_usable(self) -> None:
        """Raise the error that says why the running code cannot use this unit, if it cannot."""
        if self.sessions is NO_SESSIONS_ANY_MORE:
            raise ContextClosedError
        if not self.is_on_its_loop():
            if self.shared:
                raise ContextNotInitiatedError(
                    "The unit of work found here is a test's, on another thread's event loop, and its connection "
                    "serves that loop alone. For an application that runs on a thread of its own, let the test use "
                    "`ctxdb_core.testing.shared_transaction`, which serves every loop."
                )
            raise ContextNotInitiatedError(
                "The unit of work found here belongs to another event loop, that of another thread for instance, and a "
                "connection serves the loop that opened it. Wrap the code that runs here in `async with "
                "new_db_ctx():`, or run it on the first loop (`anyio.from_thread.run`)."
            )
