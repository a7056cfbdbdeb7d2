"""Build the site of docs/: ``uv run --group docs python scripts/build_docs.py FOLDER``.

Nothing is fetched: all that the site shows is in the repository and in the packages of the group ``docs``. A warning is
an error; a link that leads nowhere is one. An earlier site in FOLDER is replaced; a folder with other files is refused.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path

# Material announces a fork of mkdocs at each start; the group holds mkdocs below the version that it speaks of.
os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parent.parent

LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*\brel=["']?(?:canonical|prev|next))[^>]*\shref=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import\s+["'](?:https?:)?//""",
    re.IGNORECASE,
)
"""What makes a browser ask another host while it shows a page."""

THIRD_PARTY = re.compile(r"https://(?:unpkg\.com|cdn\.jsdelivr\.net|fonts\.g\w+\.com)[^\s\"'`)]*")
"""What the theme's scripts would fetch for features that this site does not use."""


def main() -> int:
    """Build the site and return the exit status."""
    parser = argparse.ArgumentParser(description="Build the site of docs/.")
    parser.add_argument("folder", type=Path, help="where to put it")
    folder: Path = parser.parse_args().folder.resolve()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "llms.txt").exists():
        print(f"{folder} is not empty, and holds no site that this script has built.", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        build(load_config("mkdocs.yml", site_dir=str(folder)))
    except Abort as error:
        print(f"The site is not built: {error}", file=sys.stderr)
        return 1
    for script in folder.rglob("*.js"):
        text = script.read_text(encoding="utf-8")
        if THIRD_PARTY.search(text):
            script.write_text(THIRD_PARTY.sub("about:blank", text), encoding="utf-8")
    foreign = sorted(loads_from_elsewhere(folder))
    for line in foreign:
        print(f"loads from elsewhere: {line}", file=sys.stderr)
    if not foreign:
        print(f"{folder / 'index.html'}: {len(list(folder.rglob('*.html')))} pages")
    return 1 if foreign else 0


def loads_from_elsewhere(folder: Path) -> set[str]:
    """Return what the pages and styles of a site would have a browser fetch from other hosts."""
    return {
        f"{file.relative_to(folder)}: {found[0]}"
        for pattern in ("*.html", "*.css")
        for file in folder.rglob(pattern)
        for found in LOADED.finditer(file.read_text(encoding="utf-8"))
    }


if __name__ == "__main__":
    sys.exit(main())
