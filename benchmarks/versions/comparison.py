"""`compare`: the figures of a revision beside those of the working tree, measured in turns."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import TypeAlias
from zipfile import ZipFile

from benchmarks.measure import Figure, end_progress, show_progress
from benchmarks.report import ComparisonRow, ComparisonTable
from benchmarks.versions.process import ROOT, ComparisonError, Version, run_version

_NOW = "working tree"

_Taken: TypeAlias = list[tuple[float, float]]
"""What a pair took in each round: without ctxdb, and with it."""


@dataclass(frozen=True)
class _Measure:
    name: str
    unit: str
    """What is told where something is added."""
    scale: float
    """How many of the unit are one second, or one instruction."""
    by_callgrind: bool


_CPU_TIME = _Measure("CPU time", "µs added", 1e6, by_callgrind=False)
_INSTRUCTIONS = _Measure("Instructions in user mode", "thousand added", 1e-3, by_callgrind=True)


def compare(revision: str, url: str, *, rounds: int, counted_rounds: int) -> Iterator[ComparisonTable]:
    """Measure a revision and the working tree; yield the tables: CPU time, and instructions where callgrind is.

    Args:
        revision: what git calls it.
        url: the database.
        rounds: how often each figure is measured in each version.
        counted_rounds: how often its instructions are counted, after a first time that does not count.

    Raises:
        ComparisonError: git does not know the revision, or one of the versions cannot be measured.
    """
    with _checked_out(revision) as tree:
        yield _compare(revision, tree, url, _CPU_TIME, rounds)
        if is_callgrind_there():
            yield _compare(revision, tree, url, _INSTRUCTIONS, counted_rounds)


def is_callgrind_there() -> bool:
    """Return whether instructions can be counted here."""
    return all(shutil.which(program) is not None for program in ("valgrind", "callgrind_control"))


@contextmanager
def _checked_out(revision: str) -> Iterator[Path]:
    """Provide a folder with the packages as they were at `revision`."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if commit.returncode:
        raise ComparisonError(f"git knows no revision {revision!r} here.")
    archive = subprocess.check_output([*git, "archive", "--format=zip", commit.stdout.strip(), "packages"])
    with tempfile.TemporaryDirectory(prefix="ctxdb-benchmarks-") as folder:
        with ZipFile(BytesIO(archive)) as files:
            files.extractall(folder)
        yield Path(folder)


def _compare(revision: str, tree: Path, url: str, measure: _Measure, rounds: int) -> ComparisonTable:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ctxdb-benchmarks-")))
        files = (folder / "before", folder / "now") if measure.by_callgrind else (None, None)
        before = stack.enter_context(run_version(revision, tree, url, callgrind_file=files[0]))
        now = stack.enter_context(run_version(_NOW, ROOT, url, callgrind_file=files[1]))
        taken = _take_turns(before, tree, now, measure.name, rounds)
    title = f"{measure.name} of ctxdb: a share of what hand-written code takes, or what is added to it"
    rows = _rows(before, taken, measure.unit, measure.scale)
    return ComparisonTable(title, before.name, now.name, rows, [_error_of(before, taken)])


def _take_turns(before: Version, tree: Path, now: Version, label: str, rounds: int) -> list[tuple[_Taken, _Taken]]:
    """Return what each pair took in the one version and in the other, after a round that only warms up."""
    before.start(tree)
    now.start(ROOT)
    if before.pairs != now.pairs:
        raise ComparisonError(f"{before.name} and {now.name} have other figures.")
    taken: list[tuple[_Taken, _Taken]] = [([], []) for _ in before.pairs]
    numbers = list(range(len(taken)))
    dice = random.Random(0)
    try:
        for index in range(-1, rounds):
            show_progress(label, index + 1, rounds)
            dice.shuffle(numbers)
            for number in numbers:
                versions = [(before, taken[number][0]), (now, taken[number][1])]
                # Both within a few milliseconds, so that what else the machine does hits both.
                dice.shuffle(versions)
                for version, notes in versions:
                    found = version.measure(number)
                    if index >= 0:
                        notes.append(found)
    finally:
        end_progress()
    return taken


def _rows(version: Version, taken: Sequence[tuple[_Taken, _Taken]], unit: str, scale: float) -> list[ComparisonRow]:
    rows = []
    for (name, is_share), (before, now) in zip(version.pairs, taken, strict=True):
        if is_share:
            shares = [[with_it / without for without, with_it in each] for each in (before, now)]
            ratio = Figure.of([new / old for old, new in zip(*shares, strict=True)])
            rows.append(ComparisonRow(name, "share", median(shares[0]), median(shares[1]), ratio))
        else:
            # The ratio of two small differences within one round says little.
            old, new = (median(with_it - without for without, with_it in each) * scale for each in (before, now))
            rows.append(ComparisonRow(name, unit, old, new, Figure.of([new / old])))
    return rows


def _error_of(version: Version, taken: Sequence[tuple[_Taken, _Taken]]) -> str:
    """Return a sentence on how exact the ratios of this run are."""
    ratios = [
        median(new / old for (old, _), (new, _) in zip(before, now, strict=True))
        for (_, is_share), (before, now) in zip(version.pairs, taken, strict=True)
        if is_share
    ]
    return f"Hand-written code, the same beside both, differed by {min(ratios):.3f} to {max(ratios):.3f}."
