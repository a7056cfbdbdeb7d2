"""The members of the workspace, as their files describe them."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from scripts import check_wheels

ROOT = check_wheels.ROOT


@dataclass(frozen=True)
class Import:
    """One import statement's module, and the names that it takes from there."""

    file: Path
    line: int
    module: str
    names: tuple[str, ...] = ()
    deferred: bool = False
    """Whether importing the file does without it: it is inside of a function, or for type checkers only."""

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        names = f" import {', '.join(self.names)}" if self.names else ""
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.module}{names}"


@dataclass(frozen=True)
class Member:
    """A member of the workspace, which is one distribution with one import package."""

    folder: Path

    @cached_property
    def pyproject(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        return str(self.pyproject["project"]["name"])

    @property
    def version(self) -> str:
        return str(self.pyproject["project"]["version"])

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")

    @property
    def sources(self) -> list[Path]:
        return sorted((self.folder / "src" / self.package).rglob("*.py"))

    @property
    def requirements(self) -> list[Requirement]:
        return [Requirement(text) for text in self.pyproject["project"].get("dependencies", ())]

    @property
    def extras(self) -> list[Requirement]:
        """What the package can use, and does without."""
        extras = self.pyproject["project"].get("optional-dependencies", {}).values()
        return [Requirement(text) for extra in extras for text in extra]

    def is_of_an_extra(self, module: str) -> bool:
        """Return whether a module is called as an extra, so that those who import it have what that names."""
        extras: dict[str, Any] = self.pyproject["project"].get("optional-dependencies", {})
        return module in {f"{self.package}.{extra}" for extra in extras}

    @property
    def pytest_plugins(self) -> set[str]:
        """The modules that pytest imports by itself; they need not declare it."""
        entry_points: dict[str, str] = self.pyproject["project"].get("entry-points", {}).get("pytest11", {})
        return set(entry_points.values())

    def module_of(self, source: Path) -> str:
        parts = source.relative_to(self.folder / "src").with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(source: Path) -> tuple[Import, ...]:
    """Return every import of a file, those inside of functions and of type-checking blocks among them."""
    return tuple(_imports_of(source))


def _imports_of(source: Path) -> Iterator[Import]:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    deferred = {id(inner) for outer in ast.walk(tree) if _is_deferred(outer) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, node.lineno, alias.name, deferred=id(node) in deferred)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno} is a relative import"
            names = tuple(alias.name for alias in node.names)
            yield Import(source, node.lineno, node.module or "", names, deferred=id(node) in deferred)


def _is_deferred(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not node.orelse
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def normalized(name: str) -> str:
    """Return a distribution's name as the packaging standards compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


MEMBERS = [Member(folder) for folder in check_wheels.members()]
PACKAGES = [member for member in MEMBERS if member.folder.parent.name == "packages"]
CORE = next(member for member in PACKAGES if member.name == "ctxdb-core")
