"""The application's database: made once here, and imported where it is needed."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ctxdb_core import DBConnect

__all__ = ["POOL_SIZE", "create_engine", "db"]

POOL_SIZE = 5
SQLITE_LOCK_TIMEOUT_SECONDS = 30.0


def create_engine(url: str) -> AsyncEngine:
    """Return an engine for `url`; with an asyncio driver, as `postgresql+asyncpg` or `sqlite+aiosqlite`."""
    options: dict[str, Any] = {"pool_size": POOL_SIZE, "max_overflow": 0}
    if make_url(url).get_backend_name() != "sqlite":
        return create_async_engine(url, **options)
    # SQLite has one writer at a time; the others wait for it.
    engine = create_async_engine(url, connect_args={"timeout": SQLITE_LOCK_TIMEOUT_SECONDS}, **options)
    event.listen(engine.sync_engine, "connect", _enforce_foreign_keys)
    return engine


def _enforce_foreign_keys(dbapi_connection: Any, connection_record: object) -> None:
    # SQLite checks foreign keys on connections that ask for it only.
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


db = DBConnect(create_engine, host=os.environ.get("DATABASE_URL") or None)
"""The database of the functions that ask for a session. Without the variable, ``await db.connect(url)`` comes first."""
