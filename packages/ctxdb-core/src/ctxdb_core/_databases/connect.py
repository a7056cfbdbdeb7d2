"""`DBConnect`: a database as the application knows it, whichever host and event loop it is used on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeAlias, cast
from weakref import WeakValueDictionary

from sqlalchemy import URL, Connection, Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from ctxdb_core._databases.arguments import (
    check_async_engine,
    check_asyncio_driver,
    check_engine_options,
    check_function,
    check_session_maker_creator,
    check_url,
    explain_missing_call,
    looks_like_url,
    parameters_of,
    type_of,
    why_no_engine_creator,
)
from ctxdb_core._databases.borrowed import BorrowedEngine
from ctxdb_core._databases.factory import create_engine
from ctxdb_core._databases.lazy import LazySessionMaker
from ctxdb_core._databases.loop_engine import EngineCreator, Lifetime, LoopEngine, SessionMakerCreator
from ctxdb_core._databases.observer import Observer
from ctxdb_core._databases.shutdown import wait_for_cancelled_queries
from ctxdb_core._databases.status import DBStatus, status_of
from ctxdb_core._databases.url import host_of, without_secrets
from ctxdb_core._sqlalchemy.guarded_session import guard_of
from ctxdb_core._sqlalchemy.lost_commits import check_can_resolve, note_readers
from ctxdb_core._sqlalchemy.session_factory import SessionFactory, guarded
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError, HostNotSetError
from ctxdb_core.events import EventListener

if TYPE_CHECKING:
    # It has defaults before Python 3.13; SQLAlchemy depends on it, and nothing here needs it when it runs.
    from typing_extensions import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession, default=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, default=AsyncSession, covariant=True)
else:
    from typing import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, covariant=True)

__all__ = ["DBConnect", "EngineListener", "SessionT", "SessionT_co", "close_all", "default_session_maker"]

EngineListener: TypeAlias = Callable[[str, AsyncEngine], object]
"""Called with a host and the engine that was made for it."""

LoopEngines: TypeAlias = dict[asyncio.AbstractEventLoop, LoopEngine]
"""The engines of one host."""


class HostEngines(NamedTuple):
    """The engines of a `DBConnect`: those of its host, and those that are kept of others."""

    host: str | None
    current: LoopEngines
    kept: dict[str, LoopEngines]

    @property
    def all(self) -> list[LoopEngine]:
        """Each of them."""
        return [engine for engines in (self.current, *self.kept.values()) for engine in engines.values()]


class State(NamedTuple):
    """Where a `DBConnect` leads, and how it makes engines and sessions: all that may be replaced for a while."""

    engines: HostEngines
    engine_creator: EngineCreator
    session_maker_creator: SessionMakerCreator
    before_create_session: Callable[[DBConnect[Any]], Awaitable[object]] | None
    engine_listeners: tuple[EngineListener, ...]
    keeps_host: bool
    """Whether `change_host` does nothing."""


class Replacement:
    """A change to the `State` of a `DBConnect` that is taken back later.

    Args:
        replaced: what to go on with afterwards.
    """

    def __init__(self, replaced: State) -> None:
        self.replaced = replaced


class Override(Generic[SessionT_co]):
    """A block in which a `DBConnect` leads to another database: see `DBConnect.overridden`.

    Args:
        db: the object.
        host: what it is told to be the host.
        engine_creator: creates the engines of the other database.
    """

    def __init__(self, db: DBConnect[SessionT_co], host: str | None, engine_creator: EngineCreator) -> None:
        self._db = db
        self._host = host
        self._engine_creator = engine_creator
        self._replacement: Replacement | None = None

    def __enter__(self) -> DBConnect[SessionT_co]:
        if self._replacement is not None:
            raise ArgumentValueError("This block was entered already: call `overridden` for each block.")
        self._replacement = self._db._replace(
            engines=HostEngines(self._host, {}, {}),
            engine_creator=self._engine_creator,
            session_maker_creator=self._db._own_session_maker_creator(),  # noqa: SLF001 - a part of the same class
            before_create_session=None,
            engine_listeners=(),
            keeps_host=True,
        )
        return self._db

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for engine in self._end():
            engine.abandon()

    async def __aenter__(self) -> DBConnect[SessionT_co]:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await _attempt_all([engine.retire for engine in self._end()])

    def _end(self) -> list[LoopEngine]:
        assert self._replacement is not None
        return self._db._put_back(self._replacement).all  # noqa: SLF001 - as above


def default_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Return a session maker for `engine` whose objects stay readable after a commit.

    ``expire_on_commit=False``: an expired attribute is loaded again at its next access, which asyncio code cannot do
    implicitly (SQLAlchemy, "Preventing Implicit IO when Using AsyncSession").
    """
    return async_sessionmaker(engine, expire_on_commit=False)


