"""`DBConnect`: a database as the application knows it, whichever host and event loop it is used on; and its events."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, cast
from weakref import WeakValueDictionary

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from ctxdb_core._databases.arguments import (
    awaitable_of,
    check_async_engine,
    check_engine_options,
    check_held_after,
    check_session_handler,
    check_session_maker_creator,
    check_url,
    explain_missing_call,
)
from ctxdb_core._databases.attempt_all import attempt_all
from ctxdb_core._databases.borrowed import BorrowedEngine
from ctxdb_core._databases.database import Database
from ctxdb_core._databases.engine_creators import (
    check_creator_of_other,
    check_engine_creator,
    taking_host,
    try_engine_options,
)
from ctxdb_core._databases.engines import Engines, check_host
from ctxdb_core._databases.factory import create_engine
from ctxdb_core._databases.lazy import LazySessionMaker, session_class_of, session_without_loop
from ctxdb_core._databases.loop_engine import EngineCreator
from ctxdb_core._databases.observer import EventTypes, Observer
from ctxdb_core._databases.overridden import Override
from ctxdb_core._databases.shutdown import wait_for_cancelled_queries
from ctxdb_core._databases.status import DBStatus, status_of
from ctxdb_core._databases.target import EngineListener, Target
from ctxdb_core._databases.url import host_of, without_secrets
from ctxdb_core._sqlalchemy.lost_commits import check_can_resolve
from ctxdb_core._wording import article, type_of
from ctxdb_core.errors import ArgumentTypeError

if TYPE_CHECKING:
    # This `TypeVar` has defaults before Python 3.13. SQLAlchemy brings the package; no code here needs it at run time.
    from typing_extensions import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession, default=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, default=AsyncSession, covariant=True)
else:
    from typing import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, covariant=True)

__all__ = [
    "DBConnect",
    "DBEvent",
    "EngineListener",
    "EventListener",
    "SessionClosed",
    "SessionOpened",
    "SessionT",
    "SessionT_co",
    "TransactionBegun",
    "TransactionCommitted",
    "TransactionRolledBack",
    "close_all",
    "default_session_maker",
]


def default_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Return a session maker for `engine` whose objects stay readable after a commit.

    ``expire_on_commit=False``: an expired attribute is loaded again at its next access, which asyncio code cannot do
    implicitly (SQLAlchemy, "Preventing Implicit IO when Using AsyncSession").
    """
    return async_sessionmaker(engine, expire_on_commit=False)


