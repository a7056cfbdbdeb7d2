"""Writes that follow a sidecar which is restarted, or dies."""

from __future__ import annotations

import signal

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tests.support.database import Database, insert
from tests.support.sidecar_process import running

from ctxdb_core import DBConnect, new_db_ctx
from ctxdb_core.testing.postgres import find_free_port
from ctxdb_pgstatus import CommitUnconfirmedError, PgStatusClient, follow_master


class Service:
    """Writes through a `DBConnect` that follows a sidecar."""

    def __init__(self, database: Database) -> None:
        server = database.server
        assert server is not None
        self.database = database
        self.port = find_free_port(["127.0.0.1"])
        self.variables = {
            "hosts": f"{server.host}:{server.port}",
            "pg_user": "postgres",
            "http_port": str(self.port),
            "sleep_ms": "100",
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.written: list[str] = []

    def create_engine(self, host: str) -> AsyncEngine:
        return self.database.watch(create_async_engine(self.database.url))

    async def write(self, db: DBConnect) -> None:
        name = f"{len(self.written):03}"
        self.written.append(name)
        async with new_db_ctx():
            await insert(db, name)


async def test_writes_are_acknowledged_while_the_sidecar_restarts(database: Database) -> None:
    service = Service(database)
    async with (
        PgStatusClient(service.url, max_age=0.05) as client,
        DBConnect(service.create_engine, before_create_session_handler=follow_master(client)) as db,
    ):
        for _ in range(2):
            async with running(**service.variables) as sidecar:
                await sidecar.ready()
                for _ in range(3):
                    await service.write(db)
                await sidecar.stop()
            for _ in range(3):
                await service.write(db)
    assert await database.names() == service.written


async def test_writes_are_unconfirmed_and_stored_when_the_sidecar_stays_away(database: Database) -> None:
    service = Service(database)
    async with (
        PgStatusClient(service.url, max_age=0.05, grace=0) as client,
        DBConnect(service.create_engine, before_create_session_handler=follow_master(client)) as db,
    ):
        async with running(**service.variables) as sidecar:
            await sidecar.ready()
            await service.write(db)
            await sidecar.stop(signal.SIGKILL)
        with pytest.raises(CommitUnconfirmedError, match="could not be asked"):
            await service.write(db)
    assert await database.names() == service.written
