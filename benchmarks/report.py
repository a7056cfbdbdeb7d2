"""The tables: figures beside their aims, as text and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.measure import Figure

_DISTRIBUTIONS = (
    "ctxdb-core",
    "ctxdb-pgstatus",
    "sqlalchemy",
    "asyncpg",
    "greenlet",
    "starlette",
    "fastapi",
    "litestar",
    "aiohttp",
    "uvicorn",
    "httptools",
    "uvloop",
    "context-async-sqlalchemy",
    "fastapi-async-sqlalchemy",
    "advanced-alchemy",
    "sqlalchemy-tx-context",
)


@dataclass(frozen=True)
class Aim:
    """What a figure should not exceed, or not stay below."""

    limit: float
    at_least: bool = False

    def is_met_by(self, figure: Figure) -> bool:
        """Return whether the median is on the right side."""
        return figure.median >= self.limit if self.at_least else figure.median <= self.limit


@dataclass(frozen=True)
class Row:
    """One contender's figure.

    Args:
        name: the contender.
        absolute: what it takes, or does, in all.
        figure: what the table is about; ``None`` for the contender that the others are compared with.
        aim: for the figure.
        remark: what one has to know to read the row.
    """

    name: str
    absolute: float
    figure: Figure | None = None
    aim: Aim | None = None
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """The answer to one question.

    Args:
        title: the question.
        absolute: the heading of the absolute numbers, with their unit.
        figure: the heading of the figures.
        rows: the contenders.
        absolute_digits: decimals of the absolute numbers.
        figure_digits: decimals of the figures.
        notes: lines below the table, for instance who is missing.
    """

    title: str
    absolute: str
    figure: str
    rows: Sequence[Row]
    absolute_digits: int = 1
    figure_digits: int = 3
    notes: Sequence[str] = field(default=())

    def __str__(self) -> str:
        head = ("", self.absolute, self.figure, "quartiles", "aim", "", "")
        # Names and remarks to the left, numbers to the right.
        return _lay_out(self.title, [head, *(self._cells(row) for row in self.rows)], (0, 5, 6), self.notes)

    def _cells(self, row: Row) -> tuple[str, ...]:
        absolute = f"{row.absolute:.{self.absolute_digits}f}"
        if row.figure is None:
            return (row.name, absolute, "", "", "", "", row.remark)
        digits = self.figure_digits
        figure = f"{row.figure.median:.{digits}f}"
        quartiles = f"{row.figure.low:.{digits}f} .. {row.figure.high:.{digits}f}"
        if row.aim is None:
            return (row.name, absolute, figure, quartiles, "", "", row.remark)
        aim = f"{'>=' if row.aim.at_least else '<='} {row.aim.limit:g}"
        return (
            row.name,
            absolute,
            figure,
            quartiles,
            aim,
            "met" if row.aim.is_met_by(row.figure) else "MISSED",
            row.remark,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the table as it goes into the JSON file."""
        data = asdict(self)
        for row, entry in zip(self.rows, data["rows"], strict=True):
            entry["met"] = None if row.aim is None or row.figure is None else row.aim.is_met_by(row.figure)
        return data


@dataclass(frozen=True)
class ComparisonRow:
    """One figure of two versions.

    Args:
        name: the figure.
        unit: what it counts.
        before: the figure of the version that is compared with.
        now: the figure of the working tree.
        ratio: the second as a share of the first.
    """

    name: str
    unit: str
    before: float
    now: float
    ratio: Figure


@dataclass(frozen=True)
class ComparisonTable:
    """Figures of two versions side by side.

    Args:
        title: what the figures are.
        before: the name of the version that is compared with.
        now: the name of the other one.
        rows: the figures.
        notes: lines below the table.
    """

    title: str
    before: str
    now: str
    rows: Sequence[ComparisonRow]
    notes: Sequence[str] = field(default=())

    def __str__(self) -> str:
        head = ("", "", self.before, self.now, "ratio", "quartiles")
        return _lay_out(self.title, [head, *(self._cells(row) for row in self.rows)], (0, 1), self.notes)

    def _cells(self, row: ComparisonRow) -> tuple[str, ...]:
        ratio = row.ratio
        quartiles = "" if ratio.low == ratio.high else f"{ratio.low:.3f} .. {ratio.high:.3f}"
        return (row.name, row.unit, f"{row.before:.3f}", f"{row.now:.3f}", f"{ratio.median:.3f}", quartiles)

    def as_json(self) -> dict[str, Any]:
        """Return the table as it goes into the JSON file."""
        return asdict(self)


def _lay_out(title: str, lines: Sequence[Sequence[str]], left: Collection[int], notes: Sequence[str]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [title, "=" * len(title)]
    for line in lines:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join([*text, *notes])


def environment() -> dict[str, str]:
    """Return what the figures depend on: the machine, Python, and the versions of all that takes part."""
    found = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
