"""The page of errors has an entry for each error that a user can meet."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

from tests.packaging.workspace import PACKAGES

from ctxdb_core import CtxDBError

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")


def public_errors() -> set[str]:
    """Return the names of all errors that a package exports, from itself or from a public module."""
    found = set()
    for member in PACKAGES:
        package = importlib.import_module(member.package)
        modules = [package]
        for info in pkgutil.walk_packages(package.__path__, f"{member.package}."):
            if "._" not in info.name:
                modules.append(importlib.import_module(info.name))
        exported = [getattr(module, name) for module in modules for name in module.__all__]
        found |= {value.__name__ for value in exported if isinstance(value, type) and issubclass(value, CtxDBError)}
    return found


def test_each_error_of_ctxdb_has_an_entry() -> None:
    entries = re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)
    assert sorted(public_errors() - set(entries)) == []