class DBConnect(Database, Generic[SessionT_co]):
    """A database: makes its engine at the first use, hands out sessions, and can change its host while it is used.

    It is generic in the class of its sessions, which is that of the session maker: ``DBConnect[AsyncSession]`` by
    default.

    Args:
        engine_creator: returns the engine for a host. Called once for each host and event loop, at the first use. If
            it takes no parameter, the database is where the engine is, and needs no `host`.
        session_maker_creator: returns the session maker for an engine.
        host: where the database is; without it, `connect` must be called before the first use.
        before_create_session_handler: awaited with this object before each session is made, for instance to call
            `change_host`.
        warn_connection_held_after: log a warning, with the place in the code, when a session holds a connection for
            longer than so many seconds.
        resolve_commits: where the connection is lost while COMMIT is under way, ask PostgreSQL (13 or newer) on a new
            connection what became of the transaction: the commit succeeds or fails by that, instead of raising
            `CommitOutcomeUnknownError`. It costs one round trip before each COMMIT of a transaction that has written.

    Raises:
        ArgumentTypeError: `engine_creator`, `session_maker_creator` or `before_create_session_handler` is no function
            that could be called so; the error says what to write, for an engine or a URL for instance. Or
            `warn_connection_held_after` is no number (a ``TypeError``, too).
        HostNotSetError: `host` is empty (a ``ValueError``, too).
        ValueError: `warn_connection_held_after` is negative.
    """

    def __init__(
        self,
        engine_creator: EngineCreator | Callable[[], AsyncEngine],
        session_maker_creator: Callable[[AsyncEngine], async_sessionmaker[SessionT_co]] = default_session_maker,  # type: ignore[assignment]  # then it is `AsyncSession`
        host: str | None = None,
        before_create_session_handler: Callable[[DBConnect[Any]], Awaitable[object]] | None = None,
        *,
        warn_connection_held_after: float | None = None,
        resolve_commits: bool = False,
    ) -> None:
        check_engine_creator(engine_creator)
        check_session_maker_creator(session_maker_creator)
        if host is not None:
            check_host(host)
        if before_create_session_handler is not None:
            check_session_handler(before_create_session_handler)
        check_held_after(warn_connection_held_after)
        target = Target(taking_host(engine_creator), session_maker_creator, host, before_create_session_handler)
        self._engines = Engines(target, resolve_commits=resolve_commits)
        self._observer = (
            None if warn_connection_held_after is None else Observer(warn_connection_held_after, _EVENT_TYPES)
        )
        self._lock = threading.Lock()
        """Keeps two threads from making an observer each."""
        self._read_only = False
        """Whether `from_url` was asked for a read-only database: then those of `overridden` are read-only, too."""
        self._capture_callback: Callable[[Callable[[], object]], Callable[[], object]] | None = None
        """Given a callback of `on_commit`, returns what is called in its place; set by a testing tool."""

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        read_only: bool = False,
        session_maker_creator: Callable[[AsyncEngine], async_sessionmaker[SessionT]] = default_session_maker,  # type: ignore[assignment]  # then it is `AsyncSession`
        warn_connection_held_after: float | None = None,
        resolve_commits: bool = False,
        **engine_options: Any,
    ) -> DBConnect[SessionT]:
        """Return a `DBConnect` for the one host that `url` names.

        A database in memory (``sqlite+aiosqlite://``) is the same one on every event loop, until `close`. Its sessions
        share one connection, and so one transaction: it is for one unit of work at a time.

        Args:
            url: the database's URL, with an asyncio driver.
            read_only: every query on PostgreSQL is one round trip (autocommit), and the server refuses writes.
            session_maker_creator: as for the class.
            warn_connection_held_after: as for the class.
            resolve_commits: as for the class.
            **engine_options: passed to `sqlalchemy.ext.asyncio.create_async_engine`.

        Raises:
            ArgumentTypeError: `url` is no URL, or an option is not one of engines (a ``TypeError``, too).
            ArgumentValueError: the URL has no asyncio driver, or a port that is no number; the database cannot be made
                read-only, as `read_only` asks; or `warn_connection_held_after` is negative (a ``ValueError``, too).
            sqlalchemy.exc.ArgumentError: `url` cannot be parsed.
        """
        parsed = check_url(url)
        check_engine_options(engine_options)
        if resolve_commits:
            check_can_resolve(parsed.get_backend_name())

        def engine_creator(host: str) -> AsyncEngine:
            return create_engine(parsed, host, dict(engine_options), read_only=read_only)

        if "pool" not in engine_options:
            # An engine that is never used opens nothing. It is made here for the error of a wrong option, which belongs
            # to this call and not to the first request. A pool that is given would keep the listeners of this engine.
            try_engine_options(engine_creator, host_of(parsed))
        make: Any = cls
        db: DBConnect[SessionT] = make(
            engine_creator,
            session_maker_creator,
            host=host_of(parsed),
            warn_connection_held_after=warn_connection_held_after,
            resolve_commits=resolve_commits,
        )
        db._read_only = read_only
        return db

    @classmethod
    def from_engine(
        cls,
        engine: AsyncEngine,
        *,
        session_maker_creator: Callable[[AsyncEngine], async_sessionmaker[SessionT]] = default_session_maker,  # type: ignore[assignment]  # then it is `AsyncSession`
        warn_connection_held_after: float | None = None,
    ) -> DBConnect[SessionT]:
        """Return a `DBConnect` for an engine that the application has made.

        The engine gets the guards that every engine of a `DBConnect` gets; they stay on it. It remains its owner's, who
        disposes of it: `close` does not. Its pool serves the event loop that uses it first; each other loop gets an
        engine like it, with a pool of its own, which `close` closes.

        Args:
            engine: the engine.
            session_maker_creator: as for the class.
            warn_connection_held_after: as for the class.

        Raises:
            ArgumentTypeError: something else is given; the error says what to write (a ``TypeError``, too).
            ArgumentValueError: `warn_connection_held_after` is negative (a ``ValueError``, too).
        """
        make: Any = cls
        db: DBConnect[SessionT] = make(
            BorrowedEngine(check_async_engine(engine)),
            session_maker_creator,
            host=host_of(engine.url),
            warn_connection_held_after=warn_connection_held_after,
        )
        db._engines.keep_host()
        return db

    @property
    def host(self) -> str | None:
        """The host that new sessions go to; ``None`` before the first `connect`."""
        return self._engines.target.host

    async def connect(self, host: str) -> None:
        """Use `host`, and make its engine now; no connection is opened before the first statement.

        Raises:
            HostNotSetError: `host` is empty (a ``ValueError``, too).
        """
        await self.change_host(host)
        self._engines.of_running_loop()

    async def change_host(self, host: str, keep: Collection[str] = ()) -> None:
        """Send new sessions to `host` from now on; does nothing if they go there already.

        Sessions that exist stay on the host that they were made for. The idle connections to a host that is left are
        closed now, the others when their sessions give them back. If the new engine cannot be made, everything stays as
        it was.

        Inside of a block of `overridden`, and with `from_engine`, this does nothing.

        Args:
            host: where new sessions go.
            keep: other hosts that are not left for good, such as the replicas that take turns: their engines and
                connections are kept, and used again by a change back to them. Those of all other hosts are closed, also
                if an earlier call has kept them.

        Raises:
            HostNotSetError: `host` is empty (a ``ValueError``, too).
            ArgumentValueError: the `engine_creator` takes no host (a ``ValueError``, too).
            ArgumentTypeError: `keep` is no collection of hosts, or is a string (a ``TypeError``, too).
        """
        await self._engines.change_host(host, keep)

    async def session_maker(self) -> async_sessionmaker[SessionT_co]:
        """Return the session maker of the current host and event loop.

        Raises:
            HostNotSetError: no host is known yet.
        """
        await self._call_handler()
        return self._engines.of_running_loop().session_maker

    async def create_session(self) -> SessionT_co:
        """Return a new session that the caller closes.

        Raises:
            HostNotSetError: no host is known yet.
        """
        await self._call_handler()
        return self._new_session()

    async def _call_handler(self) -> None:
        if (handler := self._engines.target.before_create_session) is not None:
            await awaitable_of(handler(self), handler, "`before_create_session_handler`")

    def create_session_at_once(self, loop: asyncio.AbstractEventLoop | None = None) -> SessionT_co | None:
        """Return a new session that the caller closes; ``None`` if `before_create_session_handler` is to be awaited.

        Args:
            loop: the running event loop, where the caller knows it.

        Raises:
            HostNotSetError: no host is known yet.
        """
        return self._new_session(loop) if self._engines.target.before_create_session is None else None

    def _new_session(self, loop: asyncio.AbstractEventLoop | None = None) -> SessionT_co:
        engine = self._engines.of_running_loop() if loop is None else self._engines.of(loop)
        session = engine.new_session()
        self._follow(session, engine.host)
        return cast("SessionT_co", session)

    @cached_property
    def lazy_session_maker(self) -> async_sessionmaker[SessionT_co]:
        """A session maker that is there at once, for libraries that want one when they are set up (sqladmin).

        Each session that it makes is on the engine that this object has then, for the running event loop; a session
        that is made before any event loop runs is on that of the loop which uses it. No unit of work owns them: the
        code that makes one commits and closes it. ``before_create_session_handler`` is asynchronous and not awaited for
        them: they go to the host that there is.
        """
        return LazySessionMaker(self._new_lazy_session, self._session_class)

    def _new_lazy_session(self, **options: Any) -> SessionT_co:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            session, host = session_without_loop(self._engines, options), self.host or ""
        else:
            engine = self._engines.of_running_loop()
            session, host = engine.new_session(**options), engine.host
        self._follow(session, host)
        return cast("SessionT_co", session)

    def _session_class(self) -> type[SessionT_co]:
        return cast("type[SessionT_co]", session_class_of(self._engines))

    def _follow(self, session: AsyncSession, host: str) -> None:
        """Tell listeners of what happens in `session`, which this object or a user's session maker has made."""
        if self._observer is not None:
            self._observer.follow(session, self, host)

    async def engine(self) -> AsyncEngine:
        """Return the engine of the current host and event loop.

        As long as no host is known, `before_create_session_handler` is awaited first, as for a session: tables may be
        made when the application starts, before there was any session. The handler itself must set the host before it
        asks for the engine.

        Raises:
            HostNotSetError: no host is known yet.
        """
        if not self._engines.target.knows_host:
            await self._call_handler()
        return self._engines.of_running_loop().engine

    def on_event(self, listener: EventListener) -> Callable[[], None]:
        """Call `listener` with what happens in the sessions that are opened from now on: see `ctxdb_core.events`.

        It is a plain function, called in the task that causes the event, and must not wait for anything. Its errors are
        logged, and change nothing. Sessions that the caller makes by `session_maker` are not followed.

        Returns:
            A function without arguments that ends the calls of `listener`; it may be called more than once.
        """
        with self._lock:
            if self._observer is None:
                self._observer = Observer(None, _EVENT_TYPES)
        return self._observer.add(listener)

    def status(self) -> DBStatus:
        """Return what this database is doing now: its pools, and the units of work with a session on it.

        For health endpoints and tests. It waits for nothing and asks no server, and may be called from anywhere.
        """
        return status_of(self, self._engines.target.all)

    def on_engine(self, listener: EngineListener, *, overridden: bool = False) -> None:
        """Call `listener` with each engine and its host: first for the engines that there are, later for each new one.

        For a new engine, it is called before the engine is used, on the engine's event loop. It must not use this
        object.

        Args:
            listener: is called with the host and the engine.
            overridden: whether the listener is also told of the engines that blocks of `overridden` make. Leave it out
                for a listener that teaches an engine something of this database's own.
        """
        self._engines.add_listener(listener, overridden=overridden)

    async def close(self) -> None:
        """Close every connection: the idle ones now, the others when their sessions give them back.

        The object can be used again afterwards: it makes a new engine.
        """
        await self._engines.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # `__init__` may have raised.
        if hasattr(self, "_engines"):
            self._engines.abandon()

    def __deepcopy__(self, memo: object) -> Self:
        """Return this object: it stands for one database, and units of work know their sessions by it.

        Containers of dependencies (dependency-injector), and defaults of models, copy what they are given.
        """
        return self

    def __copy__(self) -> Self:
        """Return this object, as `__deepcopy__` does."""
        return self

    def __repr__(self) -> str:
        host = "None" if self.host is None else repr(without_secrets(self.host))
        return f"<{type(self).__name__} host={host}>"

    def overridden(
        self, url_or_creator: str | URL | EngineCreator | Callable[[], AsyncEngine], **engine_options: Any
    ) -> Override[DBConnect[SessionT_co]]:
        """Lead to another database for a block: for tests of an application that has this object at module level.

        ``with db.overridden(url):`` and ``async with db.overridden(url):`` both serve; the second one waits until the
        block's idle connections are closed. Inside of it, this object leads to the other database in each task, thread
        and event loop, which gets an engine of its own. It makes sessions as before, is read-only if it was so by
        `from_url`, and stays on the other database: neither `before_create_session_handler` nor `change_host` nor
        `resolve_commits` is in effect, and listeners of `on_engine` are not told, unless they are added in the block or
        for such blocks, too.
        Engines and sessions that are older than the block stay what they are. Blocks may be nested, and end in any
        order.

        Args:
            url_or_creator: the other database's URL, with an asyncio driver; or what creates its engine, as for the
                class.
            **engine_options: with a URL, passed to `sqlalchemy.ext.asyncio.create_async_engine`.

        Raises:
            ArgumentTypeError: `url_or_creator` is neither a URL nor a function, or there are options beside a function
                (a ``TypeError``, too).
            ArgumentValueError: the URL has no asyncio driver, or a port that is no number (a ``ValueError``, too).
            sqlalchemy.exc.ArgumentError: the URL cannot be parsed.
        """
        if isinstance(url_or_creator, str | URL):
            url = check_url(url_or_creator)
            host, read_only = host_of(url), self._read_only

            def create(host: str) -> AsyncEngine:
                return create_engine(url, host, dict(engine_options), read_only=read_only)

            return Override(self, self._engines, host, create)
        check_creator_of_other(url_or_creator)
        if engine_options:
            raise ArgumentTypeError(
                f"overridden() takes {', '.join(engine_options)} with a URL alone: let the creator pass it on."
            )
        return Override(self, self._engines, self.host or "localhost", taking_host(url_or_creator))

    @property
    def is_overridden(self) -> bool:
        """Whether this object leads to another database at the moment: by `overridden`, or by a testing tool."""
        return self._engines.is_replaced


