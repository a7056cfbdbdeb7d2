"""`CommitGuard`: what is asked when a COMMIT has returned, before anybody is told that it has."""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ctxdb_core import is_autocommit, is_read_only
from ctxdb_pgstatus._following import driver
from ctxdb_pgstatus._following.positions import UNKNOWN_POSITION, Positions, current_positions, positions_wanted
from ctxdb_pgstatus._following.statements import may_write
from ctxdb_pgstatus.errors import MasterChangedError
from ctxdb_pgstatus.source import HostSource

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
        positions: where its commit leaves its position, beside those of the code that commits.
    """

    __slots__ = ("engine", "host", "is_bound", "positions", "settings", "wrote")

    def __init__(self, engine: object, host: str) -> None:
        self.engine = engine
        self.host = host
        self.begin(None)

    def begin(self, positions: Positions | None) -> None:
        """Forget what was done before: somebody takes the connection from the pool now."""
        self.wrote = False
        self.settings: list[str] = []
        self.is_bound = False
        self.positions = positions

    def keep(self, info: dict[Any, Any]) -> None:
        """Be the state of the connection with this ``info``."""
        info[_STATE] = self


def state_of(connection: Connection | PoolProxiedConnection) -> ConnectionState | None:
    """Return what is known of a connection; ``None`` if it is not one to a host of the cluster."""
    return connection.info.get(_STATE)


class CommitGuard:
    """Lets a COMMIT succeed only if its host is the master after it has returned.

    Where the dialect commits, and not in a session's event: that comes too late to keep a success from being told, and
    connections that are used without a session commit as well.

    Args:
        source: who is asked.
        confirm: whether to ask for the master; without it, commits leave their positions only.
        timeout: how many seconds an answer may take.
    """

    def __init__(self, source: HostSource, *, confirm: bool, timeout: float) -> None:
        self._source = source
        self._confirms = confirm
        self._timeout = timeout
        # Whoever has a driver's connection may write past SQLAlchemy, by COPY for instance.
        self._handed_out: WeakSet[Any] = WeakSet()

    def attach(self, engine: Engine) -> None:
        """Guard the commits of an engine."""
        event.listen(engine, "before_cursor_execute", self._before_execute)
        event.listen(engine, "after_cursor_execute", self._after_execute)
        dialect: Any = engine.dialect
        do_commit, do_commit_twophase = dialect.do_commit, dialect.do_commit_twophase
        get_driver_connection = dialect.get_driver_connection

        def do_commit_and_check(dbapi_connection: PoolProxiedConnection) -> None:
            do_commit(dbapi_connection)
            self._committed(dbapi_connection)

        def do_commit_twophase_and_check(connection: Connection, *args: Any, **options: Any) -> None:
            do_commit_twophase(connection, *args, **options)
            if (state := state_of(connection)) is not None:
                state.wrote = True
                self._committed(connection.connection)

        def hand_out_driver_connection(dbapi_connection: Any) -> Any:
            driver_connection = get_driver_connection(dbapi_connection)
            self._handed_out.add(driver_connection)
            return driver_connection

        # There are events before these, and none after them.
        dialect.do_commit = do_commit_and_check
        dialect.do_commit_twophase = do_commit_twophase_and_check
        dialect.get_driver_connection = hand_out_driver_connection

    def begin(self, connection: PoolProxiedConnection) -> None:
        """Forget who has had a connection that somebody takes from the pool now."""
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
        if (
            state is not None
            and not state.wrote
            and may_write(statement, context)
            and not is_read_only(connection)
            and not connection.get_execution_options().get("postgresql_readonly")
        ):
            state.wrote = True

    def _after_execute(self, connection: Connection, *args: object) -> None:
        # In autocommit, a statement is committed when it has returned.
        state = state_of(connection)
        if state is not None and state.wrote and is_autocommit(connection):
            self._committed(connection.connection)

    def _committed(self, connection: PoolProxiedConnection) -> None:
        state = state_of(connection)
        if state is None:
            return
        if not state.wrote and not (self._handed_out and _driver_connection(connection) in self._handed_out):
            return
        state.wrote = False
        if self._confirms:
            try:
                await_only(self._confirm(state.host))
            except MasterChangedError:
                # Nobody shall wait for a host that may be frozen: the error is to be answered.
                driver.abort(_driver_connection(connection))
                raise
        if positions_wanted(self._source):
            self._note_position(connection, state)

    async def _confirm(self, host: str) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                is_master = await self._source.confirm_master(host)
        except Exception as exc:
            raise MasterChangedError(
                f"A commit returned from {host!r}, and whether that is the master could not be found out. Look whether "
                "the write is there before you try again."
            ) from exc
        if not is_master:
            raise MasterChangedError(
                f"A commit returned from {host!r}, which is not the master any more: what was written there is likely "
                "to be lost. Look whether the write is there before you try again, which goes to the new master."
            )

    def _note_position(self, connection: PoolProxiedConnection, state: ConnectionState) -> None:
        holders = {id(each): each for each in (current_positions.get(), state.positions) if each is not None}
        if not holders:
            return
        try:
            position = driver.read_position(connection)
        except Exception:  # noqa: BLE001 - the commit stands, and only the master is sure to have it
            position = UNKNOWN_POSITION
            driver.abort(_driver_connection(connection))
        for holder in holders.values():
            holder.note(self._source, state.host, position)


def _driver_connection(connection: PoolProxiedConnection) -> Any:
    adapted: Any = connection.dbapi_connection
    return adapted.driver_connection
