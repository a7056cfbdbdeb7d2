"""What a unit of work keeps: few attributes, each of which is explained where it is declared."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise

import pytest

from ctxdb_core._blocks.task_unit import TaskUnit
from ctxdb_core._units.generator_blocks import IteratedUnit
from ctxdb_core._units.request_unit import RequestUnit
from ctxdb_core.adapters import UnitOfWork
from ctxdb_core.asgi.http_exchange import HTTPExchange
from ctxdb_core.asgi.websocket_exchange import WebSocketExchange

MOST = 12
KINDS = (UnitOfWork, RequestUnit, TaskUnit, IteratedUnit, HTTPExchange, WebSocketExchange)
PARTS = sorted({part for kind in KINDS for part in kind.__mro__[:-1]}, key=lambda part: part.__name__)


def _body(part: type) -> list[ast.stmt]:
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    assert isinstance(definition, ast.ClassDef)
    return definition.body


def _stored(part: type) -> set[str]:
    """Return what objects of a class keep: what its body declares, and what its methods set on ``self``."""
    declared = {
        node.target.id
        for node in _body(part)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "ClassVar" not in ast.dump(node)
    }
    properties = {name for name, value in vars(part).items() if isinstance(value, property)}
    set_by_methods = {
        node.attr
        for statement in _body(part)
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return (declared | set_by_methods) - properties


def _explained(part: type) -> Iterator[str]:
    """Yield what is explained by a string that follows it, or in the docstring of the class."""
    yield from re.findall(r"\w+", part.__doc__ or "")
    for block in (_body(part), *(node.body for node in _body(part) if isinstance(node, ast.FunctionDef))):
        for statement, following in pairwise(block):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Attribute):
                        yield node.attr
                    elif isinstance(node, ast.Name):
                        yield node.id


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_unit_of_work_keeps_no_more_than_a_dozen_attributes(kind: type) -> None:
    kept = set().union(*map(_stored, kind.__mro__[:-1]))
    assert len(kept) <= MOST, sorted(kept)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_each_attribute_of_a_unit_of_work_is_explained(part: type) -> None:
    inherited = set().union(*map(_stored, part.__mro__[1:-1])) if len(part.__mro__) > 2 else set()
    explained = {name.lstrip("_") for name in _explained(part)}
    assert {name for name in _stored(part) - inherited if name.lstrip("_") not in explained} == set()


def test_a_plain_unit_of_work_keeps_nothing_that_only_http_needs() -> None:
    of_requests = _stored(RequestUnit) | set().union(*map(_stored, HTTPExchange.__mro__[:-1]))
    plain = set().union(*map(_stored, UnitOfWork.__mro__[:-1]))
    assert of_requests - plain >= {"origin", "calls", "phase", "response", "source", "server"}