# --- events -----------------------------------------------------------------------------------------------------------

# `ctxdb_core.events` has the events for applications. They are defined here, as an event names its `DBConnect`, and
# `DBConnect.on_event` names the events: two modules would import each other.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DBEvent:
    """The base of all events."""

    db: DBConnect[Any] = field(repr=False)
    """The `DBConnect` of the session."""
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

_EVENT_TYPES: EventTypes[DBEvent] = EventTypes(
    session_opened=SessionOpened,
    transaction_begun=TransactionBegun,
    transaction_committed=TransactionCommitted,
    transaction_rolled_back=TransactionRolledBack,
    session_closed=SessionClosed,
)

# --- databases that are given -----------------------------------------------------------------------------------------


def check_database(db: object) -> None:
    """Raise the error that says what to pass if `db` is no `DBConnect`."""
    if isinstance(db, DBConnect):
        return
    # A subclass, of ctxdb's own for instance, is named by the class that its user knows: `AsyncSession`.
    known = next((kind.__name__ for kind in type(db).__mro__ if kind.__name__ in _INSTEAD), None)
    raise ArgumentTypeError(
        f"A `DBConnect` is needed here, and {article(known) if known else type_of(db)} is given: pass the one that the "
        f"application has made, by `DBConnect.from_url(url)` for instance.{_INSTEAD[known] if known else ''}"
    )


