"""Grafana's dashboards, as the files that they are imported from, and the programs that such files are given to."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def needs(program: str) -> str:
    """Return where a program is; skip the test where it is not installed."""
    # The tests' own environment has some of these programs; Debian keeps those of servers outside of users' paths.
    found = shutil.which(program) or shutil.which(program, path=f"{Path(sys.executable).parent}:/usr/sbin")
    if found is None:
        pytest.skip(f"there is no {program}")
    return found


def expressions_of(dashboard: Path) -> Iterator[str]:
    """Yield every expression of the panels and the variables of a dashboard."""
    content = json.loads(dashboard.read_text(encoding="utf-8"))
    for panel in content["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in content["templating"]["list"]:
        query = variable["query"]
        yield query if isinstance(query, str) else query["query"]


def assert_panels_do_not_overlap(dashboard: Path) -> None:
    """Check that each panel has an identifier and a place of its own, within Grafana's 24 columns."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
