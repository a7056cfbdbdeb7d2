"""One database under the names of several hosts, and a source whose answers a test sets."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tests.support.database import Database

from ctxdb_core import DBConnect, new_non_ctx_session
from ctxdb_pgstatus import KnownMaster, SyncCondition

HOST = text("SELECT current_setting('application_name')")


@dataclass(eq=False)
class FakeSource:
    """A `HostSource` whose answers a test sets."""

    master: str | None = "n1"
    replicas: tuple[str, ...] = ("n2", "n3")
    confirms: bool = True
    replayed: dict[str, int] = field(default_factory=dict)
    """The positions up to which replicas have replayed; a replica that is not named has replayed everything."""
    confirmed: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    searches: list[tuple[int | None, float]] = field(default_factory=list)
    """The questions for replicas: the position that was asked for, and the time to wait."""
    confirming: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a confirmation is asked for."""
    may_confirm: asyncio.Event | None = None
    """The event that a confirmation waits for; ``None`` if it does not wait."""
    error: Exception | None = None
    """The error that a confirmation raises; ``None`` if it succeeds."""
    _turns: count[int] = field(default_factory=count)

    async def find_master(self) -> str | None:
        return self.master

    async def find_replica(
        self, sync: SyncCondition | None = None, *, min_position: int | None = None, max_wait: float = 0.0
    ) -> str | None:
        self.searches.append((min_position, max_wait))
        fit = [
            host
            for host in self.replicas
            if min_position is None or self.replayed.get(host, min_position) >= min_position
        ]
        return fit[next(self._turns) % len(fit)] if fit else self.master

    async def find_replicas(self) -> frozenset[str]:
        return frozenset(self.replicas)

    async def confirm_master(self, host: str) -> bool:
        self.confirmed.append(host)
        self.confirming.set()
        if self.may_confirm is not None:
            await self.may_confirm.wait()
        if self.error is not None:
            raise self.error
        return self.confirms and host == self.master

    def report_failure(self, host: str) -> None:
        self.failures.append(host)


@dataclass(eq=False)
class RememberingSource(FakeSource):
    """A `FakeSource` that remembers the last master, as `PgStatusClient` does while its sidecar is away."""

    known: KnownMaster | None = field(default_factory=lambda: KnownMaster("n1", None))

    def known_master(self) -> KnownMaster | None:
        return self.known


class Hosts:
    """Makes the engines of a `DBConnect`. Each connection has the name of its host as its ``application_name``."""

    def __init__(self, database: Database, **options: Any) -> None:
        self.database = database
        self.options = options
        self.created: Counter[str] = Counter()

    def __call__(self, host: str) -> AsyncEngine:
        self.created[host] += 1
        options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 60, **self.options}
        if "asyncpg" in self.database.url:
            options["connect_args"] = {"server_settings": {"application_name": host}}
        else:
            options["connect_args"] = {"application_name": host}
        return self.database.watch(create_async_engine(self.database.url, **options))

    def pids(self, host: str) -> list[int]:
        """Return the server processes that serve `host` now."""
        return self.database.backend_pids(f"application_name = '{host}'")


async def host_of(db: DBConnect) -> str:
    """Return the name of the host to which a new session is led."""
    async with new_non_ctx_session(db) as session:
        host: str = await session.scalar(HOST)
        return host


@contextmanager
def frozen(hosts: Hosts, host: str) -> Iterator[None]:
    """Stop the server processes that serve `host`."""
    pids = hosts.pids(host)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
