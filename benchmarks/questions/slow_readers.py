"""How many quick requests get through beside slow readers, on a small pool?"""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

from benchmarks.clients import requests_per_second, slow_readers
from benchmarks.contenders import BASELINE
from benchmarks.measure import Figure, end_progress, show_progress
from benchmarks.questions._question import Question, load_all
from benchmarks.report import Aim, Row, Table
from benchmarks.server import POOL_SIZE, QUICK_PATH, SLOW_PATH, serve

_READERS = 30
_CLIENTS = 4
_AIM = Aim(0.90, at_least=True)
# Until the slow readers' responses have begun, where they do.
_SETTLING_SECONDS = 0.2
_RECOVERY_SECONDS = 5.0


class SlowReaders(Question):
    """A server for each contender; quick clients without slow readers and with them, in turns."""

    name: ClassVar[str] = "slow-readers"

    async def answer(self) -> list[Table]:
        """Measure, and return the table."""
        contenders, missing = load_all(
            (
                BASELINE,
                "ctxdb",
                "hand-written middleware",
                "FastAPI yield dependency",
                "context-async-sqlalchemy",
                "context-async-sqlalchemy (http)",
                "fastapi-async-sqlalchemy",
                "advanced-alchemy",
                "sqlalchemy-tx-context",
            )
        )
        rounds = self.settings.rounds_of(6, 2)
        seconds = 0.25 if self.settings.quick else 0.6
        without: dict[str, list[float]] = {name: [] for name in contenders}
        beside: dict[str, list[float]] = {name: [] for name in contenders}
        try:
            async with serve(list(contenders), self.settings.url) as ports:
                for index in range(rounds):
                    for name, port in ports.items():
                        show_progress(f"quick requests beside slow readers, {name}", index, rounds)
                        await _recover(port)
                        # Now the one first, now the other.
                        for crowded in (False, True) if index % 2 else (True, False):
                            if crowded:
                                async with slow_readers(port, SLOW_PATH, _READERS):
                                    await asyncio.sleep(_SETTLING_SECONDS)
                                    beside[name].append(await requests_per_second(port, QUICK_PATH, _CLIENTS, seconds))
                                await _recover(port)
                            else:
                                without[name].append(await requests_per_second(port, QUICK_PATH, _CLIENTS, seconds))
                show_progress("quick requests beside slow readers", rounds, rounds)
        finally:
            end_progress()
        rows = []
        for name, contender in contenders.items():
            pairs = zip(beside[name], without[name], strict=True)
            share = Figure.of([there / alone for there, alone in pairs])
            remark = f"{Figure.of(beside[name]).median:.0f} a second beside slow readers" + (
                f"; {contender.remark}" if contender.remark else ""
            )
            rows.append(Row(name, Figure.of(without[name]).median, share, _AIM if name == "ctxdb" else None, remark))
        return [
            Table(
                f"Quick requests a second beside {_READERS} slow readers on a pool of {POOL_SIZE}: share of the same "
                "without slow readers",
                "alone",
                "share",
                rows,
                absolute_digits=0,
                figure_digits=2,
                notes=missing,
            )
        ]


async def _recover(port: int) -> None:
    """Wait until the server answers quickly again: the round before may have left it with a full pool."""
    deadline = time.monotonic() + _RECOVERY_SECONDS
    while time.monotonic() < deadline:
        if await requests_per_second(port, QUICK_PATH, 1, 0.05) > 100:
            return
