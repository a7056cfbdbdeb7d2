"""`FollowedEngine`: an engine on one host of a cluster, which lets go of the host when the cluster does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from datetime import datetime
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool
from sqlalchemy.sql.elements import ReleaseSavepointClause, RollbackToSavepointClause
from sqlalchemy.util import await_only, greenlet_spawn

from ctxdb_core import DBConnect
from ctxdb_core.adapters import (
    LostCommit,
    ask_outcome_by,
    follow_dialect,
    follow_raw_connection,
    is_autocommit,
    swap_connection,
)
from ctxdb_pgstatus._commit_guard import CommitGuard, ConnectionState, state_of
from ctxdb_pgstatus._following import driver
from ctxdb_pgstatus._following.positions import Positions, current_positions
from ctxdb_pgstatus._following.statements import is_local_setting, is_setting
from ctxdb_pgstatus.errors import (
    CommitUnconfirmedError,
    ConnectionLostError,
    HostUnreachableError,
    PgStatusError,
    StaleReaderError,
)
from ctxdb_pgstatus.source import KnowsServers

__all__ = ["FollowedEngine", "Follower"]

logger = logging.getLogger("ctxdb_pgstatus")

WATCH_SECONDS = 0.1
"""How often the cluster is looked at while connections are in use."""

_READ_ONLY_SQL_TRANSACTION = "25006"
# As `pg_xact_status` calls an identifier that was not assigned: an invalid parameter.
_TRANSACTION_IN_THE_FUTURE = "22023"
# How many connections to other servers than the source knows are given away before there is an error: as many as a
# small pool holds, as a name that has moved leaves them all behind.
_MOST_STRAYS = 20
# Classes of SQLSTATE (PostgreSQL, "Error Codes"): invalid authorization, and a database that does not exist.
_REFUSALS = ("28", "3D")


class Follower(Protocol):
    """Who decides on which host an engine is used."""

    guard: CommitGuard | None
    connect_timeout: float
    servers: KnowsServers | None

    async def choose(self, db: DBConnect, positions: Positions | None) -> FollowedEngine | None:
        """Return the engine that sessions of `db` are to use now; ``None`` if it is not a host's, but a test's."""

    def is_fit(self, host: str, positions: Positions) -> bool:
        """Return whether `host` has what the running code has to see."""

    async def review(self) -> None:
        """Leave the hosts that the cluster has left."""

    def report_failure(self, host: str) -> None:
        """Have a host looked at."""

    async def has_seen(self, host: str, lost: LostCommit) -> bool:
        """Return whether the last promotion of `host` was after all of a transaction, except for its end."""

    def forget_position(self, host: str, positions: Positions) -> None:
        """Trust the host no more to have what the running code has to see, until it is asked again."""

    def no_server(self, host: str) -> PgStatusError:
        """Return the error for a name of which each connection leads to another server than the source knows."""


class _HostLeftError(PgStatusError):
    """The host was left while a connection to it was waited for: to be chosen again."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host!r} was left, as it does not answer, or is not the master any more: open a new session."
        )


class _OtherServerError(PgStatusError):
    """A connection leads to another server than the one that the source knows by this name."""


