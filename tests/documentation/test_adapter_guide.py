"""The adapter in docs/adapters.md is the one that passes the scenarios."""

from __future__ import annotations

import re
from pathlib import Path

from tests.packaging.workspace import imports_of

import ctxdb_core

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "examples" / "adapters" / "ctxdb_quart.py"


def test_the_guide_shows_the_adapter_from_beginning_to_end() -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    section = page.partition("\n## A complete one\n")[2].partition("\n### In use\n")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert blocks
    assert "\n\n".join(blocks) == ADAPTER.read_text(encoding="utf-8"), "change the page and the file alike"


def test_the_adapter_needs_public_names_of_the_core_only() -> None:
    imports = [found for found in imports_of(ADAPTER) if found.root == "ctxdb_core"]
    assert imports
    for found in imports:
        assert found.module == "ctxdb_core"
        assert set(found.names) <= set(ctxdb_core.__all__)
