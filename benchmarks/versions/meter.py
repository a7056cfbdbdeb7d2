"""What a block takes: seconds of CPU, or instructions."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Protocol

CALLGRIND_FILE = "CTXDB_BENCHMARKS_CALLGRIND_FILE"
"""The environment variable that tells a process where the callgrind that it runs under writes."""

MARK = "getloadavg"
"""A function of the C library at whose call callgrind writes down what was counted, and begins anew.

Python has a name for it, and nothing else of a benchmark calls it.
"""


class Meter(Protocol):
    """Measures what the process takes between two moments."""

    def start(self) -> None:
        """Begin to measure."""

    def stop(self) -> float:
        """Return what was taken since the start."""


class CPUMeter:
    """Seconds of CPU, in user and in system mode."""

    def start(self) -> None:
        """Begin to measure."""
        self._start = time.process_time()

    def stop(self) -> float:
        """Return what was taken since the start."""
        return time.process_time() - self._start


class InstructionMeter:
    """Instructions in user mode, in a process that runs under callgrind.

    Args:
        file: where callgrind writes: its ``--callgrind-out-file``. A number is added to that for each mark.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._marks = 0

    def start(self) -> None:
        """Begin to measure."""
        self._mark()

    def stop(self) -> float:
        """Return what was taken since the start."""
        dump = self._mark()
        found = re.search(r"^summary: (\d+)", dump.read_text(), re.MULTILINE)
        assert found is not None, f"{dump} has no summary"
        return int(found[1])

    def _mark(self) -> Path:
        os.getloadavg()
        self._marks += 1
        return Path(f"{self._file}.{self._marks}")


def meter_of_process() -> Meter:
    """Return what this process is to be measured by."""
    file = os.environ.get(CALLGRIND_FILE)
    return CPUMeter() if file is None else InstructionMeter(file)
