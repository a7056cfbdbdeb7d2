"""`__all__` of each package: all that is public, and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest
from tests.packaging.workspace import PACKAGES, Member

import ctxdb_core

members = pytest.mark.parametrize("member", PACKAGES, ids=lambda member: member.package)


@members
def test_all_is_sorted_and_names_what_is_there(member: Member) -> None:
    package = importlib.import_module(member.package)
    # Constants first, then classes, then functions: the order of the linter (RUF022).
    assert list(package.__all__) == sorted(set(package.__all__), key=lambda name: (not name.isupper(), name))
    assert [name for name in package.__all__ if name.startswith("_") or not hasattr(package, name)] == []


@members
def test_all_leaves_out_nothing_that_the_package_offers(member: Member) -> None:
    package = importlib.import_module(member.package)
    # Some names are imported at their first use.
    for name in package.__all__:
        getattr(package, name)
    offered = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and value is not annotations
    }
    assert offered == set(package.__all__)


@pytest.mark.parametrize("module", ["ctxdb_core.adapters", "ctxdb_core.events"])
def test_names_that_have_moved_go_on_working_with_a_warning_that_says_where_they_are(module: str) -> None:
    names = ctxdb_core._MOVED[module]
    assert names
    for name in names:
        assert name not in ctxdb_core.__all__
        with pytest.warns(DeprecationWarning, match=rf"ctxdb_core\.{name} has moved: import it from {module}\."):
            moved = getattr(ctxdb_core, name)
        assert moved is getattr(importlib.import_module(module), name)
        assert name in importlib.import_module(module).__all__


def test_a_name_that_was_never_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        ctxdb_core.nothing  # type: ignore[attr-defined]  # noqa: B018 - what is tested


@members
def test_public_modules_say_what_is_public(member: Member) -> None:
    package = importlib.import_module(member.package)
    for info in pkgutil.walk_packages(package.__path__, f"{member.package}."):
        if "._" in info.name:
            continue
        module = importlib.import_module(info.name)
        assert [name for name in module.__all__ if not hasattr(module, name)] == [], info.name


@members
def test_exported_objects_are_the_packages_own(member: Member) -> None:
    package = importlib.import_module(member.package)
    for name in package.__all__:
        exported = getattr(package, name)
        if isinstance(exported, type) or callable(exported):
            origin = getattr(exported, "__module__", member.package).partition(".")[0]
            assert origin in (member.package, "typing", "collections"), f"{name} comes from {origin}"
