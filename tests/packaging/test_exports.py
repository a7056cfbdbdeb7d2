"""`__all__` of each package: all that is public, and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest
from tests.packaging.workspace import PACKAGES, Member

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
    offered = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and value is not annotations
    }
    assert offered == set(package.__all__)


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
