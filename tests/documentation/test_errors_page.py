"""The page of errors has an entry for each error that a user can meet."""

from __future__ import annotations

import importlib
import pkgutil
import re
from email.message import Message
from pathlib import Path

import pytest
from tests.packaging.workspace import PACKAGES

from ctxdb_core import CtxDBError, NoSessionError, errors

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")


def public_errors() -> list[type[CtxDBError]]:
    """Return all errors that a package exports, from itself or from a public module."""
    found: set[type[CtxDBError]] = set()
    for member in PACKAGES:
        package = importlib.import_module(member.package)
        modules = [package]
        for info in pkgutil.walk_packages(package.__path__, f"{member.package}."):
            if "._" not in info.name:
                modules.append(importlib.import_module(info.name))
        exported = [getattr(module, name) for module in modules for name in module.__all__]
        found |= {value for value in exported if isinstance(value, type) and issubclass(value, CtxDBError)}
    return sorted(found, key=lambda error: error.__name__)


def test_each_error_of_ctxdb_has_an_entry() -> None:
    entries = re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)
    assert sorted({error.__name__ for error in public_errors()} - set(entries)) == []


@pytest.mark.parametrize("error", public_errors(), ids=lambda error: error.__name__)
def test_the_text_of_an_error_ends_in_the_address_of_its_entry(error: type[CtxDBError]) -> None:
    raised = error.__new__(error, "What has happened.")
    Exception.__init__(raised, "What has happened.")
    assert str(raised).endswith(f" (See ctxdb's docs/errors.md#{error.__name__.lower()})")


def test_an_error_of_an_application_that_derives_from_an_error_of_ctxdb_has_the_address_of_its_base() -> None:
    class ShopError(NoSessionError):
        pass

    assert str(ShopError("No shop.")) == "No shop. (See ctxdb's docs/errors.md#nosessionerror)"


def test_an_error_leads_to_the_site_that_the_distribution_names(monkeypatch: pytest.MonkeyPatch) -> None:
    named = Message()
    named["Project-URL"] = "Documentation, https://docs.example/ctxdb/"
    monkeypatch.setattr(errors, "metadata", lambda name: named)
    errors._errors_page.cache_clear()
    try:
        assert str(CtxDBError("It fails.")) == "It fails. (See https://docs.example/ctxdb/errors.html#ctxdberror)"
    finally:
        errors._errors_page.cache_clear()
