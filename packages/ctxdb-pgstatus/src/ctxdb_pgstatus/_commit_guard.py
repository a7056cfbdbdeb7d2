"""`CommitGuard`: after COMMIT has returned, asks whether the host is still the master before the commit succeeds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ctxdb_core.adapters import follow_dialect, is_autocommit, is_read_only
from ctxdb_pgstatus._following import driver
from ctxdb_pgstatus._following.positions import UNKNOWN_POSITION, Positions, current_positions, positions_wanted
from ctxdb_pgstatus._following.statements import may_write
from ctxdb_pgstatus.errors import CommitUnconfirmedError, MasterChangedError, MasterUncertainError
from ctxdb_pgstatus.source import HostSource, KnowsServers, RemembersMaster

__all__ = ["CommitGuard", "ConnectionState", "state_of"]

_STATE = "ctxdb_pgstatus.state"


class ConnectionState:
    """What is known of one connection to a host of the cluster, and of the transaction on it.

    Attributes:
        engine: the `FollowedEngine` whose pool the connection is from.
        host: the host that the connection leads to.
        wrote: whether the transaction may have written something.
        settings: the ``SET LOCAL`` statements of the transaction.
        is_bound: whether the transaction has something on this connection that another connection would not have.
        is_committing: whether COMMIT has been sent, and has not been answered.
        positions: where the commit leaves its position, beside the positions of the code that commits: those of the
            code that took the connection from the pool.
        started_at: when the server was started that the connection leads to; ``None`` if that is not known.
        is_new: whether the pool has not handed the connection out yet.
    """

    __slots__ = (
        "engine",
        "host",
        "is_bound",
        "is_committing",
        "is_new",
        "positions",
        "settings",
        "started_at",
        "wrote",
    )

    def __init__(self, engine: object, host: str) -> None:
        self.engine = engine
        self.host = host
        self.started_at: datetime | None = None
        self.is_new = True
        self.begin(None)

    def begin(self, positions: Positions | None) -> None:
        """Forget the last transaction, as the connection is taken from the pool anew, by the code of `positions`."""
        self.wrote = False
        self.settings: list[str] = []
        self.is_bound = False
        self.is_committing = False
        self.positions = positions

    def keep(self, info: dict[Any, Any]) -> None:
        """Be the state of the connection that has this ``info``."""
        info[_STATE] = self


def state_of(connection: Connection | PoolProxiedConnection) -> ConnectionState | None:
    """Return what is known of a connection; ``None`` if it is to no host of the cluster, or is still being set up."""
    try:
        info = connection.info
    except NotImplementedError:
        # SQLAlchemy asks the first connection of an engine for the server's version before the connection is in the
        # pool, by a stand-in of the pool's proxy that has no `info`.
        return None
    return info.get(_STATE)


class CommitGuard:
    """Lets a COMMIT succeed only if its host is the master after COMMIT has returned.

    The source is asked. If that cannot answer (a sidecar may be away), the host itself is asked, on the connection of
    the commit: is it still a primary, on the timeline on which the source has known it as the master? That is enough
    as long as the source alone is away. If neither can tell, the commit is no success and no failure:
    `CommitUnconfirmedError`.

    The question is asked where the dialect commits. A session's event ``after_commit`` would come too late to keep the
    success from being told, and would not see commits of connections without a session.

    Args:
        source: knows the master.
        confirm: whether to ask for the master. Without that, commits only leave their positions for later reads.
        timeout: how many seconds the answer may take.
    """

    def __init__(self, source: HostSource, *, confirm: bool, timeout: float) -> None:
        self._source = source
        self._confirms = confirm
        self._timeout = timeout
        # The drivers' connections that were handed out to code of the user's, which may write past SQLAlchemy: by COPY,
        # for instance. Each commit of such a connection is confirmed.
        self._handed_out: WeakSet[Any] = WeakSet()

    def attach(self, engine: Engine) -> None:
        """Guard the commits of an engine."""
        event.listen(engine, "before_cursor_execute", self._before_execute)
        event.listen(engine, "after_cursor_execute", self._after_execute)

        def do_commit_and_check(
            do_commit: Callable[[PoolProxiedConnection], None], dbapi_connection: PoolProxiedConnection
        ) -> None:
            state = state_of(dbapi_connection)
            if state is not None:
                state.is_committing = True
            do_commit(dbapi_connection)
            if state is not None:
                state.is_committing = False
                self._committed(dbapi_connection, state)

        def do_commit_twophase_and_check(
            do_commit_twophase: Callable[..., None], connection: Connection, *args: Any, **options: Any
        ) -> None:
            state = state_of(connection)
            if state is not None:
                state.wrote = state.is_committing = True
            do_commit_twophase(connection, *args, **options)
            if state is not None:
                state.is_committing = False
                self._committed(connection.connection, state)

        def hand_out_driver_connection(get_driver_connection: Callable[[Any], Any], dbapi_connection: Any) -> Any:
            driver_connection = get_driver_connection(dbapi_connection)
            self._handed_out.add(driver_connection)
            return driver_connection

        # SQLAlchemy has events before the dialect commits (`commit`, `commit_twophase`), and none after that.
        follow_dialect(engine.dialect, "do_commit", do_commit_and_check)
        follow_dialect(engine.dialect, "do_commit_twophase", do_commit_twophase_and_check)
        follow_dialect(engine.dialect, "get_driver_connection", hand_out_driver_connection)

    def begin(self, connection: PoolProxiedConnection) -> None:
        """Note that a connection is taken from the pool: code that was handed its driver's connection has ended."""
        if self._handed_out:
            self._handed_out.discard(_driver_connection(connection))

    def _before_execute(
        self,
        connection: Connection,
        cursor: object,
        statement: str,
        parameters: object,
        context: ExecutionContext | None,
        executemany: object,
    ) -> None:
        state = state_of(connection)
        if state is None:
            return
        state.is_committing = False
        if (
            not state.wrote
            and may_write(statement, context)
            and not is_read_only(connection)
            and not connection.get_execution_options().get("postgresql_readonly")
        ):
            state.wrote = True

    def _after_execute(self, connection: Connection, *args: object) -> None:
        # In autocommit, a statement is committed when it has returned.
        state = state_of(connection)
        if state is not None and state.wrote and is_autocommit(connection):
            self._committed(connection.connection, state)

    def _committed(self, connection: PoolProxiedConnection, state: ConnectionState) -> None:
        if connection.dbapi_connection is None:
            # The connection was lost while it committed, and with `resolve_commits` the commit was found on the master.
            # The position after the commit can be read no more.
            state.wrote = False
            self._note(state, UNKNOWN_POSITION)
            return
        if not state.wrote and not (self._handed_out and _driver_connection(connection) in self._handed_out):
            return
        state.wrote = False
        if self._confirms:
            try:
                self._confirm(connection, state.host)
                self._confirm_server(state)
            except (MasterChangedError, CommitUnconfirmedError):
                # The host may be frozen, and would not answer a ROLLBACK: cut off, the connection lets the error out at
                # once.
                driver.abort(_driver_connection(connection))
                raise
        if positions_wanted(self._source):
            self._note_position(connection, state)

    async def is_master(self, host: str) -> bool:
        """Return whether `host` is the master; ``True`` without a question if commits are not to be confirmed.

        Raises:
            Exception: the source cannot tell.
        """
        return not self._confirms or await self._source.confirm_master(host)

    def _confirm(self, connection: PoolProxiedConnection, host: str) -> None:
        """Raise an error unless `host` is the master. A commit has just returned from it on `connection`.

        Raises:
            MasterChangedError: `host` is not the master.
            CommitUnconfirmedError: neither the source nor the host could tell.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            is_master = await_only(self._ask_source(host))
        except MasterUncertainError as exc:
            # The host that has committed is not asked. The name may lead to a promoted standby by now, and the old
            # master would not know.
            raise _unconfirmed(host, exc) from exc
        except Exception as exc:  # noqa: BLE001 - whatever the error is, the source does not tell
            is_master = self._ask_host(connection, host, deadline, exc)
        if not is_master:
            raise MasterChangedError(
                f"A commit returned from {host!r}, which is not the master any more: the write is likely to be lost. "
                "Look on the new master whether the write is there before you do it again."
            )

    def _confirm_server(self, state: ConnectionState) -> None:
        """Raise an error if another server than the one that committed answers by the name of the host now.

        `_confirm` has asked about the name of the master. The connection may lead to a server that had the name before.

        Raises:
            MasterChangedError: the server that committed has lost the name.
        """
        known = self._source.server_of(state.host) if isinstance(self._source, KnowsServers) else None
        if known is not None and state.started_at not in (None, known):
            raise MasterChangedError(
                f"A commit returned from a server that is not behind the name {state.host!r} any more: the write is "
                "likely to be lost. Look on the new master whether the write is there before you do it again."
            )

    async def _ask_source(self, host: str) -> bool:
        # If the source may be away, half of the time is left for the question to the host.
        share = 0.5 if isinstance(self._source, RemembersMaster) else 1.0
        async with asyncio.timeout(self._timeout * share):
            return await self._source.confirm_master(host)

    def _ask_host(self, connection: PoolProxiedConnection, host: str, deadline: float, reason: Exception) -> bool:
        """Return whether `host` says that it is still the primary that the source knew as the master.

        Args:
            connection: the connection of the commit.
            host: the host that it leads to.
            deadline: when to give up, by the event loop's clock.
            reason: why the source cannot tell.

        Raises:
            CommitUnconfirmedError: the source knows no master, or the host does not answer.
        """
        known = self._source.known_master() if isinstance(self._source, RemembersMaster) else None
        if known is None:
            raise _unconfirmed(host, reason) from reason
        if known.host != host:
            return False
        # At the deadline, the connection is cut off. To cancel the query, the driver would have to ask the server,
        # which may be frozen.
        limit = asyncio.get_running_loop().call_at(deadline, driver.abort, _driver_connection(connection))
        try:
            timeline = driver.read_master_timeline(connection)
        except Exception as exc:
            exc.__context__ = reason
            raise _unconfirmed(host, exc) from exc
        finally:
            limit.cancel()
        return timeline is not None and known.timeline in (None, timeline)

    def _note_position(self, connection: PoolProxiedConnection, state: ConnectionState) -> None:
        if current_positions.get() is None and state.positions is None:
            return
        try:
            position, timeline = driver.read_position(connection)
        except Exception as exc:  # noqa: BLE001 - the commit stands; without its position, later reads go to the master
            position, timeline = UNKNOWN_POSITION, 0
            # The server may be frozen, and would not answer the end of the connection. The pool must not reset it.
            driver.abort(_driver_connection(connection))
            connection.invalidate(exc)
        self._note(state, position, timeline)

    def _note(self, state: ConnectionState, position: int, timeline: int = 0) -> None:
        holders = {id(each): each for each in (current_positions.get(), state.positions) if each is not None}
        for holder in holders.values():
            holder.note(self._source, state.host, position, timeline)


def _unconfirmed(host: str, reason: Exception) -> CommitUnconfirmedError:
    return CommitUnconfirmedError(
        f"A commit returned from {host!r}, and whether {host!r} is the master could not be found out "
        f"({str(reason) or type(reason).__name__}). The write is likely to be there: look before you do it again.",
        host,
    )


def _driver_connection(connection: PoolProxiedConnection) -> Any:
    adapted: Any = connection.dbapi_connection
    return adapted.driver_connection
