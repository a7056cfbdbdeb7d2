"""Tells a commit whose answer was lost from one that has failed, and asks PostgreSQL what became of it.

Each commit, of a session or of a connection, passes ``Dialect.do_commit``, or ``do_commit_twophase`` if it was prepared
before. No other place knows whether COMMIT was under way when the connection was lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool, PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from ctxdb_core._sqlalchemy.connection_context import call_out_of_sight
from ctxdb_core._sqlalchemy.mysql_errors import (
    CONNECTION_KILLED,
    SERVER_GONE,
    SERVER_SHUTDOWN,
    error_number,
    is_mysql,
)
from ctxdb_core._sqlalchemy.private import (
    connections_of,
    fetch_asyncpg_row,
    follow_dialect,
    pool_of,
    replace_commit,
)
from ctxdb_core._sqlalchemy.stale_connections import is_connection_error
from ctxdb_core.errors import ArgumentValueError, CommitOutcomeUnknownError

__all__ = [
    "RESOLVE_SECONDS",
    "AskOutcome",
    "LostCommit",
    "ask_outcome_by",
    "call_lost_commits_unknown",
    "check_can_resolve",
    "note_reader",
    "resolve_lost_commits",
]

RESOLVE_SECONDS = 10.0
"""How long PostgreSQL is asked what became of a commit, where no deadline comes first."""

_PAUSE_SECONDS = 0.05

_LOST = "ctxdb.lost_commit"
_NOTED = "ctxdb.noted_before_commit"

# The identifier of the transaction, and the server's timeline: after a promotion that has lost the commit, the new
# master gives the same identifier to another transaction. A standby, which has no position to write at, has assigned
# no identifier either.
_ASK_ID = (
    "SELECT concat_ws(' ', id, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), "
    "pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')) FROM pg_current_xact_id_if_assigned() AS id "
    "WHERE id IS NOT NULL"
)
_ASK_OUTCOME = (
    "SELECT pg_xact_status(CAST(CAST({} AS text) AS xid8)), substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), "
    "current_setting('synchronous_standby_names') <> ''"
)
# A server that recovers from a crash discards its statistics (PostgreSQL, "The Cumulative Statistics System").
_ASK_CRASH = "SELECT CAST(extract(epoch FROM clock_timestamp() - stats_reset) AS float8) FROM pg_stat_bgwriter"
# Recovery ends by a checkpoint that has its own position, as a shutdown does; any other one has an earlier position.
_ASK_RECOVERED = "SELECT redo_lsn = checkpoint_lsn, pg_wal_lsn_diff(redo_lsn, '0/0') >= {} FROM pg_control_checkpoint()"
# A write that changes no data.
_WRITE = "SELECT CAST(pg_logical_emit_message(true, 'ctxdb', '') AS text)"


class _Noted(NamedTuple):
    """What a session tells of its transaction before the commit."""

    only_reads: bool
    """Whether it has written nothing."""
    deadline: float | None
    """The time at which the session's work has to be done, on the event loop's clock; ``None`` without a limit."""
    pooled: ref[Any]
    """The connection as the pool has given it out, anew for each check-out: a later one has nothing to do with this."""


class LostCommit(NamedTuple):
    """A transaction, as PostgreSQL knew it right before its COMMIT."""

    id: int
    """Its identifier."""
    timeline: str
    """The timeline that the server wrote: 8 hexadecimal digits."""
    position: int
    """How far the server had written its WAL, in bytes: only the record of the transaction's end comes after it."""
    at: float = 0.0
    """When that was so, by ``time.monotonic()``."""

    async def ask(self, pool: Pool) -> tuple[str | None, str]:
        """Ask a server what it knows of the transaction: ``pg_xact_status``, and the timeline that the server writes.

        A connection of `pool` asks; the pool is disposed of afterwards. With synchronous replication, this returns when
        the standbys have the commit as well.

        Raises:
            Exception: the server does not answer, or is a standby.
        """
        return await greenlet_spawn(_ask_outcome, pool, self)


AskOutcome: TypeAlias = Callable[[PoolProxiedConnection, LostCommit], Awaitable[bool | None]]
"""Given the connection that a commit was lost on: whether it has been committed; ``None`` if that cannot be told."""


