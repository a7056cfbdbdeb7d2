"""Blocks of SQLAlchemy's on the session of the unit of work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxdb_core import DBConnect, db_session

__all__ = ["savepoint", "transaction"]


@asynccontextmanager
async def savepoint(db: DBConnect) -> AsyncIterator[None]:
    async with (await db_session(db)).begin_nested():
        yield


@asynccontextmanager
async def transaction(db: DBConnect) -> AsyncIterator[None]:
    async with (await db_session(db)).begin():
        yield
