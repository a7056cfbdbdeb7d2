"""The engines of an application in a shared transaction: its own, but for the connections that they get."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool

from ctxdb_core._sqlalchemy.binds import is_read_only
from ctxdb_core._sqlalchemy.private import isolation_level_on_connect
from ctxdb_core._sqlalchemy.read_only import skip_savepoints_in_autocommit
from ctxdb_core.testing._connection import Connection
from ctxdb_core.testing._shared_connection import SharedConnection

SHARED_DRIVER = "shared"
"""The name of the driver, by which connections of each shared engine are known."""


class _SharedDialect:
    """What is particular to a shared connection, mixed into the dialect of the application's engine."""

    driver = SHARED_DRIVER
    has_terminate = True

    def do_close(self, dbapi_connection: Connection) -> None:
        dbapi_connection.close()

    def do_terminate(self, dbapi_connection: Connection) -> None:
        dbapi_connection.terminate()

    def do_ping(self, dbapi_connection: Connection) -> bool:
        return True

    def is_disconnect(self, error: Exception, connection: Any, cursor: Any) -> bool:
        return connection is not None and bool(connection.is_lost)

    def get_driver_connection(self, connection: Connection) -> Any:
        return connection.driver_connection

    # On a single connection, no other transaction writes: all isolation levels are the same, but for autocommit.

    def set_isolation_level(self, dbapi_connection: Connection, level: str) -> None:
        dbapi_connection.autocommit = level == "AUTOCOMMIT"
        dbapi_connection.isolation_level = level

    def get_isolation_level(self, dbapi_connection: Connection) -> str:
        # The server would answer for the transaction that is shared.
        own: Any = self
        level: str = dbapi_connection.isolation_level or isolation_level_on_connect(own) or own.default_isolation_level
        return level

    def detect_autocommit_setting(self, dbapi_connection: Connection) -> bool:
        return dbapi_connection.autocommit

    def set_readonly(self, connection: Connection, value: bool) -> None:  # noqa: FBT001 - as the dialects do
        connection.read_only = value

    def get_readonly(self, connection: Connection) -> bool:
        return connection.read_only

    def set_deferrable(self, connection: Connection, value: bool) -> None:  # noqa: FBT001 - as above
        """Do nothing: a deferrable read-only transaction would wait for other transactions, of which there are none."""

    def get_deferrable(self, connection: Connection) -> bool:
        return False


class SharedEngine(OptionEngine):
    """An engine like another one, listeners and all, with a pool of its own."""

    pool: Pool = None  # type: ignore[assignment]  # OptionEngine's is the other engine's


# One dialect for each engine: what was compiled for it stays compiled in the next test.
_dialects: WeakKeyDictionary[Engine, Dialect] = WeakKeyDictionary()


def is_autocommit(engine: AsyncEngine) -> bool:
    """Return whether the connections of `engine` are in autocommit mode."""
    return isolation_level_on_connect(engine.dialect) == "AUTOCOMMIT"


def create_shared_engine(original: AsyncEngine, shared: SharedConnection, *, lenient: bool) -> AsyncEngine:
    """Return an engine like `original` whose connections are all parts of the shared one."""
    sync_engine = original.sync_engine
    read_only = is_read_only(sync_engine)
    dialect = _dialects.get(sync_engine)
    if dialect is None:
        kind = type(sync_engine.dialect)
        # SQLAlchemy takes this attribute from each dialect class itself, and not from its bases ("Caching for Third
        # Party Dialects").
        own = {"supports_statement_cache": kind.supports_statement_cache}
        shared_kind: type[Dialect] = type(f"Shared{kind.__name__}", (_SharedDialect, kind), own)
        # What the original has learnt of the server, but not what its methods were replaced by, which is about its own
        # connections: how cancelled queries are stopped, for instance.
        dialect = shared_kind.__new__(shared_kind)
        learnt = {
            name: value
            for name, value in vars(sync_engine.dialect).items()
            if not inspect.isfunction(getattr(kind, name, None))
        }
        vars(dialect).update(learnt)
        if read_only:
            skip_savepoints_in_autocommit(dialect)
        _dialects[sync_engine] = dialect
    autocommit = is_autocommit(original)

    def connect() -> Any:
        return Connection(shared, autocommit=autocommit, read_only=read_only, lenient=lenient)

    # A connection costs nothing here, so there may be any number of them.
    pool = AsyncAdaptedQueuePool(connect, max_overflow=-1, dialect=dialect)
    for name in ("checkout", "checkin", "reset"):
        # There is none for ``connect``: its listeners were called when the original engine opened the connection.
        event.listen(pool, name, partial(_call_listeners, sync_engine, name))
    engine = SharedEngine(sync_engine, {})
    engine.dialect = dialect
    engine.pool = pool
    return AsyncEngine(engine)


def _call_listeners(engine: Engine, name: str, *args: Any) -> None:
    getattr(engine.pool.dispatch, name)(*args)
