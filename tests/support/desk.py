"""The desk: the databases that the requests of the ledger write to, and notes of what was certainly stored."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core import DBConnect, db_session, on_commit


@dataclass
class Desk:
    """The databases, and the notes of all requests. A key begins with the six digits of its request."""

    db: DBConnect
    other: DBConnect
    """A second pool: requests take from it after `db` only, so that they do not wait in a circle."""
    written: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    """The keys that are committed, whatever the status of the response will be."""
    undone: set[str] = field(default_factory=set)
    """The keys that are rolled back, whatever the status of the response will be."""
    to_announce: set[str] = field(default_factory=set)
    announced: set[str] = field(default_factory=set)
    """The keys that `on_commit` was asked to announce, and those that it has announced."""
    left_over: list[asyncio.Task[None]] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when all requests are over: the tasks that outlive their requests wait for it."""

    async def write(self, key: str) -> None:
        """Write two rows, by two statements, and have every other pair announced."""
        self.written.add(key)
        if int(key[:6]) % 2:
            self.to_announce.add(key)
            on_commit(self.db, lambda: self.announced.add(key))
        await self.write_half(key, "item")
        await self.write_half(key, "parent")

    async def write_half(self, key: str, table: str, db: DBConnect | None = None) -> AsyncSession:
        self.written.add(key)
        session = await db_session(self.db if db is None else db)
        await session.execute(text(f"INSERT INTO {table} VALUES (:key)"), {"key": key})
        return session
