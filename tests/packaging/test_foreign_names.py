"""Private names of other libraries: where the packages touch them, read from the sources.

A name that a module of the workspace defines as well counts as the workspace's own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.packaging.workspace import PACKAGES

PRIVATE = "ctxdb_core._sqlalchemy.private"

# What is touched outside of the one module for SQLAlchemy, and why it may be.
ALLOWED = {
    # Public in spite of their names (Python docs, "sys" and "collections").
    "_getframe": {"acquiring_code", "second_connections", "generator_blocks", "scheduler_jobs"},
    "_asdict": {"status"},
    # aiohttp has no public names for these; each is tested against the versions that the adapter supports.
    "_compress": {"writer"},
    "_cookies": {"response"},
    "_payload_writer": {"response"},
    "_req": {"response"},
    # Of a class that the module derives from SQLAlchemy's.
    "_rowbuffer": {"cursors"},
}


def _defined(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a module of the workspace defines itself, slots among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_of_other_libraries_are_touched_in_the_module_for_them_alone() -> None:
    trees = {
        (member.module_of(source), source): ast.parse(Path(source).read_text(encoding="utf-8"))
        for member in PACKAGES
        for source in member.sources
    }
    own = {name for tree in trees.values() for name in _defined(tree)}
    found: dict[str, set[str]] = {}
    for (module, _), tree in trees.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and node.attr not in own
                and module != PRIVATE
            ):
                found.setdefault(node.attr, set()).add(module.rpartition(".")[2])
    assert found == ALLOWED
