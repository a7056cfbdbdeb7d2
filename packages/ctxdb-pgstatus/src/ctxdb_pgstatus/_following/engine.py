"""`FollowedEngine`: an engine on one host of a cluster, whose sessions leave the host when the cluster changes.

It stands in for ``Engine.raw_connection`` and ``Dialect.connect``, and listens to the engine's errors. Which host is
right is decided by a `Follower`, one for all engines of a ``follow_master`` or ``follow_replica``.
"""

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
from sqlalchemy.exc import InvalidRequestError
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

# SQLSTATEs (PostgreSQL, "PostgreSQL Error Codes"): read_only_sql_transaction, by which a standby refuses to write; and
# invalid_parameter_value, which `pg_xact_status` raises for an identifier that was not assigned yet ("transaction ID
# ... is in the future").
_READ_ONLY_SQL_TRANSACTION = "25006"
_TRANSACTION_IN_THE_FUTURE = "22023"
# How many connections are refused that lead to other servers than the source knows, before an error is raised. When
# a name has moved to another server, all connections in the pool lead to the old one: as many as a small pool holds.
_MOST_STRAYS = 20
# The first two signs of SQLSTATEs: invalid authorization, and a database that does not exist.
_REFUSALS = ("28", "3D")
# The statements that end a savepoint, which another connection would not have.
_ENDS_OF_SAVEPOINTS = (ReleaseSavepointClause, RollbackToSavepointClause)
# The isolation levels at which all statements of a transaction see one snapshot (PostgreSQL, "Transaction Isolation").
_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE")
# The execution options by which a transaction differs from others of its engine.
_OPTIONS = ("isolation_level", "postgresql_readonly", "postgresql_deferrable")


class Follower(Protocol):
    """Decides which host the sessions of a database go to, and knows what its source says of hosts."""

    guard: CommitGuard | None
    connect_timeout: float
    servers: KnowsServers | None

    async def choose(self, db: DBConnect, positions: Positions | None) -> FollowedEngine | None:
        """Return the engine that sessions of `db` are to use now; ``None`` in a test's `shared_transaction`."""

    def is_fit(self, host: str, positions: Positions, server: datetime | None = None) -> bool:
        """Return whether `host` has replayed what the running code has written.

        Args:
            host: the host.
            positions: what the running code has written.
            server: when the server was started that a connection leads to, if there is one already.
        """

    async def review(self) -> None:
        """Have each engine leave its host if sessions must not go there any more, or return to it if they may again."""

    def report_failure(self, host: str) -> None:
        """Have the source ask a host now, as something has failed on it."""

    async def has_seen(self, host: str, lost: LostCommit) -> bool:
        """Return whether `host` had replayed at least all of a transaction but its commit when it was promoted."""

    def forget_position(self, host: str, positions: Positions) -> None:
        """Forget how far `host` has replayed, so that it is asked anew before the running code reads from it."""

    def no_server(self, host: str) -> PgStatusError:
        """Return the error for a host of which each connection leads to another server than the source knows."""


