"""`CommitGuard`: what is asked when a COMMIT has returned, before anybody is told that it has."""

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
    """What is known of one connection to a host of the cluster.

    Attributes:
        engine: whose pool it is from.
        host: where it leads to.
        wrote: whether its transaction may have written something.
        settings: what its transaction has set for itself.
        is_bound: whether its transaction has something on this connection that another one would not have.
        is_committing: whether COMMIT has been sent, and not answered.
        positions: where its commit leaves its position, beside those of the code that commits.
        started_at: when the server was started that it leads to; ``None`` if that is not known.
        is_new: whether nobody has had it before.
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
        """Forget what was done before: somebody takes the connection from the pool now."""
        self.wrote = False
        self.settings: list[str] = []
        self.is_bound = False
        self.is_committing = False
        self.positions = positions

    def keep(self, info: dict[Any, Any]) -> None:
        """Be the state of the connection with this ``info``."""
        info[_STATE] = self


def state_of(connection: Connection | PoolProxiedConnection) -> ConnectionState | None:
    """Return what is known of a connection; ``None`` if it is not one to a host of the cluster, or is not made yet."""
    try:
        info = connection.info
    except NotImplementedError:
        # SQLAlchemy asks the first connection for the server's version before its pool has it.
        return None
    return info.get(_STATE)


class CommitGuard:
    """Lets a COMMIT succeed only if its host is the master after it has returned.

    Where a sidecar that is asked for the master is away, the host itself is asked, on the connection of the commit:
    whether it is a primary still, on the timeline on which the sidecar has known it as the master. That is enough as
    long as the sidecar alone is away. What neither can tell is no success and no failure: `CommitUnconfirmedError`.

    Where the dialect commits, and not in a session's event: that comes too late to keep a success from being told, and
    connections that are used without a session commit as well.

    Args:
        source: who is asked.
        confirm: whether to ask for the master; without it, commits leave their positions only.
        timeout: how many seconds the answer may take.
    """

    def __init__(self, source: HostSource, *, confirm: bool, timeout: float) -> None:
        self._source = source
        self._confirms = confirm
        self._timeout = timeout
        # Code that has a driver's connection may write past SQLAlchemy, by COPY for instance.
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

        # SQLAlchemy has events before these calls, and none after them.
        follow_dialect(engine.dialect, "do_commit", do_commit_and_check)
        follow_dialect(engine.dialect, "do_commit_twophase", do_commit_twophase_and_check)
        follow_dialect(engine.dialect, "get_driver_connection", hand_out_driver_connection)

    def begin(self, connection: PoolProxiedConnection) -> None:
        """Note that code takes a connection from the pool: its driver's connection is in no other hands any more."""
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
            # It was lost while it committed, and the commit has been found on the master.
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
                # Nobody shall wait for a host that may be frozen: the error is to be answered.
                driver.abort(_driver_connection(connection))
                raise
        if positions_wanted(self._source):
            self._note_position(connection, state)

    async def is_master(self, host: str) -> bool:
        """Return whether `host` is the master, if commits are to be confirmed at all.

        Raises:
            Exception: it cannot be found out.
        """
        return not self._confirms or await self._source.confirm_master(host)

    def _confirm(self, connection: PoolProxiedConnection, host: str) -> None:
        """Return if `host`, which a commit has returned from on `connection`, is the master.

        Raises:
            MasterChangedError: it is not.
            CommitUnconfirmedError: it could not be found out.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            is_master = await_only(self._ask_source(host))
        except MasterUncertainError as exc:
            # The host that has committed is not asked. The name may lead to a promoted standby by now, and the old
            # master would not know.
            raise _unconfirmed(host, exc) from exc
        except Exception as exc:  # noqa: BLE001 - whatever it is, the source does not tell
            is_master = self._ask_host(connection, host, deadline, exc)
        if not is_master:
            raise MasterChangedError(
                f"A commit returned from {host!r}, which is not the master any more: what was written there is likely "
                "to be lost. Look whether the write is there before you try again, which goes to the new master."
            )

    def _confirm_server(self, state: ConnectionState) -> None:
        """Return if the server that has committed is the one that was confirmed, and no other one of the same name.

        Raises:
            MasterChangedError: it is another one.
        """
        known = self._source.server_of(state.host) if isinstance(self._source, KnowsServers) else None
        if known is not None and state.started_at not in (None, known):
            raise MasterChangedError(
                f"A commit returned from a server that is not behind the name {state.host!r} any more: what was "
                "written there is likely to be lost. Look whether the write is there before you try again, which goes "
                "to the new master."
            )

    async def _ask_source(self, host: str) -> bool:
        # A source that may be away leaves time for asking the host.
        share = 0.5 if isinstance(self._source, RemembersMaster) else 1.0
        async with asyncio.timeout(self._timeout * share):
            return await self._source.confirm_master(host)

    def _ask_host(self, connection: PoolProxiedConnection, host: str, deadline: float, reason: Exception) -> bool:
        """Return whether `host` says itself that it is the master that the source knew before it was away."""
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
            position = driver.read_position(connection)
        except Exception:  # noqa: BLE001 - the commit stands, and only the master is sure to have it
            position = UNKNOWN_POSITION
            driver.abort(_driver_connection(connection))
        self._note(state, position)

    def _note(self, state: ConnectionState, position: int) -> None:
        holders = {id(each): each for each in (current_positions.get(), state.positions) if each is not None}
        for holder in holders.values():
            holder.note(self._source, state.host, position)


def _unconfirmed(host: str, reason: Exception) -> CommitUnconfirmedError:
    return CommitUnconfirmedError(
        f"A commit returned from {host!r}, and whether that is the master could not be found out "
        f"({str(reason) or type(reason).__name__}). The write is likely to be there: look before you try again.",
        host,
    )


def _driver_connection(connection: PoolProxiedConnection) -> Any:
    adapted: Any = connection.dbapi_connection
    return adapted.driver_connection