# The commits of each dialect. Engines that `AsyncEngine.execution_options` returns share a dialect, and so do copies of
# an engine for other event loops.
_commits: WeakKeyDictionary[Dialect, _Commits] = WeakKeyDictionary()
_followed: WeakSet[Engine] = WeakSet()


def call_lost_commits_unknown(engine: AsyncEngine) -> None:
    """Have a commit on `engine` raise `CommitOutcomeUnknownError` where its answer was lost."""
    _commits_of(engine)


def resolve_lost_commits(engine: AsyncEngine) -> None:
    """Have PostgreSQL asked what became of a commit whose answer was lost.

    Raises:
        ArgumentValueError: `engine` is for another database.
    """
    check_can_resolve(engine.dialect.name)
    _commits_of(engine).resolves = True


def ask_outcome_by(engine: AsyncEngine, ask: AskOutcome) -> None:
    """Ask `ask` for the outcome of lost commits, where they are resolved, and not the server that the engine is for.

    For databases that move from one server to another. The call of `ask` is cancelled when its time is up.
    """
    _commits_of(engine).ask = ask


def check_can_resolve(backend: str) -> None:
    """Raise the error that says why commits on a `backend` cannot be resolved, if they cannot."""
    if backend != "postgresql":
        raise ArgumentValueError(
            f"resolve_commits=True asks PostgreSQL what became of a transaction, and this is {backend}: leave it out."
        )


def note_reader(session: Any) -> None:
    """Note for the coming commit of `session` whether it has written: a commit without writes is not asked about."""
    transaction = session.get_transaction()
    if transaction is None or (session.door is None and not session.notes_writes):
        return
    only_reads = not session.has_written()
    deadline = None if session.deadline is None else session.deadline()
    for connection in connections_of(transaction):
        if not connection.invalidated and not connection.closed:
            # The note stays on the connection if the commit is refused, or if only a savepoint is released before a
            # roll-back: so it names the check-out of the connection for which it is true.
            connection.info[_NOTED] = _Noted(only_reads, deadline, ref(connection.connection))


def _commits_of(engine: AsyncEngine) -> _Commits:
    sync_engine = engine.sync_engine
    if sync_engine not in _followed:
        _followed.add(sync_engine)
        event.listen(sync_engine, "handle_error", _raise_unknown)
    commits = _commits.get(sync_engine.dialect)
    if commits is None:
        commits = _commits[sync_engine.dialect] = _Commits(sync_engine)
    return commits


