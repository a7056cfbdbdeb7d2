"""The soak: that it measures, and that it tells growth from none."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.soak import growth, plot, report

from ctxdb_pgstatus.testing import EmbeddedPostgres

ROOT = Path(__file__).parents[1]


async def test_a_soak_measures_the_process_under_load(postgres_server: EmbeddedPostgres, tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    soak = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.soak", "--minutes=0.02", "--clients=5", "--url", postgres_server.url()),
        *("--json", str(file)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(60):
        out, _ = await soak.communicate()
    assert "memory, MiB" in out.decode()
    found = json.loads(file.read_text())
    assert found["answers"]["as expected"] > 0
    assert all(sample["objects"] > 1000 for sample in found["samples"])


def test_growth_compares_the_last_quarter_with_the_second() -> None:
    assert growth([9, 9, 1, 1, 5, 5, 2, 2]) == (1, 2)


def test_a_plot_has_the_oldest_value_on_the_left() -> None:
    name, highest, *_, lowest = plot("things", [1, 2, 3])
    assert name == "things"
    assert highest.split("|") == ["       3.0 ", "  █"]
    assert lowest.split("|") == ["       1.0 ", "▁██"]


@pytest.mark.parametrize(("last", "is_steady"), [(100.0, True), (200.0, False)])
def test_the_report_tells_growth_from_none(last: float, is_steady: bool, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("memory, MiB", "descriptors", "tasks", "objects", "connections in use")
    samples = [dict.fromkeys(names, 100.0 if number < 6 else last) for number in range(8)]
    assert report(samples, Counter()) is is_steady
    assert ("IT GROWS" in capsys.readouterr().out) is not is_steady
