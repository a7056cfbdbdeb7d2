"""The bank of the examples, on a database of the tests."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from tests.support.database import Database, eventually

# Each bank has tables of its own.
import ctxdb_demo.jobs.payroll
import ctxdb_demo.jobs.queue_worker
import ctxdb_demo.jobs.tasks  # noqa: F401 - see above
from ctxdb_demo import domain
from ctxdb_demo.database import db


@dataclass
class Process:
    """A job in a process of its own."""

    process: asyncio.subprocess.Process

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and what was printed."""
        async with asyncio.timeout(20):
            output, _ = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, output.decode()


@dataclass
class Bank:
    """The accounts, as another connection sees them; and ways to hold up a job that changes one."""

    database: Database
    engine: AsyncEngine

    async def balances(self) -> dict[str, int]:
        return dict(await self.database.query("SELECT owner, balance FROM ctxdb_demo_accounts"))

    async def transfers(self) -> int:
        return int((await self.database.query("SELECT count(*) FROM ctxdb_demo_transfers"))[0][0])

    @asynccontextmanager
    async def locked(self, owner: str) -> AsyncIterator[None]:
        """Let every change of an account wait until the end of the block."""
        async with self.engine.connect() as connection:
            query = text("SELECT 1 FROM ctxdb_demo_accounts WHERE owner = :owner FOR UPDATE")
            await connection.execute(query, {"owner": owner})
            yield

    async def wait_until_a_job_is_held_up(self) -> None:
        """Return once a job is in the middle of its work, where `locked` holds it up."""
        await eventually(lambda: bool(self.database.backends(WAITS)), "no job waits for the lock", seconds=20)

    def break_connection(self) -> None:
        """Kill the connection of the job that waits."""
        assert self.database.terminate_backends(WAITS) == 1

    async def let_the_first_change_conflict(self) -> Callable[[], Awaitable[int]]:
        """Let the next change of an account fail as if it could not be serialized.

        Returns:
            What tells how many changes were tried.
        """
        async with self.engine.begin() as connection:
            await connection.execute(text("CREATE SEQUENCE changes"))
            # A sequence counts what is rolled back, too.
            await connection.execute(
                text(
                    "CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                    "IF nextval('changes') = 1 THEN RAISE EXCEPTION USING ERRCODE = 'serialization_failure'; END IF; "
                    "RETURN NEW; END $$"
                )
            )
            await connection.execute(
                text(
                    "CREATE TRIGGER conflict BEFORE UPDATE ON ctxdb_demo_accounts "
                    "FOR EACH ROW EXECUTE FUNCTION conflict()"
                )
            )

        async def count() -> int:
            return int((await self.database.query("SELECT last_value FROM changes"))[0][0])

        return count

    @asynccontextmanager
    async def process(self, module: str, *arguments: str) -> AsyncIterator[Process]:
        """Run a job as its users do, until it ends by itself."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"ctxdb_demo.jobs.{module}",
            *arguments,
            env={**os.environ, "DATABASE_URL": self.database.url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            yield Process(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


WAITS = "wait_event_type = 'Lock'"


@pytest.fixture
async def bank(database: Database) -> AsyncIterator[Bank]:
    """A bank with the accounts of ada, bob and cy, of 100 each, for `ctxdb_demo.database.db`."""
    engine = database.watch_new()
    async with engine.begin() as connection:
        await connection.run_sync(domain.Base.metadata.create_all)
        await connection.execute(text("INSERT INTO ctxdb_demo_accounts VALUES ('ada', 100), ('bob', 100), ('cy', 100)"))
    await db.connect(database.url)
    async with db:
        try:
            yield Bank(database, engine)
            await database.assert_quiet()
        finally:
            await db.close()
            async with engine.begin() as connection:
                await connection.run_sync(domain.Base.metadata.drop_all)
            await engine.dispose()
