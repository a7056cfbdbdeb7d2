"""How fast does a `HostMonitor` answer which host is which?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from benchmarks.measure import Figure, end_progress, show_progress
from benchmarks.questions._question import Question
from benchmarks.report import Aim, Row, Table
from ctxdb_pgstatus import HostMonitor
from ctxdb_pgstatus.testing import EmbeddedPostgresError, PostgresCluster

# Millions.
_AIM = Aim(1, at_least=True)
_TIMES = 100_000
_TITLE = "Asking a HostMonitor which host is which: millions of answers per second of CPU"


class MonitorLookup(Question):
    """Its answers in a loop, the loop included, beside a primary and two replicas that it polls meanwhile."""

    name: ClassVar[str] = "monitor"

    async def answer(self) -> list[Table]:
        """Measure, and return the table."""
        try:
            return [await self._measure()]
        except EmbeddedPostgresError as exc:
            return [Table(_TITLE, "", "", (), notes=[str(exc)])]

    async def _measure(self) -> Table:
        rates: dict[str, list[float]] = {}
        async with PostgresCluster(standbys=2) as cluster:
            await cluster.wait_for_replay()
            async with HostMonitor(cluster.hosts, port=cluster.port, user="postgres") as monitor:
                # Plain calls; what is awaited comes after them.
                questions: dict[str, Callable[[], object]] = {
                    "master()": monitor.master,
                    "replica()": monitor.replica,
                    "sync_by_time()": monitor.sync_by_time,
                    "sync_by_time_and_bytes()": monitor.sync_by_time_and_bytes,
                    "hosts()": monitor.hosts,
                }
                rounds = self.settings.rounds_of(40, 10)
                for index in range(-1, rounds):
                    show_progress("asking the monitor", index + 1, rounds)
                    for name, question in questions.items():
                        rate = _TIMES / _seconds_of(question)
                        if index >= 0:
                            rates.setdefault(name, []).append(rate / 1e6)
                    # Its polls go on.
                    await monitor.poll()
                awaited: list[float] = []
                for _ in range(rounds):
                    start = time.process_time()
                    for _ in range(_TIMES):
                        await monitor.find_master()
                    awaited.append(_TIMES / (time.process_time() - start) / 1e6)
                rates["await find_master()"] = awaited
                end_progress()
        rows = []
        for name, values in rates.items():
            figure = Figure.of(values)
            rows.append(Row(name, 1000 / figure.median, figure, _AIM))
        return Table(_TITLE, "ns of CPU", "million/s", rows, absolute_digits=0, figure_digits=2)


def _seconds_of(question: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(_TIMES):
        question()
    return time.process_time() - start
