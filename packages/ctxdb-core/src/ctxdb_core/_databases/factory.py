"""`create_engine`: makes the engine of a URL, which may be read-only."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ctxdb_core._databases.url import host_of, without_secrets
from ctxdb_core._sqlalchemy.binds import READ_ONLY_OPTION
from ctxdb_core._sqlalchemy.private import give_own_dictionaries
from ctxdb_core._sqlalchemy.read_only import make_read_only
from ctxdb_core.errors import ArgumentValueError

__all__ = ["create_engine"]


def create_engine(url: URL, host: str, options: dict[str, Any], *, read_only: bool) -> AsyncEngine:
    """Create the engine of `url` on `host`, with the options of `create_async_engine`.

    Raises:
        ValueError: `url` names no host that could be replaced, or it cannot be made read-only.
    """
    if host != host_of(url):
        if not url.host:
            raise ArgumentValueError(
                f"The URL of this DBConnect names no host, so it cannot be changed to {without_secrets(host)!r}: "
                "name a host in the URL."
            )
        url = url.set(host=host)
    _limit_connect(url, options)
    engine = _create_read_only(url, options) if read_only else create_async_engine(url, **options)
    give_own_dictionaries(engine.sync_engine)
    return engine


CONNECT_SECONDS = 10
"""How long opening a connection may take, unless the URL or ``connect_args`` say otherwise."""

_CONNECT_TIMEOUTS = {
    "asyncpg": "timeout",
    "psycopg": "connect_timeout",
    "psycopg_async": "connect_timeout",
    "aiomysql": "connect_timeout",
    "asyncmy": "connect_timeout",
}


def _limit_connect(url: URL, options: dict[str, Any]) -> None:
    # A server that does not answer would be waited for as long as the operating system does: for minutes.
    name = _CONNECT_TIMEOUTS.get(url.get_dialect().driver)
    given = options.get("connect_args", {})
    if name is not None and name not in given and name not in url.query and "async_creator" not in options:
        options["connect_args"] = {**given, name: CONNECT_SECONDS}


def _create_read_only(url: URL, options: dict[str, Any]) -> AsyncEngine:
    if "isolation_level" in options:
        raise ArgumentValueError("read_only=True sets isolation_level itself: leave it out, or leave out read_only.")
    backend = url.get_backend_name()
    options["execution_options"] = {**options.get("execution_options", {}), READ_ONLY_OPTION: True}
    if backend == "postgresql":
        # Autocommit spares each query its BEGIN and COMMIT; the server then refuses every write by SQLSTATE 25006.
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT", **options)
        make_read_only(engine)
        return engine
    statement = {
        "sqlite": "PRAGMA query_only = ON",
        "mysql": "SET SESSION TRANSACTION READ ONLY",
        "mariadb": "SET SESSION TRANSACTION READ ONLY",
    }.get(backend)
    if statement is None:
        raise ArgumentValueError(
            f"read_only=True knows PostgreSQL, SQLite, MySQL and MariaDB, not {backend!r}: leave it out."
        )
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT", **options)

    @event.listens_for(engine.sync_engine, "connect")
    def set_read_only(dbapi_connection: Any, connection_record: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute(statement)
        cursor.close()

    return engine