class _Commits:
    """The commits of the engines that have one dialect. It may outlive the engine that it was made for."""

    resolves = False
    """Whether PostgreSQL is asked what became of a commit whose answer was lost."""
    ask: AskOutcome | None = None
    """Asked for the outcome of a lost commit, if not the engine's own server is."""

    def __init__(self, engine: Engine) -> None:
        self._dialect = ref(engine.dialect)
        self._is_asyncpg = engine.dialect.driver == "asyncpg"
        self._name = "/".join(filter(None, (engine.url.host, engine.url.database)))
        replace_commit(engine.dialect, self._commit)
        follow_dialect(engine.dialect, "do_prepare_twophase", self._prepare)
        follow_dialect(engine.dialect, "do_commit_twophase", self._commit_prepared)

    def _commit(self, do_commit: Callable[[Any], None], connection: PoolProxiedConnection) -> None:
        noted: _Noted | None = None
        transaction: LostCommit | None = None
        if self.resolves:
            noted = connection.info.pop(_NOTED, None)
            if noted is not None and noted.pooled() is not connection:
                noted = None
            if noted is None or not noted.only_reads:
                transaction = self._identify(connection)
        try:
            do_commit(connection)
        except BaseException as exc:
            if not self._is_lost(connection, exc):
                raise
            if transaction is not None and isinstance(exc, Exception):
                try:
                    has_committed = await_only(
                        self._resolve(connection, transaction, None if noted is None else noted.deadline)
                    )
                except asyncio.CancelledError as cancelled:
                    self._raise_unknown(connection, cancelled, transaction)
                if has_committed:
                    connection.invalidate(exc)
                    return
                if has_committed is False:
                    raise
            self._raise_unknown(connection, exc, transaction)

    def _prepare(self, original: Callable[..., None], connection: Connection, xid: Any) -> None:
        try:
            original(connection, xid)
        except BaseException as exc:
            if self._has_lost(connection, exc):
                exc.add_note(
                    f"ctxdb: the connection was lost while the transaction was prepared as {xid!r}: not committed. "
                    "The database may still hold it, with its locks, until `ROLLBACK PREPARED` ends it: see "
                    "pg_prepared_xacts."
                )
            raise

    def _commit_prepared(
        self, original: Callable[..., None], connection: Connection, xid: Any, *args: Any, **kwargs: Any
    ) -> None:
        try:
            original(connection, xid, *args, **kwargs)
        except BaseException as exc:
            if not self._has_lost(connection, exc):
                raise
            # Whether or not COMMIT PREPARED was sent, the prepared transaction can still be committed.
            cause = (exc.orig or exc) if isinstance(exc, DBAPIError) else exc
            unknown = _unknown(
                self._name, None, cause, f"It was prepared as {xid!r}, and is open as long as pg_prepared_xacts has it."
            )
            if not isinstance(exc, Exception):
                raise exc from unknown
            if not connection.invalidated:
                connection.invalidate(exc)
            raise unknown from exc

    def _has_lost(self, connection: Connection, exc: BaseException) -> bool:
        if isinstance(exc, DBAPIError):
            return exc.connection_invalidated
        return connection.invalidated or self._is_lost(connection.connection, exc)

    def _is_lost(self, connection: PoolProxiedConnection, exc: BaseException) -> bool:
        return _is_lost(self._running_dialect(), connection, exc)

    def _running_dialect(self) -> Dialect:
        dialect = self._dialect()
        assert dialect is not None, "one of its methods is running"
        return dialect

    def _raise_unknown(
        self, connection: PoolProxiedConnection, exc: BaseException, transaction: LostCommit | None
    ) -> None:
        unknown = _unknown(self._name, transaction, exc)
        if not isinstance(exc, Exception):
            # A cancellation goes on. Its cause tells the code that has set a time limit which commit was interrupted.
            raise exc from unknown
        if isinstance(exc, self._running_dialect().loaded_dbapi.Error):
            # SQLAlchemy has listeners and the pool see the driver's error: see `_raise_unknown` of the module.
            connection.info[_LOST] = unknown
            raise exc
        connection.invalidate(exc)
        raise unknown from exc

    def _identify(self, connection: PoolProxiedConnection) -> LostCommit | None:
        row = _ask(connection, _ASK_ID, is_asyncpg=self._is_asyncpg)
        if row is None:
            return None
        number, timeline, position = row[0].split()
        return LostCommit(int(number), timeline, int(position), time.monotonic())

    async def _resolve(
        self, connection: PoolProxiedConnection, transaction: LostCommit, deadline: float | None
    ) -> bool | None:
        """Return whether `transaction` has been committed; ``None`` if that cannot be told before the deadline."""
        latest = asyncio.get_running_loop().time() + RESOLVE_SECONDS
        # The question takes a pool of its own: the engine's connections may be as dead as the one of the commit.
        pool = pool_of(connection).recreate()
        try:
            async with asyncio.timeout_at(latest if deadline is None else min(deadline, latest)):
                if self.ask is not None:
                    return await self.ask(connection, transaction)
                while True:
                    try:
                        status, timeline = await transaction.ask(pool)
                    except Exception:  # noqa: BLE001 - the server is not there yet, or not there any more
                        status = "in progress"
                    else:
                        if timeline != transaction.timeline:
                            return None
                    if status != "in progress":
                        return {"committed": True, "aborted": False}.get(status or "")
                    await asyncio.sleep(_PAUSE_SECONDS)
        except TimeoutError:
            return None


def _ask(connection: PoolProxiedConnection, query: str, *, is_asyncpg: bool = False) -> Any:
    """Return the one row of a query, or ``None``."""
    if is_asyncpg:
        # A third less of the CPU: this is asked at each commit. asyncpg keeps the prepared statement for minutes, by a
        # timer with a copy of the context: it would keep the unit of work alive that was the first to ask.
        return call_out_of_sight(fetch_asyncpg_row, connection.dbapi_connection, query)
    cursor = connection.cursor()
    try:
        cursor.execute(query)
        return cursor.fetchone()
    finally:
        cursor.close()