class DBConnect(Generic[SessionT_co]):
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
        ArgumentTypeError: `engine_creator` or `session_maker_creator` is no function that could be called so; the
            error says what to write, for an engine or a URL for instance (a ``TypeError``, too).
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
        _check_engine_creator(engine_creator)
        check_session_maker_creator(session_maker_creator)
        if host is not None:
            _check_host(host)
        if before_create_session_handler is not None:
            check_function(before_create_session_handler, "`before_create_session_handler`")
        if warn_connection_held_after is not None and warn_connection_held_after < 0:
            raise ArgumentValueError(
                f"warn_connection_held_after is {warn_connection_held_after}: give seconds, 0 or more."
            )
        self._engine_creator = _taking_host(engine_creator)
        self._session_maker_creator: SessionMakerCreator = session_maker_creator
        self._host = host
        self._before_create_session = before_create_session_handler
        self._engines: LoopEngines = {}
        self._kept: dict[str, LoopEngines] = {}
        # Guards `_host`, `_engines` and `_kept` together: another thread's event loop may use the same object.
        self._lock = threading.Lock()
        self._observer = None if warn_connection_held_after is None else Observer(warn_connection_held_after)
        self._engine_listeners: tuple[EngineListener, ...] = ()
        # Told of the engines of `overridden`, too.
        self._observing_listeners: tuple[EngineListener, ...] = ()
        self._read_only = False
        self._resolve_commits = resolve_commits
        self._keeps_host = False
        self._replacements: list[Replacement] = []
        self._capture_callback: Callable[[Callable[[], object]], Callable[[], object]] | None = None
        """Returns what is called after a commit in the place of a callback of `on_commit`: a testing tool's."""

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

        A database in memory (``sqlite+aiosqlite://``) is the same one on every event loop, until `close`.

        Args:
            url: the database's URL, with an asyncio driver.
            read_only: every query on PostgreSQL is one round trip (autocommit), and the server refuses writes.
            session_maker_creator: as for the class.
            warn_connection_held_after: as for the class.
            resolve_commits: as for the class.
            **engine_options: passed to `sqlalchemy.ext.asyncio.create_async_engine`.

        Raises:
            ArgumentTypeError: `url` is none, or an option belongs to sessions or to nothing (a ``TypeError``, too).
            ArgumentValueError: the URL has no asyncio driver; `read_only` is asked for a database that cannot be made
                so; or `warn_connection_held_after` is negative (a ``ValueError``, too).
            sqlalchemy.exc.ArgumentError: `url` cannot be parsed.
        """
        parsed = check_url(url)
        check_engine_options(engine_options)
        if resolve_commits:
            check_can_resolve(parsed.get_backend_name())

        def engine_creator(host: str) -> AsyncEngine:
            return create_engine(parsed, host, dict(engine_options), read_only=read_only)

        if "pool" not in engine_options:
            # An engine that is never used opens nothing: options that it does not take are told here, by the call that
            # has them, and not at the first request. A pool that is given would keep its listeners.
            _try_engine_options(engine_creator, host_of(parsed))
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
        """Return a `DBConnect` for an engine that there is already.

        The engine gets the guards that every engine of a `DBConnect` gets; they stay on it. It remains its owner's,
        who disposes of it: `close` does not. Its pool serves the event loop that uses it first; another one gets an
        engine like it, with a pool of its own, which is closed here.

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
        db._keeps_host = True
        return db

    @property
    def host(self) -> str | None:
        """The host that new sessions go to; ``None`` before the first `connect`."""
        return self._host

    async def connect(self, host: str) -> None:
        """Use `host`, and make its engine now; no connection is opened before the first statement.

        Raises:
            HostNotSetError: `host` is empty (a ``ValueError``, too).
        """
        await self.change_host(host)
        self._loop_engine()

    async def change_host(self, host: str, keep: Collection[str] = ()) -> None:
        """Send new sessions to `host` from now on; does nothing if they go there already.

        Sessions that exist stay on the host that they were made for. The idle connections to a host that is left are
        closed now, the others when their sessions give them back. If the new engine cannot be made, everything stays as
        it was.

        Inside of a block of `overridden`, and with `from_engine`, this does nothing.

        Args:
            host: where new sessions go.
            keep: other hosts that are not left for good, such as the replicas that take turns: their engines and
                connections are kept, and used again by a change back to them. Those of all others are closed, also if
                an earlier call has kept them.

        Raises:
            HostNotSetError: `host` is empty (a ``ValueError``, too).
            ArgumentValueError: the `engine_creator` takes no host (a ``ValueError``, too).
            ArgumentTypeError: `keep` is a string, not a collection of them (a ``TypeError``, too).
        """
        _check_host(host)
        if self._keeps_host:
            return
        if isinstance(self._engine_creator, _HostlessCreator) and self._host is not None and host != self._host:
            raise ArgumentValueError(
                f"The engine_creator of this DBConnect takes no host, so it cannot be changed to {host!r}: let it "
                "take one, `def create(host): ...`."
            )
        if host == self._host and (not self._kept or self._kept.keys() <= set(keep)):
            return
        if left := self._switch(host, keep):
            await _attempt_all([engine.retire for engine in left])

    def _switch(self, host: str, keep: Collection[str]) -> list[LoopEngine]:
        """Change the host, and return the engines that have to retire for it."""
        if isinstance(keep, str):
            raise ArgumentTypeError(
                f"keep={without_secrets(keep)!r} is one string: give a collection of hosts, as in "
                f"`keep=[{without_secrets(keep)!r}]`."
            )
        with self._lock:
            # Not changed in place, as it is read without the lock.
            kept = dict(self._kept)
            if host != self._host:
                engines = kept.pop(host, {})
                loop = asyncio.get_running_loop()
                if loop not in engines:
                    engines = {**_without_ended(engines), loop: self._make_engine(host, engines)}
                if self._host is not None:
                    kept[self._host] = self._engines
                self._host, self._engines = host, engines
            left = [kept.pop(other) for other in [*kept] if other not in keep]
            self._kept = kept
        return [engine for engines in left for engine in engines.values()]

    async def session_maker(self) -> async_sessionmaker[SessionT_co]:
        """Return the session maker of the current host and event loop.

        Raises:
            HostNotSetError: no host is known yet.
        """
        if self._before_create_session is not None:
            await self._before_create_session(self)
        return self._loop_engine().session_maker

    async def create_session(self) -> SessionT_co:
        """Return a new session that the caller closes.

        Raises:
            HostNotSetError: no host is known yet.
        """
        if self._before_create_session is not None:
            await self._before_create_session(self)
        return self._new_session()

    def create_session_at_once(self) -> SessionT_co | None:
        """Return a new session that the caller closes; ``None`` if `before_create_session_handler` is to be awaited.

        Raises:
            HostNotSetError: no host is known yet.
        """
        return self._new_session() if self._before_create_session is None else None

    def _new_session(self) -> SessionT_co:
        engine = self._loop_engine()
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
            return self._new_session_without_loop(options)
        engine = self._loop_engine()
        session = engine.new_session(**options)
        self._follow(session, engine.host)
        return cast("SessionT_co", session)

    def _new_session_without_loop(self, options: dict[str, Any]) -> SessionT_co:
        maker = self._session_maker_without_loop()
        session = SessionFactory(maker)(**options)
        placeholder = session.sync_session.bind

        def translate(bind: Engine | Connection) -> Engine | Connection:
            return self._loop_engine().engine.sync_engine if bind is placeholder else bind

        if "bind" not in options:
            guard_of(guarded(session)).translate_bind = translate
        self._follow(session, self._host or "")
        return cast("SessionT_co", session)

    def _session_class(self) -> type[SessionT_co]:
        engine = next(iter(self._engines.values()), None)
        if engine is None and not self._knows_host():
            return cast("type[SessionT_co]", AsyncSession)
        maker = self._session_maker_without_loop() if engine is None else engine.session_maker
        return cast("type[SessionT_co]", maker.class_)

    def _session_maker_without_loop(self) -> async_sessionmaker[Any]:
        """Return a session maker whose engine is never used: it opens nothing."""
        self._check_knows_host()
        creator = self._engine_creator
        engine = creator.engine if isinstance(creator, BorrowedEngine) else creator(self._host or "")
        return self._session_maker_creator(engine)

    def _knows_host(self) -> bool:
        return self._host is not None or isinstance(self._engine_creator, _HostlessCreator)

    def _check_knows_host(self) -> None:
        if not self._knows_host():
            raise HostNotSetError(
                "This DBConnect has no host yet: pass `host=...`, or `await db.connect(host)` before its first use."
            )

    def _follow(self, session: AsyncSession, host: str) -> None:
        """Tell listeners of what happens in `session`, whoever has made it."""
        if self._observer is not None:
            self._observer.follow(session, self, host)
        if self._resolve_commits:
            note_readers(session.sync_session)

    async def engine(self) -> AsyncEngine:
        """Return the engine of the current host and event loop.

        Raises:
            HostNotSetError: no host is known yet.
        """
        return self._loop_engine().engine

    def on_event(self, listener: EventListener) -> Callable[[], None]:
        """Call `listener` with what happens in the sessions that are opened from now on: see `ctxdb_core.events`.

        It is a plain function, called in the task that causes the event, and must not wait for anything. Its errors are
        logged, and change nothing. Sessions that the caller makes by `session_maker` are not followed.

        Returns:
            What ends it: a function to be called without arguments, once or more often.
        """
        with self._lock:
            if self._observer is None:
                self._observer = Observer(None)
        return self._observer.add(listener)

    def status(self) -> DBStatus:
        """Return what this database is doing now: its pools, and the units of work with a session on it.

        For health endpoints and tests. It waits for nothing and asks no server, and may be called from anywhere.
        """
        return status_of(self, self._host_engines().all)

    def on_engine(self, listener: EngineListener, *, overridden: bool = False) -> None:
        """Call `listener` with each host and the engine that is made for it: those that there are, then those to come.

        It is called before the engine is used, on the event loop that the engine is for, or else now. It must not use
        this object.

        Args:
            listener: is called with the host and the engine.
            overridden: whether the listener is also told of the engines that blocks of `overridden` make. Leave it out
                for a listener that teaches an engine something of this database's own.
        """
        with self._lock:
            if overridden:
                self._observing_listeners = (*self._observing_listeners, listener)
            else:
                self._engine_listeners = (*self._engine_listeners, listener)
            for engine in self._host_engines().all:
                listener(engine.host, engine.engine)

    async def close(self) -> None:
        """Close every connection: the idle ones now, the others when their sessions give them back.

        The object can be used again afterwards: it makes a new engine.
        """
        with self._lock:
            old = self._host_engines()
            self._engines, self._kept = {}, {}
        await _attempt_all([engine.retire for engine in old.all])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_kept"):
            for engine in self._host_engines().all:
                engine.abandon()

    def __repr__(self) -> str:
        host = "None" if self._host is None else repr(without_secrets(self._host))
        return f"<{type(self).__name__} host={host}>"

    def _host_engines(self) -> HostEngines:
        return HostEngines(self._host, self._engines, self._kept)

    def overridden(
        self, url_or_creator: str | URL | EngineCreator | Callable[[], AsyncEngine], **engine_options: Any
    ) -> Override[SessionT_co]:
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
            ArgumentTypeError: neither is given, or options beside a creator (a ``TypeError``, too).
            ArgumentValueError: the URL has no asyncio driver (a ``ValueError``, too).
            sqlalchemy.exc.ArgumentError: the URL cannot be parsed.
        """
        if isinstance(url_or_creator, str | URL):
            url = make_url(url_or_creator)
            check_asyncio_driver(url)
            host, read_only = host_of(url), self._read_only

            def create(host: str) -> AsyncEngine:
                return create_engine(url, host, dict(engine_options), read_only=read_only)

            return Override(self, host, create)
        _check_creator_of_other(url_or_creator)
        if engine_options:
            raise ArgumentTypeError(
                f"overridden() takes {', '.join(engine_options)} with a URL alone: let the creator pass it on."
            )
        return Override(self, self._host or "localhost", _taking_host(url_or_creator))

    @property
    def is_overridden(self) -> bool:
        """Whether this object leads to another database at the moment: by `overridden`, or by a testing tool."""
        return bool(self._replacements)

    def _replace(self, **changes: Any) -> Replacement:
        """Go on with other parts of the `State`: for testing tools, which end it by `_put_back`."""
        with self._lock:
            replacement = Replacement(self._state())
            self._set_state(replacement.replaced._replace(**changes))
            self._replacements.append(replacement)
        return replacement

    def _put_back(self, replacement: Replacement) -> HostEngines:
        """Go on with what there was before `replacement`, and return the engines that were made meanwhile."""
        with self._lock:
            index = self._replacements.index(replacement)
            if replacement is self._replacements[-1]:
                ended = self._state()
                added = [each for each in ended.engine_listeners if each not in replacement.replaced.engine_listeners]
                self._set_state(replacement.replaced)
                self._engine_listeners = (*self._engine_listeners, *added)
            else:
                # A later replacement goes on: at its end, it puts back the state from before this one.
                later = self._replacements[index + 1]
                ended, later.replaced = later.replaced, replacement.replaced
            del self._replacements[index]
        return ended.engines

    def _own_session_maker_creator(self) -> SessionMakerCreator:
        """Return the user's, also where one of the testing tools has another in its place."""
        first = self._replacements[0].replaced if self._replacements else self._state()
        return first.session_maker_creator

    def _state(self) -> State:
        return State(
            self._host_engines(),
            self._engine_creator,
            self._session_maker_creator,
            self._before_create_session,
            self._engine_listeners,
            keeps_host=self._keeps_host,
        )

    def _set_state(self, state: State) -> None:
        self._host, self._engines, self._kept = state.engines
        self._engine_creator = state.engine_creator
        self._session_maker_creator = state.session_maker_creator
        self._before_create_session = state.before_create_session
        self._engine_listeners = state.engine_listeners
        self._keeps_host = state.keeps_host

    def _make_engine(self, host: str, others: LoopEngines) -> LoopEngine:
        """Return the engine of `host` for the running event loop.

        Args:
            host: where.
            others: the engines of `host` for other event loops.
        """
        in_memory = next((other for other in others.values() if other.lifetime is Lifetime.UNTIL_RETIRED), None)
        if in_memory is not None:
            return LoopEngine(host, self._engine_creator, self._session_maker_creator, in_memory.engine)
        engine = LoopEngine(
            host,
            self._engine_creator,
            self._session_maker_creator,
            # The other database of a block of `overridden` may be none that could.
            resolve_commits=self._resolve_commits and not self._keeps_host,
        )
        for listener in (*self._engine_listeners, *self._observing_listeners):
            listener(host, engine.engine)
        return engine

    def _loop_engine(self) -> LoopEngine:
        loop = asyncio.get_running_loop()
        engine = self._engines.get(loop)
        return self._open_engine(loop) if engine is None else engine

    def _open_engine(self, loop: asyncio.AbstractEventLoop) -> LoopEngine:
        with self._lock:
            self._check_knows_host()
            engine = self._engines.get(loop)
            if engine is None:
                if self._host is None:
                    assert isinstance(self._engine_creator, _HostlessCreator)
                    self._host = self._engine_creator.find_host()
                engine = self._make_engine(self._host, self._engines)
                self._engines = {**_without_ended(self._engines), loop: engine}
            return engine


def check_database(db: object) -> None:
    """Raise the error that says what to pass if `db` is no `DBConnect`."""
    if isinstance(db, DBConnect):
        return
    if isinstance(db, type):
        given, hint = type_of(db), ""
    else:
        given, hint = type_of(db), _INSTEAD.get(type(db).__name__, "")
    raise ArgumentTypeError(
        f"A `DBConnect` is needed here, and {given} is given: pass the one that the application has made, by "
        f"`DBConnect.from_url(url)` for instance.{hint}"
    )


_INSTEAD = {
    "AsyncEngine": " For an engine of your own there is `TransactionContext(engine)`, or "
    "`DBConnect.from_engine(engine)`.",
    "TransactionContext": " A TransactionContext has blocks of its own: `async with context.transaction():`.",
}


class _HostlessCreator:
    """Creates engines by a function that takes no host."""

    def __init__(self, create: Callable[[], AsyncEngine]) -> None:
        self._create = create
        self._first: AsyncEngine | None = None

    def __call__(self, host: str) -> AsyncEngine:
        engine, self._first = self._first, None
        return self._create() if engine is None else engine

    def find_host(self) -> str:
        """Return where the engine is that is created next."""
        engine: object = self._create()
        if not isinstance(engine, AsyncEngine):
            # `LoopEngine` raises the error for it.
            return "unknown"
        self._first = engine
        return host_of(engine.url)


def _taking_host(creator: EngineCreator | Callable[[], AsyncEngine]) -> EngineCreator:
    if parameters_of(creator) == 0:
        return _HostlessCreator(cast("Callable[[], AsyncEngine]", creator))
    return cast("EngineCreator", creator)


def _try_engine_options(create: EngineCreator, host: str) -> None:
    try:
        create(host)
    except TypeError as exc:
        if isinstance(exc, ArgumentTypeError):
            raise
        raise ArgumentTypeError(f"from_url() passes its options on to `create_async_engine`: {exc}") from exc


def _check_engine_creator(creator: object) -> None:
    """Raise the error that says what to write if `creator` is no function that creates an engine."""
    if isinstance(creator, AsyncEngine):
        hint = "an engine is given: there is `DBConnect.from_engine(engine)` for that"
    elif isinstance(creator, Engine):
        hint = (
            "a synchronous Engine is given: make it by `sqlalchemy.ext.asyncio.create_async_engine`, for "
            "`DBConnect.from_engine(engine)`"
        )
    elif looks_like_url(creator):
        hint = "a URL is given: there is `DBConnect.from_url(url)` for that"
    elif isinstance(creator, async_sessionmaker):
        hint = (
            "a session maker is given: pass its engine, and how it makes sessions, by "
            "`DBConnect.from_engine(engine, session_maker_creator=...)`"
        )
    elif isinstance(creator, DBConnect):
        hint = "a DBConnect is given already"
    else:
        reason = why_no_engine_creator(creator)
        if reason is None:
            return
        hint = f"{reason}, for instance `def create(host): return create_async_engine(...)`"
    raise ArgumentTypeError(f"DBConnect() takes a function that creates the engine for a host; {hint}.")


def _check_creator_of_other(creator: object) -> None:
    """Raise the error that says what to pass if `creator` is no function that creates another database's engine."""
    reason: str | None
    if isinstance(creator, AsyncEngine | Engine):
        reason = "an engine is given, which serves one event loop: pass its URL, or a function that creates it"
    elif isinstance(creator, DBConnect):
        reason = "a DBConnect is given: pass the URL that it was made from"
    else:
        reason = why_no_engine_creator(creator)
    if reason is not None:
        raise ArgumentTypeError(
            f"The URL of a database is needed here, or what creates an engine for a host; {reason}."
        )


# By the engine inside, as two AsyncEngines may share it.
_borrowed: WeakValueDictionary[Engine, DBConnect] = WeakValueDictionary()


def borrow(engine: AsyncEngine) -> DBConnect:
    """Return the `DBConnect` that stands for `engine`: a unit of work has one session for each database."""
    db = _borrowed.get(engine.sync_engine)
    if db is None:
        db = _borrowed[engine.sync_engine] = DBConnect.from_engine(engine)
    return db


explain_missing_call(DBConnect.engine, AsyncEngine, "engine = await db.engine()")
explain_missing_call(DBConnect.session_maker, async_sessionmaker, "maker = await db.session_maker()")


def _without_ended(engines: LoopEngines) -> LoopEngines:
    """Leave out the engines of loops that have ended, as they went with them."""
    return {loop: engine for loop, engine in engines.items() if not loop.is_closed()}


def _check_host(host: object) -> None:
    if host is not None and not isinstance(host, str):
        raise ArgumentTypeError(f"{type_of(host)} is given as the host: give its name as a string.")
    if not host:
        raise HostNotSetError("The host is empty: name the host that the database runs on.")


async def close_all(*dbs: DBConnect[Any]) -> None:
    """Close every one of `dbs`, also if closing another one fails: what adapters do when an application shuts down.

    The queries of tasks that have just been cancelled are stopped on the server before it returns.

    Raises:
        ArgumentTypeError: one of `dbs` is no `DBConnect`; the others are closed.
        Exception: the one error there was; an ``ExceptionGroup`` if there were several.
    """

    async def close(db: DBConnect[Any]) -> None:
        check_database(db)
        await db.close()

    await _attempt_all([*(partial(close, db) for db in dbs), wait_for_cancelled_queries])


async def _attempt_all(closers: Collection[Callable[[], Awaitable[None]]]) -> None:
    errors: list[Exception] = []
    for close in closers:
        try:
            await close()
        except Exception as exc:  # noqa: BLE001 - every one is attempted before an error surfaces
            errors.append(exc)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup("Not everything could be closed.", errors)