class _Wait:
    """A task that waits for a connection."""

    __slots__ = ("cancelling", "interrupted", "task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.cancelling = task.cancelling()
        self.interrupted = False

    def interrupt(self) -> None:
        """Let the task stop waiting."""
        if not self.interrupted:
            self.interrupted = True
            self.task.cancel()

    def end(self) -> bool:
        """Return whether the task was cancelled by `interrupt` alone."""
        return self.interrupted and self.task.uncancel() <= self.cancelling


# By weak references on both sides: each of the two knows the other.
_followed: WeakKeyDictionary[Engine, ref[FollowedEngine]] = WeakKeyDictionary()


class FollowedEngine:
    """Stands in for ``Engine.raw_connection``, which every transaction takes its connection from.

    Each time, the host is checked: if it was left meanwhile, or has not replayed what the running code has written, the
    connection is one to another host instead. So a session that has no transaction open moves along, and a request that
    waits in the pool of a host that was left waits no longer.

    Args:
        engine: the engine.
        host: where it leads to.
        db: whose engine it is.
        follower: who decides.
    """

    def __init__(self, engine: AsyncEngine, host: str, db: ref[DBConnect], follower: Follower) -> None:
        self.host = host
        self.is_left = False
        """Whether nobody may use the host any more."""
        self._sync_engine = sync_engine = engine.sync_engine
        self._db = db
        self._follower = follower
        self._waits: set[_Wait] = set()
        self._connections: WeakSet[Any] = WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_watching = False
        self._review: asyncio.Task[None] | None = None
        event.listen(sync_engine, "connect", self._connected)
        event.listen(sync_engine, "handle_error", self._handle_error)
        self._take_from_pool = sync_engine.raw_connection
        follow_raw_connection(sync_engine, lambda take: self.raw_connection())
        follow_dialect(sync_engine.dialect, "connect", self._connect_in_time)
        _followed[sync_engine] = ref(self)
        if follower.guard is not None:
            follower.guard.attach(sync_engine)
            ask_outcome_by(engine, self._find_outcome)
        else:
            event.listen(sync_engine, "before_execute", self._before_execute)
            event.listen(sync_engine, "before_cursor_execute", self._before_cursor_execute)

    @classmethod
    def of(cls, engine: Engine) -> FollowedEngine | None:
        """Return what stands in for `engine`, if something does."""
        followed = _followed.get(engine)
        return None if followed is None else followed()

    # --- taking connections -------------------------------------------------------------------------------------------

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a connection from the pool: to this host, or to another one if this is not the right one any more.

        Raises:
            NoMasterError, NoReplicaError: there is no right one.
        """
        positions = current_positions.get()
        followed = self
        strays = 0
        while True:
            if followed.is_left or (positions is not None and not self._follower.is_fit(followed.host, positions)):
                chosen = await_only(self._choose(positions))
                if chosen is None:
                    return self._take_from_pool()
                followed = chosen
            try:
                return followed._take(positions)  # noqa: SLF001 - its own
            except _HostLeftError:
                # It was left; the loop finds out what there is instead.
                continue
            except _OtherServerError:
                strays += 1
                if strays > _MOST_STRAYS:
                    raise self._follower.no_server(followed.host) from None
                if positions is not None:
                    self._follower.forget_position(followed.host, positions)

    async def _choose(self, positions: Positions | None) -> FollowedEngine | None:
        db = self._db()
        if db is None:
            raise PgStatusError(
                f"This session was made for {self.host!r}, which the cluster has left, by a DBConnect that is gone: "
                "there is nobody to ask for another host. Keep the DBConnect as long as its sessions."
            )
        return await self._follower.choose(db, positions)

    def _take(self, positions: Positions | None) -> PoolProxiedConnection:
        self._watch()
        wait = _Wait()
        self._waits.add(wait)
        try:
            connection = self._take_from_pool()
        except asyncio.CancelledError:
            if wait.end():
                raise _HostLeftError(self.host) from None
            raise
        except Exception as exc:
            if wait.interrupted:
                wait.end()
                raise _HostLeftError(self.host) from exc
            if self._is_of_driver(exc):
                # What a new connection is told and asked before it is handed out is told past `handle_error`.
                self._follower.report_failure(self.host)
                raise _unreachable(self.host, exc) from exc
            raise
        finally:
            self._waits.discard(wait)
        if wait.interrupted:
            # The connection had been on its way already; so may have been a cancellation by somebody else.
            wait.end()
            connection.close()
            raise _HostLeftError(self.host)
        if (state := state_of(connection)) is not None:
            self._check_server(connection, state, positions)
            state.begin(positions)
        if self._follower.guard is not None:
            self._follower.guard.begin(connection)
        return connection

    def _is_of_driver(self, error: Exception) -> bool:
        """Return whether an error was raised by the driver, as its own or as that of its adapter, or by the network."""
        dialect = self._sync_engine.dialect
        package = type(error).__module__.partition(".")[0]
        return isinstance(error, (OSError, dialect.loaded_dbapi.Error)) or package == dialect.driver

    def _check_server(
        self, connection: PoolProxiedConnection, state: ConnectionState, positions: Positions | None
    ) -> None:
        """Give a connection away that leads to another server than the one that the source knows by this name.

        Raises:
            _OtherServerError: it does.
        """
        is_new, state.is_new = state.is_new, False
        servers = self._follower.servers
        if servers is None or state.started_at is None:
            return
        known = servers.server_of(self.host)
        if known is None or known == state.started_at:
            return
        if is_new:
            # The source may not have seen yet that the name leads elsewhere.
            known = await_only(servers.ask_server_of(self.host))
            if known is None or known == state.started_at:
                return
            if self._follower.guard is None and (positions is None or positions.are_empty):
                # Servers take turns behind the name, and any of them will do.
                return
        connection.invalidate()
        raise _OtherServerError(f"{self.host!r} leads to several servers.")

    def _connect_in_time(self, connect: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Stand in for ``Dialect.connect``, which is `connect`."""
        if self.is_left:
            raise _HostLeftError(self.host)
        try:
            return await_only(self._connect_within_limit(connect, *args, **options))
        except _HostLeftError:
            raise
        except Exception as exc:
            self._follower.report_failure(self.host)
            raise _unreachable(self.host, exc) from exc

    async def _connect_within_limit(self, connect: Callable[..., Any], *args: Any, **options: Any) -> Any:
        seconds = self._follower.connect_timeout
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await greenlet_spawn(connect, *args, **options)
        except TimeoutError as exc:
            if limit.expired():
                raise TimeoutError(f"{self.host!r} has not accepted a connection within {seconds:g} seconds.") from exc
            raise

    def _connected(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        state = ConnectionState(self, self.host)
        state.keep(record.info)
        self._connections.add(dbapi_connection.driver_connection)
        if self._follower.servers is not None:
            state.started_at = self._read_start(dbapi_connection)

    def _read_start(self, dbapi_connection: Any) -> datetime | None:
        connection = dbapi_connection.driver_connection
        limit = asyncio.get_running_loop().call_later(self._follower.connect_timeout, driver.abort, connection)
        try:
            return driver.read_start(dbapi_connection)
        except Exception as exc:
            if not driver.is_open(connection):
                self._follower.report_failure(self.host)
                raise _unreachable(self.host, exc) from exc
            # A pooler in between that does not know what it is asked.
            return None
        finally:
            limit.cancel()

    # --- readers in the middle of a transaction -----------------------------------------------------------------------

    def _before_execute(
        self, connection: Connection, element: object, multiparams: object, params: object, options: object
    ) -> None:
        """Let a reader go on elsewhere if its code has committed something that this replica does not have."""
        positions = current_positions.get()
        if positions is None or positions.are_empty or isinstance(element, _ENDS_OF_SAVEPOINTS):
            return
        state = state_of(connection)
        if state is None or self._follower.is_fit(state.host, positions):
            return
        chosen = await_only(self._choose(positions))
        if chosen is None or chosen.host == state.host or connection.get_isolation_level() in _SNAPSHOTS:
            return
        if state.is_bound or connection.in_nested_transaction() or _has_options(connection):
            raise StaleReaderError(
                f"The transaction that is open on {state.host!r} began before something was committed on the master "
                "that it would have to see, and cannot go on elsewhere: it has a savepoint, options of its own, or a "
                "streamed result. End it first, by `commit_db_session`, or read by another session."
            )
        # A transaction that only reads, and sees at each statement what is committed, has nothing on its connection
        # that another one would not have.
        swap_connection(connection, self.raw_connection)
        for setting in state.settings:
            connection.exec_driver_sql(setting)

    def _before_cursor_execute(
        self,
        connection: Connection,
        cursor: object,
        statement: str,
        parameters: object,
        context: Any,
        executemany: object,
    ) -> None:
        if context is None or (context.compiled is not None and not context.execution_options.get("stream_results")):
            return
        state = state_of(connection)
        if state is None:
            return
        if context.compiled is not None:
            state.is_bound = True
        elif is_local_setting(statement):
            state.settings.append(statement)
        elif is_setting(statement):
            state.is_bound = True

    def _handle_error(self, context: ExceptionContext) -> None:
        """Raise an error of this package's own in the place of one that tells of the host, not of the statement."""
        connection = context.connection
        error = context.original_exception
        if not isinstance(error, Exception) or not self._is_of_driver(error):
            return
        if connection is not None and (connection.closed or connection.invalidated):
            return
        state = None if connection is None else state_of(connection)
        if connection is None or state is None:
            # While the first connection is asked for the server's version and the like.
            if context.is_disconnect:
                self._follower.report_failure(self.host)
                raise _unreachable(self.host, error)
            return
        adapted: Any = connection.connection.dbapi_connection
        if not isinstance(error, context.dialect.loaded_dbapi.Error) and not driver.is_open(adapted.driver_connection):
            # A streamed result is read past asyncpg's adapter.
            context.is_disconnect = True
        if getattr(error, "sqlstate", None) == _READ_ONLY_SQL_TRANSACTION:
            # A transaction that the user has made read-only is refused with the same code. A replica that is asked to
            # write is what it should be.
            if self._follower.guard is None or not driver.in_recovery(adapted.driver_connection):
                return
            context.is_disconnect = True
        if context.is_disconnect:
            self._follower.report_failure(state.host)
            # The driver's error is the cause, as SQLAlchemy raises what a listener raises from it.
            raise self._lost(connection, state, error)

    def _lost(self, connection: Connection, state: ConnectionState, error: BaseException) -> PgStatusError:
        reason = str(error) or type(error).__name__
        if state.engine is self and self.is_left:
            reason = (
                f"{state.host!r} was left while it was in use, as it does not answer, or is not the master any more; "
                + reason
            )
        if state.wrote and (state.is_committing or is_autocommit(connection)):
            return CommitUnconfirmedError(
                f"The connection to {state.host!r} broke while a commit was under way: {reason}. Look whether the "
                "write is there before you try again.",
                state.host,
            )
        return ConnectionLostError(
            f"The connection to {state.host!r} broke, or the host takes no writes any more, before the transaction was "
            f"committed: {reason}. Nothing of it is stored: do it again, in a new unit of work.",
            state.host,
        )

    # --- commits whose answers were lost ------------------------------------------------------------------------------

    async def _find_outcome(self, connection: PoolProxiedConnection, lost: LostCommit) -> bool | None:
        """Ask the host that is the master now, once there is one, what became of a commit (see `ask_outcome_by`)."""
        state = state_of(connection)
        while True:
            try:
                status = await self._ask_master(lost)
            except Exception:  # noqa: BLE001 - there is no master yet, or it does not answer
                status = "in progress"
            if status == "in progress":
                await asyncio.sleep(WATCH_SECONDS)
                continue
            if state is not None:
                state.is_committing = status is None
            return None if status is None else status == "committed"

    async def _ask_master(self, lost: LostCommit) -> str | None:
        """Return ``pg_xact_status`` of the master for a transaction; ``None`` if it cannot know.

        Raises:
            Exception: there is no master at the moment, or it does not answer.
        """
        db, guard = self._db(), self._follower.guard
        master = None if db is None else await self._follower.choose(db, None)
        if master is None or guard is None:
            return None
        try:
            status, timeline = await lost.ask(master._sync_engine.pool.recreate())  # noqa: SLF001 - its own
        except Exception as exc:
            if getattr(exc, "sqlstate", None) != _TRANSACTION_IN_THE_FUTURE:
                raise
            # The master has assigned no such identifier yet: it was promoted without the transaction.
            return "aborted"
        # Another host on the same timeline was no standby of this one: it is a copy that was started as a primary.
        is_same = timeline == lost.timeline and master.host == self.host
        if not is_same and not await self._follower.has_seen(master.host, lost):
            return None
        if status == "committed" and not await guard.is_master(master.host):
            return "in progress"
        return status

    # --- leaving the host ---------------------------------------------------------------------------------------------

    def leave(self, *, abort: bool) -> None:
        """Let nobody use the host any more, until it is returned to. May be called on any event loop.

        Args:
            abort: whether to cut off the connections in use: the host is dead, or not to be believed.
        """
        self.is_left = True
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        if loop is asyncio.get_running_loop():
            self._leave(abort)
        else:
            loop.call_soon_threadsafe(self._leave, abort)

    def _leave(self, abort: bool) -> None:  # noqa: FBT001 - passed on by `call_soon_threadsafe`
        for wait in list(self._waits):
            wait.interrupt()
        if abort and any(map(driver.is_open, self._connections)):
            for connection in list(self._connections):
                driver.abort(connection)
            # What is left of them must not be handed out, should the host be returned to.
            self._sync_engine.dispose(close=False)

    def return_to_host(self) -> None:
        """Let the host be used again."""
        self.is_left = False

    def _watch(self) -> None:
        """Look at the cluster now and then, while there may be somebody who waits for an answer of this host."""
        if not self._is_watching:
            self._is_watching = True
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            # The timer is renewed for as long as the engine is in use: with the context of the unit of work that has
            # set it first, it would keep that alive.
            self._loop.call_later(WATCH_SECONDS, self._look, context=Context())

    def _look(self) -> None:
        self._is_watching = False
        if self._is_in_use:
            self._watch()
            if self._review is None or self._review.done():
                assert self._loop is not None
                self._review = self._loop.create_task(_logged(self._follower.review()))

    @property
    def _is_in_use(self) -> bool:
        if self._waits:
            return True
        pool = self._sync_engine.pool
        if isinstance(pool, QueuePool) and not self.is_left and pool.checkedout():
            return True
        # Another pool cannot tell; and of a host that was left, nothing idle is left.
        return (self.is_left or not isinstance(pool, QueuePool)) and any(map(driver.is_open, self._connections))


def _unreachable(host: str, error: BaseException) -> HostUnreachableError:
    is_refused = str(getattr(error, "sqlstate", None) or "").startswith(_REFUSALS)
    advice = (
        "Correct the user, the password or the database's name."
        if is_refused
        else "Answer 503 and let the client try again: the next session may find another host."
    )
    return HostUnreachableError(
        f"{host!r} has not accepted a connection: {str(error) or type(error).__name__}. {advice}",
        host,
        retryable=not is_refused,
    )


_ENDS_OF_SAVEPOINTS = (ReleaseSavepointClause, RollbackToSavepointClause)

_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE")


def _has_options(connection: Connection) -> bool:
    own, common = connection.get_execution_options(), connection.engine.get_execution_options()
    return any(own.get(name) != common.get(name) for name in _OPTIONS)


_OPTIONS = ("isolation_level", "postgresql_readonly", "postgresql_deferrable")


async def _logged(review: Awaitable[None]) -> None:
    try:
        await review
    except Exception:
        # As often as it is looked at; who asks for a session gets the error.
        logger.debug("The cluster could not be looked at", exc_info=True)
