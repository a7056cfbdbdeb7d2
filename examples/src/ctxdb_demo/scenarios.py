"""What is asked of the bank over HTTP, and what must have become of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx

from ctxdb_demo.demo_database import AUDIT, TRANSFERS, Contents, DemoDatabase
from ctxdb_demo.domain import RATE_SERVICE_SECONDS, STATEMENT_PAGE_BYTES, STATEMENT_PAGES
from ctxdb_demo.probe import Hold, held_seconds, most_at_once

__all__ = ["SCENARIOS", "SEED", "Outcome", "Scenario", "connect", "play"]

SEED = {"alice": 80, "bob": 60}
"""The accounts that there are at first, and their balances."""

REQUEST_TIMEOUT_SECONDS = 30.0
SLOW_READER_BUFFER_BYTES = 16 * 1024
SLOW_READER_CHUNK_BYTES = 256 * 1024
SLOW_READER_PAUSE_SECONDS = 0.02
SLOW_READER_SECONDS = STATEMENT_PAGES * STATEMENT_PAGE_BYTES // SLOW_READER_CHUNK_BYTES * SLOW_READER_PAUSE_SECONDS


@dataclass(frozen=True)
class Scenario:
    """One request, and what must be so when it is over."""

    title: str
    promise: str
    """What the reader is to see, in a few words."""
    method: str
    path: str
    status: int
    """The response's status."""
    connections: int
    """How many times a connection is taken from the pool."""
    json: Any = None
    changes: Mapping[str, int] = field(default_factory=dict)
    """By how much the balances and the numbers of rows change."""
    at_once: int = 1
    """How many connections are held at the same time, at most."""
    seconds_without: float = 0.0
    """For how much of the request's time, at least, no connection may be held; half of what it spends elsewhere."""
    slow_reader: bool = False
    """Whether the client takes its time with the response."""

    @property
    def request(self) -> str:
        """The request in one line, as HTTP tools write it."""
        return f"{self.method} {self.path}"


