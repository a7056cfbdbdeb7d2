"""How many requests does the sidecar answer in a second of its CPU time, and what does its start take?"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import ClassVar

from benchmarks.clients import requests_per_second
from benchmarks.measure import Figure, end_progress, show_progress
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table
from benchmarks.sidecar import Sidecar, is_measurable, run_sidecar

_CLIENTS = 20
_PATHS = ("/master", "/replica", "/replicas_info", "/hosts")
# What pg-status answers.
_AIM = Aim(46_000, at_least=True)
_AIMED_AT = ("/master", "/replicas_info")
_LONGEST_START_SECONDS = Aim(0.4)
_STARTS = 5
_MARK = (
    "The mark is pg-status, the original in C, as measured apart from this run: 39,000 to 46,000 requests for /master "
    "in a CPU second, 10 MiB, 0.01 s for its start."
)


class SidecarRequests(Question):
    """The sidecar with asyncio's event loop and with uvloop, in turns."""

    name: ClassVar[str] = "sidecar"

    async def answer(self) -> list[Table]:
        """Measure, and return the tables."""
        notes = [_MARK]
        loops = ["asyncio"]
        if importlib.util.find_spec("uvloop") is None:
            notes.append("uvloop: not installed")
        else:
            loops.append("uvloop")
        if not is_measurable():
            notes.append("not measured: this system does not tell what another process takes")
            loops = []
        return [await self._over_http(loops, notes), await self._starts(loops)]

    async def _starts(self, loops: Sequence[str]) -> Table:
        rows = []
        for loop in loops:
            seconds: list[float] = []
            resident: list[float] = []
            for _ in range(_STARTS):
                async with self._ready(loop) as sidecar:
                    seconds.append(sidecar.cpu_seconds())
                    resident.append(sidecar.resident_mib())
            rows.append(Row(loop, median(resident), Figure.of(seconds), _LONGEST_START_SECONDS))
        title = "What the sidecar takes until it has asked its hosts"
        return Table(title, "MiB resident", "s of CPU", rows, absolute_digits=0, figure_digits=2)

    @asynccontextmanager
    async def _ready(self, loop: str) -> AsyncIterator[Sidecar]:
        async with run_sidecar(self.settings.url, uvloop=loop == "uvloop") as sidecar:
            # Until it has asked its hosts, it answers that it is not ready: no request succeeds.
            while not await requests_per_second(sidecar.port, "/ready", 1, 0.1):
                pass
            yield sidecar

    async def _over_http(self, loops: Sequence[str], notes: Sequence[str]) -> Table:
        rows: list[Row] = []
        for loop in loops:
            rows += await self._requests(loop)
        return Table(
            f"Requests that the sidecar answers in a second of its CPU time, {_CLIENTS} keep-alive connections",
            "MiB resident",
            "requests",
            rows,
            absolute_digits=0,
            figure_digits=0,
            notes=notes,
        )

    async def _requests(self, loop: str) -> list[Row]:
        rounds = self.settings.rounds_of(8, 3)
        seconds = 0.5 if self.settings.quick else 1.0
        label = f"requests to the sidecar, {loop}"
        figures: dict[str, list[float]] = {path: [] for path in _PATHS}
        try:
            async with self._ready(loop) as sidecar:
                for index in range(-1, rounds):
                    show_progress(label, index + 1, rounds)
                    for path in _PATHS:
                        before = sidecar.cpu_seconds()
                        rate = await requests_per_second(sidecar.port, path, _CLIENTS, seconds)
                        if index >= 0:
                            figures[path].append(rate * seconds / (sidecar.cpu_seconds() - before))
                resident = sidecar.resident_mib()
        finally:
            end_progress()
        return [
            Row(f"{loop}, {path}", resident, Figure.of(values), _AIM if path in _AIMED_AT else None)
            for path, values in figures.items()
        ]
