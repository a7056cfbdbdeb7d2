"""Clients of an application on a cluster: the answers that they got, and the payments that are stored in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
from fastapi import FastAPI
from tests.support.database import eventually

from ctxdb_demo.cluster_app import Payment
from ctxdb_pgstatus.testing import PostgresNode

CLIENTS = 8
PAUSE_SECONDS = 0.05
"""How long a client pauses between two payments: less than eight clients take to pay, so that some always are at it."""


@dataclass
class Traffic:
    """Each client pays, and reads what it paid, again and again."""

    app: FastAPI
    acknowledged: dict[str, float] = field(default_factory=dict)
    """When each payment was, on the monotonic clock."""
    refused: int = 0
    reads: int = 0
    failed_reads: int = 0
    stale: list[str] = field(default_factory=list)
    errors: set[int] = field(default_factory=set)

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Let the clients go on while the block runs, and end with what they are at."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._pay_and_read(number, over))
            try:
                yield
            finally:
                over.set()

    async def some_writes(self, number: int = 40) -> None:
        """Wait until so many more payments are acknowledged."""
        before = len(self.acknowledged)
        await eventually(lambda: len(self.acknowledged) >= before + number, lambda: f"too few writes: {self}", 60)

    async def some_reads(self, number: int = 40) -> None:
        """Wait until so many more payments have been read."""
        before = self.reads
        await eventually(lambda: self.reads >= before + number, lambda: f"too few reads: {self}", 60)

    async def some_refusals(self, number: int = 20) -> None:
        """Wait until so many more payments were refused."""
        before = self.refused
        await eventually(lambda: self.refused >= before + number, lambda: f"too few refusals: {self}", 60)

    async def lost_on(self, node: PostgresNode) -> set[str]:
        """Return the payments that were acknowledged and are not stored."""
        return self.acknowledged.keys() - await payments_on(node)

    def __str__(self) -> str:
        return (
            f"{len(self.acknowledged)} acknowledged, {self.refused} refused, {self.reads} read, "
            f"{self.failed_reads} reads failed, errors {self.errors}"
        )

    async def _pay_and_read(self, client: int, over: asyncio.Event) -> None:
        # An error that no handler answers is a 500 for clients.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://payments") as http:
            number = 0
            while not over.is_set():
                number += 1
                payment = f"{client}-{number}"
                response = await http.post("/payments", json={"id": payment, "amount": number})
                if response.status_code == 201:
                    self.acknowledged[payment] = time.monotonic()
                    await self._read(http, payment)
                else:
                    self.refused += 1
                    self.errors.add(response.status_code)
                # The monitor and what the test does to the hosts must get their turns of the event loop and the CPU.
                await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self, http: httpx.AsyncClient, payment: str) -> None:
        status = (await http.get(f"/payments/{payment}")).status_code
        if status == 404:
            self.stale.append(payment)
        elif status == 200:
            self.reads += 1
        else:
            self.failed_reads += 1
            self.errors.add(status)


async def payments_on(node: PostgresNode) -> set[str]:
    """Return the payments that a host has."""
    return {row["id"] for row in await node.execute(f"SELECT id FROM {Payment.__tablename__}")}
