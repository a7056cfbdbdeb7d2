"""A ledger: what each of many requests was answered, against what is in the database in the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

from tests.support.acts import ACTS, Act
from tests.support.adapters import Adapter
from tests.support.application import Reply, Stream, current_request
from tests.support.database import Database
from tests.support.desk import Desk
from tests.support.server import RawClient

# What clients do.
STAY, READ_SLOWLY, LEAVE_WAITING, LEAVE_READING, LEAVE_UPLOADING = MANNERS = (
    "stays",
    "reads slowly",
    "leaves before the response",
    "leaves behind its head",
    "leaves in the middle of its request",
)


@dataclass
class Entry:
    """One request: what it asks for, and what it was answered."""

    key: str
    act: Act
    manner: str
    luck: float
    """A number between 0 and 1, which decides what the act and the manner leave to chance."""
    status: int | None = None

    def __str__(self) -> str:
        return f"{self.key}, which {self.act.name}, luck {self.luck:.3f}; the client {self.manner}, got {self.status}"


@dataclass
class Ledger:
    """Many requests of many clients, their answers, and the contradictions between these and the database."""

    entries: dict[str, Entry]
    desk: Desk
    problems: list[str] = field(default_factory=list)

    @classmethod
    def draw(cls, requests: int, seed: str, adapter: Adapter, desk: Desk) -> Ledger:
        """Draw by chance what each request does; each act comes as often as the others."""
        chance = random.Random(seed)
        acts = [act for act in ACTS if adapter.has_background or not act.in_background]
        acts = [acts[number % len(acts)] for number in range(requests)]
        chance.shuffle(acts)
        entries: dict[str, Entry] = {}
        for number, act in enumerate(acts):
            key = f"{number:06}"
            [manner] = chance.choices(MANNERS, (7, 1, 1, 1, 10 if act.reads_request else 0))
            entries[key] = Entry(key, act, manner, chance.random())
        return cls(entries, desk)

    async def handle(self) -> Reply | Stream:
        """Do on the server what the entry of the request says."""
        entry = self.entries[current_request.get().query]
        return await entry.act.run(self.desk, entry.key, entry.luck)

    async def make_all_requests(self, base_url: str, clients: int) -> None:
        """Let `clients` clients at a time make the requests."""
        entries = iter(self.entries.values())
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(_make_requests(entries, base_url))

    async def compare(self, database: Database) -> None:
        """Find the requests whose answer does not agree with the database."""
        items, parents = set(await database.names("item")), set(await database.names("parent"))
        whole, desk = items & parents, self.desk
        for entry in self.entries.values():
            self._compare_answer(entry, entry.key in whole)
        self._note(items ^ parents, "only one row of two is there")
        self._note(whole - desk.written, "nobody wrote this")
        self._note(desk.kept - whole, "what was committed apart from the response is missing")
        self._note(desk.undone & whole, "what was rolled back apart from the response is there")
        self._note((whole & desk.to_announce) - desk.announced, "on_commit did not call back")
        self._note(desk.announced - whole, "on_commit called back for what is not there")

    def _compare_answer(self, entry: Entry, is_there: bool) -> None:
        if entry.status is None:
            if entry.manner not in (LEAVE_UPLOADING, LEAVE_WAITING):
                self._note({entry.key}, "there was no answer")
            return
        if entry.status not in entry.act.statuses:
            self._note({entry.key}, f"the answer is none of {sorted(entry.act.statuses)}")
        if entry.status < 400 and not is_there:
            self._note({entry.key}, "a success was answered, and the rows are missing")
        if entry.status >= 400 and is_there:
            self._note({entry.key}, "an error was answered, and the rows are there")

    def _note(self, keys: set[str], problem: str) -> None:
        self.problems.extend(f"{key!r}: {problem} (of {self.entries[key[:6]]})" for key in sorted(keys))


async def _make_requests(entries: Iterator[Entry], base_url: str) -> None:
    """Make one request after the other, on one connection as long as it lasts."""
    connections = AsyncExitStack()
    async with connections:
        client: RawClient | None = None
        for entry in entries:
            if client is None:
                client = await connections.enter_async_context(RawClient.connect(base_url))
            goes_on = False
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                goes_on = await _make_request(client, entry)
            if not goes_on:
                client = None
                await connections.aclose()


async def _make_request(client: RawClient, entry: Entry) -> bool:
    """Make one request, and return whether the connection can be used for another."""
    body = b"x" * 100
    if entry.manner == LEAVE_UPLOADING:
        await client.send(f"/?{entry.key}", "POST", body=body, length=200)
    else:
        await client.send(f"/?{entry.key}", "POST", body=body)
    if entry.manner in (LEAVE_UPLOADING, LEAVE_WAITING):
        await _let_others_go_on(int(entry.luck * 9973) % 100)
        client.abort()
        return False
    entry.status = await client.read_head()
    if entry.manner == LEAVE_READING:
        client.abort()
        return False
    if entry.manner == READ_SLOWLY:
        await _let_others_go_on(100)
    await client.read_body()
    # A server that gets an exception behind a response may close the connection under the next request.
    return client.keeps_alive and entry.status != 500 and not entry.act.in_background


async def _let_others_go_on(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
