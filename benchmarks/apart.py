"""Blocks of work that each run in a process of their own, as an application does that has one way to its sessions.

Since Python 3.11, CPython specialises each instruction for the types that it has seen (PEP 659). In one process,
contenders with sessions and engines of different classes take that from each other, each time that they take turns.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import TypeAlias

from benchmarks.measure import Block, measure
from benchmarks.processes import run_processes

OpenBlocks: TypeAlias = Callable[[], AbstractAsyncContextManager[Mapping[str, Block]]]
"""Opens what blocks need, and provides them by their names. A function of a module, perhaps with arguments bound."""


class Apart:
    """The process of some blocks; made by `run_apart`."""

    def __init__(self, name: str, connection: Connection[str, float | None]) -> None:
        self._name = name
        self._connection = connection

    def wait(self) -> None:
        """Wait until the blocks are open.

        Raises:
            RuntimeError: the process has ended.
        """
        self._receive()

    async def measure(self, block: str) -> float:
        """Return the seconds of CPU that one piece of a block takes.

        Raises:
            RuntimeError: the process has ended.
        """
        # asyncio turns a first Ctrl-C into a cancellation, which comes when the event loop has its turn.
        await asyncio.sleep(0)
        seconds = self._receive(asked=block)
        assert seconds is not None
        return seconds

    def _receive(self, asked: str | None = None) -> float | None:
        try:
            if asked is not None:
                self._connection.send(asked)
            return self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"The process of {self._name} has ended: see above.") from None


@contextmanager
def run_apart(openers: Mapping[str, OpenBlocks]) -> Iterator[Mapping[str, Apart]]:
    """Run a process for the blocks of each opener until the block ends.

    Raises:
        RuntimeError: one of them cannot open its blocks.
    """
    with run_processes(_run, {name: (open_blocks,) for name, open_blocks in openers.items()}) as connections:
        processes = {name: Apart(name, connection) for name, connection in connections.items()}
        for process in processes.values():
            process.wait()
        yield processes


def _run(open_blocks: OpenBlocks, connection: Connection[float | None, str]) -> None:
    asyncio.run(_measure_what_is_asked_for(open_blocks, connection))


async def _measure_what_is_asked_for(open_blocks: OpenBlocks, connection: Connection[float | None, str]) -> None:
    async with open_blocks() as blocks:
        # What is alive by now stays so: the collections that the blocks cause shall not look at it again and again.
        gc.collect()
        gc.freeze()
        connection.send(None)
        while True:
            try:
                # The loop has nothing else to do while it is blocked here.
                name = connection.recv()
            except EOFError:
                return
            connection.send(await measure(blocks[name]))