SCENARIOS = (
    Scenario(
        title="simple write",
        promise="committed before the response leaves",
        method="POST",
        path="/accounts",
        json={"owner": "carol", "balance": 20},
        status=201,
        changes={"carol": 20},
        connections=1,
    ),
    Scenario(
        title="two functions, one transaction",
        promise="withdraw() and deposit() share one session",
        method="POST",
        path="/transfers",
        json={"source": "alice", "target": "bob", "amount": 30},
        status=201,
        changes={"alice": -30, "bob": 30, TRANSFERS: 1},
        connections=1,
    ),
    Scenario(
        title="early commit",
        promise="the third deposit is refused, the others stay",
        method="POST",
        path="/accounts/carol/deposits",
        json=[10, 20, -5],
        status=422,
        changes={"carol": 30},
        connections=2,
    ),
    Scenario(
        title="early close",
        promise="no connection is held during long work",
        method="POST",
        path="/accounts/alice/interest",
        status=204,
        changes={"alice": 5},
        connections=2,
        seconds_without=RATE_SERVICE_SECONDS / 2,
    ),
    Scenario(
        title="audit log in a second session",
        promise="one entry before, one on_commit",
        method="POST",
        path="/withdrawals",
        json={"owner": "bob", "amount": 50},
        status=201,
        changes={"bob": -50, AUDIT: 2},
        connections=3,
    ),
    Scenario(
        title="roll-back by exception",
        promise="raised after the withdrawal; the audit stays",
        method="POST",
        path="/withdrawals",
        json={"owner": "bob", "amount": 25},
        status=500,
        changes={AUDIT: 1},
        connections=2,
    ),
    Scenario(
        title="roll-back by status",
        promise="the handler returns a 422: nobody is paid",
        method="POST",
        path="/salaries",
        json={"alice": 5, "eve": 5},
        status=422,
        connections=1,
    ),
    Scenario(
        title="concurrent sessions",
        promise="three transactions at once, in one request",
        method="POST",
        path="/bonus",
        json={"amount": 1},
        status=200,
        changes={"alice": 1, "bob": 1, "carol": 1},
        connections=4,
        at_once=3,
    ),
    Scenario(
        title="a commit that fails",
        promise="by a deferred foreign key: no 201 is sent",
        method="POST",
        path="/transfers",
        json={"source": "bob", "target": "eve", "amount": 10},
        status=409,
        connections=1,
    ),
    Scenario(
        title="a slow reader",
        promise="its connection is back before the download",
        method="GET",
        path="/accounts/alice/statement",
        status=200,
        connections=1,
        seconds_without=SLOW_READER_SECONDS / 2,
        slow_reader=True,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one scenario."""

    scenario: Scenario
    status: int
    before: Contents
    after: Contents
    seconds: float
    """From the request's start to the last byte of its response."""
    holds: list[Hold]
    """Each time that a connection was out of the pool, until the response was there."""
    held_seconds: float
    """How much of the time at least one connection was held."""
    held_at_first_byte: int
    """How many connections were held when the response began to arrive."""

    def broken_promises(self) -> list[str]:
        """Return what is not as it must be, a sentence each."""
        scenario = self.scenario
        broken: list[str] = []
        if self.status != scenario.status:
            broken.append(f"The status is {self.status} instead of {scenario.status}.")
        changes = {
            name: self.after.get(name, 0) - self.before.get(name, 0)
            for name in (*self.before, *self.after)
            if self.after.get(name, 0) != self.before.get(name, 0)
        }
        if changes != dict(scenario.changes):
            broken.append(f"The database changed by {changes or 'nothing'} instead of {scenario.changes or 'nothing'}.")
        if len(self.holds) != scenario.connections:
            broken.append(f"A connection was taken {len(self.holds)} times instead of {scenario.connections}.")
        if most_at_once(self.holds) != scenario.at_once:
            broken.append(f"{most_at_once(self.holds)} connections were held at once instead of {scenario.at_once}.")
        if self.held_at_first_byte:
            broken.append(f"{self.held_at_first_byte} connections were still held when the response began.")
        if self.seconds - self.held_seconds < scenario.seconds_without:
            broken.append(
                f"No connection was held for {self.seconds - self.held_seconds:.3f} s instead of at least "
                f"{scenario.seconds_without:.3f} s."
            )
        return broken


@asynccontextmanager
async def connect(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Open an HTTP client for the length of a block."""
    transport = httpx.AsyncHTTPTransport(
        # What a slow reader leaves unread must stay with the server, not in a buffer of this side.
        socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_READER_BUFFER_BYTES)]
    )
    # `trust_env`: no proxy of the environment comes between.
    async with httpx.AsyncClient(
        base_url=base_url, transport=transport, timeout=REQUEST_TIMEOUT_SECONDS, trust_env=False
    ) as client:
        yield client


async def play(scenario: Scenario, client: httpx.AsyncClient, database: DemoDatabase, holds: list[Hold]) -> Outcome:
    """Send the scenario's request, read its response, and compare the database before and after.

    Args:
        scenario: what to do.
        client: speaks to the application.
        database: what the application works on, seen from outside.
        holds: what `watch_pool` yields for the application's engine; nothing else may use it meanwhile.

    Raises:
        httpx.HTTPError: there is no response.
    """
    before = await database.contents()
    holds.clear()
    start = perf_counter()
    async with client.stream(scenario.method, scenario.path, json=scenario.json) as response:
        held_at_first_byte = sum(hold.end is None for hold in holds)
        async for _ in response.aiter_raw(SLOW_READER_CHUNK_BYTES):
            if scenario.slow_reader:
                await asyncio.sleep(SLOW_READER_PAUSE_SECONDS)
    end = perf_counter()
    return Outcome(
        scenario=scenario,
        status=response.status_code,
        before=before,
        after=await database.contents(),
        seconds=end - start,
        holds=list(holds),
        held_seconds=held_seconds(holds, until=end),
        held_at_first_byte=held_at_first_byte,
    )