class _HostLeftError(PgStatusError):
    """The host was left while a connection to it was waited for: `FollowedEngine.raw_connection` chooses again."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"The host {host!r} was left, as it does not answer, or is not the master any more: open a new session."
        )


class _OtherServerError(PgStatusError):
    """A connection leads to another server than the one that the source knows, or that was found to have a write."""


class _Wait:
    """A task that waits for a connection, and can be told to stop waiting, by a cancellation that `end` takes back."""

    __slots__ = ("cancelling", "interrupted", "task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.cancelling = task.cancelling()
        self.interrupted = False

    def interrupt(self) -> None:
        """Have the task stop waiting."""
        if not self.interrupted:
            self.interrupted = True
            self.task.cancel()

    def end(self) -> bool:
        """Take the cancellation of `interrupt` back; return whether nothing else has cancelled the task meanwhile."""
        return self.interrupted and self.task.uncancel() <= self.cancelling


# Each of the two refers to the other: so the references here are weak on both sides.
_followed: WeakKeyDictionary[Engine, ref[FollowedEngine]] = WeakKeyDictionary()


class FollowedEngine:
    """Stands in for ``Engine.raw_connection``, by which every transaction takes its connection.

    Each time, the host is checked. If the host was left meanwhile, or has not replayed what the running code has
    written, the connection is one to another host instead. So a session that has no transaction open moves along; and a
    request that waits for a connection of the pool stops waiting when the host is left.

    Args:
        engine: the engine.
        host: the host that the engine connects to.
        db: the database that the engine is of.
        follower: decides which host is right.
    """

    def __init__(self, engine: AsyncEngine, host: str, db: ref[DBConnect], follower: Follower) -> None:
        self.host = host
        self.is_left = False
        """Whether no session may take a connection to the host any more."""
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
            # SQLAlchemy has psycopg begin by BEGIN READ WRITE on a connection that has served a read-only transaction.
            # A standby refuses that: so the connection goes back to the default of its server.
            follow_dialect(
                sync_engine.dialect,
                "set_readonly",
                lambda set_readonly, connection, value: set_readonly(connection, value or None),
            )
            event.listen(sync_engine, "before_execute", self._before_execute)
            event.listen(sync_engine, "before_cursor_execute", self._before_cursor_execute)

    @classmethod
    def of(cls, engine: Engine) -> FollowedEngine | None:
        """Return the `FollowedEngine` of `engine`; ``None`` if the engine follows no host."""
        followed = _followed.get(engine)
        return None if followed is None else followed()

    # --- taking connections -------------------------------------------------------------------------------------------

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a connection from the pool of this host, or of another host if this one is not right any more.

        Raises:
            NoMasterError, NoReplicaError: no host will do.
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
                connection = followed._take(positions)  # noqa: SLF001 - its own class
            except _HostLeftError:
                # The engine is left now, so the loop chooses another host.
                continue
            except _OtherServerError:
                strays += 1
                if strays > _MOST_STRAYS:
                    raise self._follower.no_server(followed.host) from None
                if positions is not None:
                    self._follower.forget_position(followed.host, positions)
            else:
                if followed is not self:
                    self._learn_of_server(followed)
                return connection

    def _learn_of_server(self, other: FollowedEngine) -> None:
        """Know what SQLAlchemy asks a server at an engine's first connection, if this engine has made none.

        So it is if the host was left after a session had been made for it. The session has the dialect of this engine,
        and would not find the server's version or its level of isolation there.
        """
        own, others = vars(self._sync_engine.dialect), vars(other._sync_engine.dialect)
        if "default_isolation_level" not in own:
            # The answers are plain values. The other attributes that a dialect gets in time are its own.
            answers = {name: value for name, value in others.items() if isinstance(value, (str, int, tuple))}
            own.update({name: value for name, value in answers.items() if name not in own})

    async def _choose(self, positions: Positions | None) -> FollowedEngine | None:
        db = self._db()
        if db is None:
            raise PgStatusError(
                f"This session was made for {self.host!r}, which was left since, and the DBConnect is gone that would "
                "choose another host. Keep a reference to the DBConnect for as long as its sessions are used."
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
            if self._is_of_driver(exc) or type(exc) is InvalidRequestError:
                # A new connection is set up and asked for its server before the pool hands it out. SQLAlchemy raises
                # errors of that time without a `handle_error` event. If the new connection is found closed as well as
                # the idle one that it replaces, the pool gives up by an error of SQLAlchemy's own.
                self._follower.report_failure(self.host)
                raise _unreachable(self.host, exc) from exc
            raise
        finally:
            self._waits.discard(wait)
        if wait.interrupted:
            # The pool had handed a connection over when the wait was interrupted. Another cancellation of the task, if
            # there was one, goes on after this.
            wait.end()
            connection.close()
            raise _HostLeftError(self.host)
        if (state := state_of(connection)) is not None:
            self._check_server(connection, state, positions)
            if positions is not None and not self._follower.is_fit(self.host, positions, state.started_at):
                connection.close()
                raise _OtherServerError(f"{self.host!r} leads to a server that may lack what this code has written.")
            state.begin(positions)
        if self._follower.guard is not None:
            self._follower.guard.begin(connection)
        return connection

    def _is_of_driver(self, error: Exception) -> bool:
        """Return whether an error is the network's, the driver's, or that of SQLAlchemy's adapter for the driver."""
        dialect = self._sync_engine.dialect
        package = type(error).__module__.partition(".")[0]
        return isinstance(error, (OSError, dialect.loaded_dbapi.Error)) or package == dialect.driver

    def _check_server(
        self, connection: PoolProxiedConnection, state: ConnectionState, positions: Positions | None
    ) -> None:
        """Throw the connection away if it leads to another server than the source knows by the host's name.

        Raises:
            _OtherServerError: the connection was thrown away.
        """
        is_new, state.is_new = state.is_new, False
        servers = self._follower.servers
        if servers is None or state.started_at is None:
            return
        known = servers.server_of(self.host)
        if known is None or known == state.started_at:
            return
        if is_new:
            # This connection was opened just now: the source may not have seen yet that the name leads elsewhere.
            known = await_only(servers.ask_server_of(self.host))
            if known is None or known == state.started_at:
                return
            if self._follower.guard is None and (positions is None or positions.are_empty):
                # Several servers take turns behind the name. Any of them will do for code that has written nothing.
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
            # The server refuses the query, or a pooler in front of it does: which server it is stays unknown.
            return None
        finally:
            limit.cancel()

    # --- readers in the middle of a transaction -----------------------------------------------------------------------

    def _before_execute(
        self, connection: Connection, element: object, multiparams: object, params: object, options: object
    ) -> None:
        """Move a reader's transaction to another host if its code has committed something that this replica lacks."""
        positions = current_positions.get()
        if positions is None or positions.are_empty or isinstance(element, _ENDS_OF_SAVEPOINTS):
            return
        state = state_of(connection)
        if state is None or self._follower.is_fit(state.host, positions, state.started_at):
            return
        chosen = await_only(self._choose(positions))
        if chosen is None or chosen.host == state.host or connection.get_isolation_level() in _SNAPSHOTS:
            return
        if state.is_bound or connection.in_nested_transaction() or _has_options(connection):
            raise StaleReaderError(
                f"The transaction that is open on {state.host!r} has to see what this code has committed on the master "
                "since it began, and cannot go on on another host: it has a savepoint, options of its own, or a "
                "streamed result. End it first, by `commit_db_session`, or read by another session."
            )
        # At READ COMMITTED, each statement sees what is committed when it begins (PostgreSQL, "Transaction Isolation").
        # So a transaction that has only read can go on on another connection, with the settings that it has made.
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
        """Raise an error of this package if the driver's error is about the host, and not about the statement."""
        connection = context.connection
        error = context.original_exception
        if not isinstance(error, Exception) or not self._is_of_driver(error):
            return
        if connection is not None and (connection.closed or connection.invalidated):
            return
        state = None if connection is None else state_of(connection)
        if connection is None or state is None:
            # The connection is the engine's first one, which SQLAlchemy asks for the server's version and the like.
            if context.is_disconnect:
                self._follower.report_failure(self.host)
                raise _unreachable(self.host, error)
            return
        adapted: Any = connection.connection.dbapi_connection
        if not isinstance(error, context.dialect.loaded_dbapi.Error) and not driver.is_open(adapted.driver_connection):
            # A streamed result of asyncpg is read without SQLAlchemy's adapter: the error is asyncpg's own, of which
            # the dialect cannot tell that the connection is lost.
            context.is_disconnect = True
        if getattr(error, "sqlstate", None) == _READ_ONLY_SQL_TRANSACTION:
            # The same code refuses a write in a transaction that the user has made read-only, and on a replica that is
            # read from by `follow_replica`: both are in order. On the master's engine, it tells of a demotion.
            if self._follower.guard is None or not driver.in_recovery(adapted.driver_connection):
                return
            context.is_disconnect = True
        if context.is_disconnect:
            self._follower.report_failure(state.host)
            # SQLAlchemy makes the driver's error the `__cause__` of an error that a listener raises.
            raise self._lost(connection, state, error)

    def _lost(self, connection: Connection, state: ConnectionState, error: BaseException) -> PgStatusError:
        reason = str(error) or type(error).__name__
        if state.engine is self and self.is_left:
            reason = (
                f"the host was left while the connection was in use, as it does not answer, or is not the master any "
                f"more; {reason}"
            )
        if state.wrote and (state.is_committing or is_autocommit(connection)):
            return CommitUnconfirmedError(
                f"The connection to {state.host!r} broke while a commit was under way: {reason}. Look whether the "
                "write is there before you try again.",
                state.host,
            )
        return ConnectionLostError(
            f"The connection to {state.host!r} broke, or the host takes no writes any more, before the transaction was "
            f"committed: {reason}. Nothing of the transaction is stored: do it again, in a new unit of work.",
            state.host,
        )

    # --- commits whose answers were lost ------------------------------------------------------------------------------

    async def _find_outcome(self, connection: PoolProxiedConnection, lost: LostCommit) -> bool | None:
        """Ask the master, as soon as there is one, what became of a commit (see `ask_outcome_by`).

        The caller sets the limit of time: until then, the master is asked again while it cannot tell yet.
        """
        state = state_of(connection)
        while True:
            try:
                status = await self._ask_master(lost)
            except Exception:  # noqa: BLE001 - there is no master yet, or the master does not answer
                status = "in progress"
            if status == "in progress":
                await asyncio.sleep(WATCH_SECONDS)
                continue
            if state is not None:
                state.is_committing = status is None
            return None if status is None else status == "committed"

    async def _ask_master(self, lost: LostCommit) -> str | None:
        """Return ``pg_xact_status`` of the master for a transaction; ``None`` if the master cannot know.

        Raises:
            Exception: there is no master at the moment, or the master does not answer.
        """
        db, guard = self._db(), self._follower.guard
        master = None if db is None else await self._follower.choose(db, None)
        if master is None or guard is None:
            return None
        try:
            # `ask` disposes of the pool that it is given: so it is given a new one.
            status, timeline = await lost.ask(master._sync_engine.pool.recreate())  # noqa: SLF001 - its own class
        except Exception as exc:
            if getattr(exc, "sqlstate", None) != _TRANSACTION_IN_THE_FUTURE:
                raise
            # The master has not assigned this identifier yet: it was promoted before it had received the transaction.
            return "aborted"
        # A transaction's identifier means the same on the same host and timeline. A promotion begins a new timeline: so
        # another host on the same timeline is a copy that was started as a primary, and counts on its own since then.
        is_same = timeline == lost.timeline and master.host == self.host
        if not is_same and not await self._follower.has_seen(master.host, lost):
            return None
        if status == "committed" and not await guard.is_master(master.host):
            return "in progress"
        return status

    # --- leaving the host ---------------------------------------------------------------------------------------------

    def leave(self, *, abort: bool) -> None:
        """Let no session take a connection to the host until `return_to_host`. May be called on any event loop.

        Args:
            abort: whether the connections in use are cut off, too: the host is dead, or wrongly says that it is the
                master.
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
            # The pool must not hand the cut connections out later, if the host is returned to.
            self._sync_engine.dispose(close=False)

    def return_to_host(self) -> None:
        """Let the host be used again."""
        self.is_left = False

    def _watch(self) -> None:
        """Have the cluster reviewed every `WATCH_SECONDS` for as long as connections to this host are in use."""
        if not self._is_watching:
            self._is_watching = True
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            # The timer is set again and again. In a copy of the context that set it first, it would keep the unit of
            # work of that context alive: so its context is empty.
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
        # Other kinds of pools cannot tell how many connections are in use. Of a host that was left, the idle
        # connections are closed, so that each open one is in use.
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


def _has_options(connection: Connection) -> bool:
    own, common = connection.get_execution_options(), connection.engine.get_execution_options()
    return any(own.get(name) != common.get(name) for name in _OPTIONS)


async def _logged(review: Awaitable[None]) -> None:
    try:
        await review
    except Exception:
        # At the level of debug, as this would be logged ten times a second. A caller that asks for a session gets the
        # error.
        logger.debug("The cluster could not be reviewed", exc_info=True)