_INSTEAD = {
    "AsyncEngine": " For an engine of your own there is `TransactionContext(engine)`, or "
    "`DBConnect.from_engine(engine)`.",
    "AsyncSession": " The functions of ctxdb find the session of a database by themselves.",
    "TransactionContext": " A TransactionContext has blocks of its own: `async with context.transaction():`.",
}


# The keys are synchronous engines, as two `AsyncEngine` objects may share one.
_borrowed: WeakValueDictionary[Engine, DBConnect] = WeakValueDictionary()


def borrow(engine: AsyncEngine) -> DBConnect:
    """Return the `DBConnect` that stands for `engine`: a unit of work has one session for each database."""
    db = _borrowed.get(engine.sync_engine)
    if db is None:
        db = _borrowed[engine.sync_engine] = DBConnect.from_engine(engine)
    return db


explain_missing_call(DBConnect.engine, AsyncEngine, "engine = await db.engine()")
explain_missing_call(DBConnect.session_maker, async_sessionmaker, "maker = await db.session_maker()")


async def close_all(*dbs: DBConnect[Any]) -> None:
    """Close every one of `dbs`, also if closing another one fails: what adapters do when an application shuts down.

    The queries of tasks that have just been cancelled are stopped on the server before it returns.

    Raises:
        ArgumentTypeError: one of `dbs` is no `DBConnect`; the others are closed.
        Exception: the only error; an ``ExceptionGroup`` if there were several.
    """

    async def close(db: DBConnect[Any]) -> None:
        check_database(db)
        await db.close()

    await attempt_all([*(partial(close, db) for db in dbs), wait_for_cancelled_queries])
