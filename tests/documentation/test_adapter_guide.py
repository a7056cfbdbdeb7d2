"""The adapter in docs/adapters.md is the one that passes the scenarios."""

from __future__ import annotations

import re
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
from tests.packaging.workspace import imports_of

from ctxdb_core import phases
from ctxdb_core.adapters import Phase

ROOT = Path(__file__).parents[2]
PAGES_OF_PHASES = ["adapters.md", "lifecycle.md"]
ADAPTER = ROOT / "examples" / "adapters" / "ctxdb_quart.py"


def test_the_guide_shows_the_adapter_from_beginning_to_end() -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    section = page.partition("\n## A complete one\n")[2].partition("\n### In use\n")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert blocks
    assert "\n\n".join(blocks) == ADAPTER.read_text(encoding="utf-8"), "change the page and the file alike"


def test_the_adapter_needs_public_names_of_the_core_only() -> None:
    imports = [found for found in imports_of(ADAPTER) if found.root == "ctxdb_core"]
    assert {found.module for found in imports} == {"ctxdb_core", "ctxdb_core.adapters"}
    for found in imports:
        assert set(found.names) <= set(import_module(found.module).__all__)


@pytest.mark.parametrize("page", PAGES_OF_PHASES)
def test_a_page_shows_the_phases_as_the_core_does(page: str) -> None:
    assert phases.__doc__ is not None
    shown = picture_in(phases.__doc__)
    assert all(phase.name in "\n".join(shown) for phase in Phase)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert picture_in(text.partition("```text\n")[2].partition("```")[0]) == shown


@pytest.mark.parametrize("page", PAGES_OF_PHASES)
def test_a_page_says_of_each_phase_what_it_is(page: str) -> None:
    table = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n| phase |")[2].partition("\n\n")[0]
    named = re.findall(r"`([A-Z]+)`", "\n".join(line.split(" | ")[0] for line in table.splitlines() if line[:1] == "|"))
    assert sorted(named) == sorted(phase.name for phase in Phase)


def picture_in(text: str) -> list[str]:
    """Return the lines of the picture of the phases, from its top to `AFTER`, without their indentation."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if "answer, once" in line)
    last = next(number for number, line in enumerate(lines) if line.strip() == "AFTER")
    return textwrap.dedent("\n".join(lines[first : last + 1])).splitlines()
