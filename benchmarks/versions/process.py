"""`Version`: a process that measures one version of ctxdb, and is asked for it from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.versions.meter import CALLGRIND_FILE, MARK

ROOT = Path(__file__).resolve().parents[2]
"""The working tree."""


class ComparisonError(Exception):
    """Two versions cannot be compared; the message says why."""


class Version:
    """A version that is being measured; made by `run_version`."""

    def __init__(self, name: str, process: subprocess.Popen[str], *, counts: bool) -> None:
        self.name = name
        self._process = process
        self._counts = counts
        self.pairs: Sequence[tuple[str, bool]] = ()
        """The names of the figures, and whether each is a share."""

    def start(self, tree: Path) -> None:
        """Wait until every application is running.

        Raises:
            ComparisonError: the process has ended, or measures another version than that in `tree`.
        """
        started = self._read()
        if not Path(started["version"]).is_relative_to(tree):
            raise ComparisonError(f"{self.name} is not what was imported, but {started['version']}.")
        self.pairs = [(name, is_share) for name, is_share in started["pairs"]]
        if self._counts:
            # Not from the beginning, as counting makes everything fifty times slower.
            command = ["callgrind_control", "--instr=on", str(self._process.pid)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def measure(self, pair: int) -> tuple[float, float]:
        """Return what a pair takes without ctxdb, and with it: in seconds of CPU, or in instructions.

        Raises:
            ComparisonError: the process has ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pair}\n")
        self._process.stdin.flush()
        without, by_ctxdb = self._read()
        return without, by_ctxdb

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ComparisonError(f"The process that measures {self.name} has ended: see above.")
        return json.loads(line)


@contextmanager
def run_version(name: str, tree: Path, url: str, *, callgrind_file: Path | None = None) -> Iterator[Version]:
    """Run the process of a version until the block ends.

    The packages are those of `tree`, the benchmarks and all that both depend on are those of the working tree.

    Args:
        name: what it is called.
        tree: the folder that has `packages`.
        url: the database.
        callgrind_file: where callgrind is to write what it counts; ``None`` measures CPU time.
    """
    sources = [str(path) for path in sorted(tree.glob("packages/*/src"))]
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sources),
        # Both have the same order of names in their sets.
        "PYTHONHASHSEED": "0",
        **({} if callgrind_file is None else {CALLGRIND_FILE: str(callgrind_file)}),
    }
    command = [sys.executable, "-m", "benchmarks.versions", url]
    if callgrind_file is not None:
        options = [f"--callgrind-out-file={callgrind_file}", f"--dump-before={MARK}", "--instr-atstart=no"]
        command = ["valgrind", "--tool=callgrind", "--quiet", *options, *command]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True
    ) as process:
        try:
            yield Version(name, process, counts=callgrind_file is not None)
        finally:
            # It ends when there is nothing left to read; leaving the outer block waits for that.
            process.communicate()
