"""What the requests of the ledger write with, and where they note what is certain whatever they are answered."""

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
    """A second pool: taken after `db` only, so that nobody waits in a circle."""
    written: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    """What was committed, whatever the response will be."""
    undone: set[str] = field(default_factory=set)
    """What is rolled back, whatever the response will be."""
    to_announce: set[str] = field(default_factory=set)
    announced: set[str] = field(default_factory=set)
    """What `on_commit` was asked to announce, and what it has."""
    left_over: list[asyncio.Task[None]] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when all requests are over: then the tasks that are left over go on."""

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