def _ask_outcome(pool: Pool, transaction: LostCommit) -> tuple[str | None, str]:
    connection = pool.connect()
    try:
        status, timeline, is_synchronous = _ask(connection, _ASK_OUTCOME.format(transaction.id))
        if status == "committed" and timeline == transaction.timeline:
            status = _status_after_crash(connection, transaction)
        if status == "committed" and is_synchronous:
            # A server whose COMMIT is interrupted while it waits for standbys has committed by itself alone
            # (PostgreSQL, `SyncRepWaitForLSN`). The commit of a later write waits for the standbys anew.
            _ask(connection, _WRITE)
            connection.commit()
        return status, timeline
    finally:
        connection.close()
        pool.dispose()


def _status_after_crash(connection: PoolProxiedConnection, transaction: LostCommit) -> str | None:
    """Return what has become of a transaction whose identifier is that of a committed one; ``None`` if it is unknown.

    A crash loses the WAL that was not flushed yet, and with it the identifiers that were assigned there: the server
    gives them to other transactions.
    """
    (seconds,) = _ask(connection, _ASK_CRASH)
    if seconds is not None and time.monotonic() - seconds <= transaction.at:
        return "committed"
    is_last, has_all = _ask(connection, _ASK_RECOVERED.format(transaction.position))
    if not is_last:
        # Another checkpoint has been made since: where the recovery has ended cannot be found out any more.
        return None
    return "committed" if has_all else "aborted"


def _is_lost(dialect: Dialect, connection: PoolProxiedConnection, exc: BaseException) -> bool:
    """Return whether COMMIT had been sent, or may have been, when `exc` came in the place of its answer."""
    dbapi = dialect.loaded_dbapi
    if not isinstance(exc, dbapi.Error):
        return not isinstance(exc, Exception) or isinstance(exc, OSError | TimeoutError)
    # aiosqlite's module has no `InterfaceError`.
    if isinstance(exc, getattr(dbapi, "InterfaceError", ())) or str(exc) == "the connection is closed":
        # asyncpg, and psycopg in these words, refuse to send anything on a connection that is closed or busy.
        return False
    if "cannot switch to state" in str(exc):
        # So does asyncpg where the server has announced the end of the connection, which has not arrived yet.
        return False
    if is_mysql(dialect):
        number = error_number(exc)
        # asyncmy raises SERVER_GONE before it has sent anything. A server that ends the connection tells the other two.
        return number != SERVER_GONE and (
            number in (CONNECTION_KILLED, SERVER_SHUTDOWN) or dialect.is_disconnect(exc, connection, None)
        )
    sqlstate = getattr(exc, "sqlstate", None)
    if sqlstate is not None and not is_connection_error(sqlstate):
        # The server has answered: it has rolled back. But one that panics, as its disk is full for instance, may find
        # the commit in its log when it recovers. asyncpg tells of a panic by the loss of the connection.
        return getattr(getattr(exc, "diag", None), "severity_nonlocalized", None) == "PANIC"
    return sqlstate is not None or dialect.is_disconnect(exc, connection, None)


def _unknown(
    name: str,
    transaction: LostCommit | None,
    exc: BaseException,
    hint: str = "`DBConnect(..., resolve_commits=True)` has PostgreSQL asked.",
) -> CommitOutcomeUnknownError:
    told = "" if transaction is None else f", transaction {transaction.id}"
    return CommitOutcomeUnknownError(
        f"The connection to {name!r} was lost while COMMIT was under way{told} ({str(exc) or type(exc).__name__}): "
        f"the work may be stored, or not. Look whether it is there before it is done again. {hint}",
        (name,),
        {} if transaction is None else {name: transaction.id},
    )


def _raise_unknown(context: ExceptionContext) -> BaseException | None:
    """Have SQLAlchemy raise the error that `_Commits` has left, in the place of the driver's."""
    connection = context.connection
    if context.statement is not None or connection is None or connection.closed or connection.invalidated:
        return None
    unknown: CommitOutcomeUnknownError | None = connection.info.pop(_LOST, None)
    if unknown is not None:
        context.is_disconnect = True
        # The pool checks each other connection at its check-out.
        context.invalidate_pool_on_disconnect = False
    # Returned, and not raised: a listener that comes later may know more of the host.
    return unknown
