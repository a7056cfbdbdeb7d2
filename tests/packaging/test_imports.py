"""Which package may import which: read from the sources, as the shared environment would let anything pass."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions

import pytest
from tests.packaging.workspace import CORE, MEMBERS, PACKAGES, Import, Member, imports_of, normalized

# The rooms of the core, each of which may import those before it and itself. CONTRIBUTING.md tells what lies in them.
ROOMS = (
    {"errors", "_shield", "_signatures", "_wording", "phases", "policy"},
    {"_sqlalchemy"},
    {"_transactions"},
    {"_databases", "events"},
    {"_units"},
    {"_blocks"},
    {"_telemetry", "asgi", "testing", "adapters"},
    {"logs", "otel", "prometheus", "sentry"},
)

STDLIB = sys.stdlib_module_names | {"annotationlib"}
"""The modules of the standard library, with those that came after the oldest Python that is supported."""

BY_NAME = {member.name: member for member in MEMBERS}
# The installed metadata does not tell which packages an editable member has.
DISTRIBUTIONS = {
    package: {normalized(name) for name in names} for package, names in packages_distributions().items()
} | {member.package: {member.name} for member in MEMBERS}


def _foreign(imports: Iterable[Import], allowed: set[str]) -> list[str]:
    return [str(found) for found in imports if found.root not in STDLIB | allowed]


def _imports(member: Member) -> list[Import]:
    return [
        found
        for source in member.sources
        if member.module_of(source) not in member.pytest_plugins
        for found in imports_of(source)
    ]


def _declared(member: Member) -> set[str]:
    """Return what a member may rely on: its requirements, and with those on other members theirs."""
    names = {normalized(member.name)}
    for requirement in member.requirements:
        names.add(normalized(requirement.name))
        if requirement.name == "sqlalchemy" and "asyncio" in requirement.extras:
            # All that the extra consists of; and what SQLAlchemy itself depends on.
            names |= {"greenlet", "typing-extensions"}
        if requirement.name in BY_NAME:
            names |= _declared(BY_NAME[requirement.name])
    return names


def _is_allowed_extra(found: Import, member: Member) -> bool:
    """Return whether an extra is imported by a function that needs it, or by the module that is there for it."""
    return (found.deferred or member.is_of_an_extra(member.module_of(found.file))) and _is_extra(found, member)


def _is_extra(found: Import, member: Member) -> bool:
    extras = {normalized(requirement.name) for requirement in member.extras}
    return bool(DISTRIBUTIONS.get(found.root, set()) & extras)


def test_the_core_imports_sqlalchemy_and_nothing_else() -> None:
    # `sqlalchemy[asyncio]` brings these along; `typing_extensions` is for type checkers alone. What is an extra is
    # imported by the functions that need it, or by a module of its own.
    imports = [found for found in _imports(CORE) if not _is_allowed_extra(found, CORE)]
    assert _foreign(imports, {"sqlalchemy", "greenlet", "typing_extensions", "ctxdb_core"}) == []


def test_the_core_is_imported_without_its_extras() -> None:
    extras = sorted({found.root for found in _imports(CORE) if _is_extra(found, CORE)})
    assert extras, "the core has no extras: this test is for nothing"
    block = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import ctxdb_core, ctxdb_core.asgi"
    subprocess.run([sys.executable, "-c", block], check=True)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_each_imported_package_is_a_declared_dependency(member: Member) -> None:
    declared = _declared(member)
    undeclared = [
        str(found)
        for found in _imports(member)
        if found.root not in STDLIB
        and not DISTRIBUTIONS.get(found.root, set()) & declared
        and not _is_allowed_extra(found, member)
    ]
    assert undeclared == []


@pytest.mark.parametrize("member", [member for member in MEMBERS if member is not CORE], ids=lambda member: member.name)
def test_only_public_names_of_the_core_are_used(member: Member) -> None:
    own_public_modules = {
        "ctxdb_core",
        "ctxdb_core.adapters",
        "ctxdb_core.asgi",
        "ctxdb_core.testing",
        "ctxdb_core.testing.postgres",
    }
    private = []
    for found in _imports(member):
        if found.root != "ctxdb_core":
            continue
        if found.module not in own_public_modules or not set(found.names) <= _public_names(found.module):
            private.append(str(found))
    assert private == []


def _graph(member: Member) -> dict[str, set[str]]:
    """Return which modules of a member import which others, also for types alone and inside of functions."""
    modules = {member.module_of(source) for source in member.sources}
    graph: dict[str, set[str]] = {}
    for found in _all_imports(member):
        module = member.module_of(found.file)
        targets = {f"{found.module}.{name}" for name in found.names} & modules or {found.module} & modules
        graph.setdefault(module, set()).update(targets - {module})
    return graph


def _all_imports(member: Member) -> list[Import]:
    return [found for source in member.sources for found in imports_of(source)]


@pytest.mark.parametrize("member", PACKAGES, ids=lambda member: member.name)
def test_no_modules_import_each_other_in_a_circle_not_even_for_types(member: Member) -> None:
    graph = _graph(member)
    assert graph
    TopologicalSorter(graph).prepare()  # raises `CycleError`, which names the circle


def test_each_room_of_the_core_imports_only_rooms_before_it() -> None:
    level = {f"ctxdb_core.{module}": number for number, room in enumerate(ROOMS) for module in room}

    def level_of(module: str) -> int:
        # `ctxdb_core` itself is the door to all rooms, and none of them imports it.
        return level.get(".".join(module.split(".")[:2]), len(ROOMS))

    upward = [
        f"{module} imports {target}"
        for module, targets in _graph(CORE).items()
        for target in targets
        if level_of(target) > level_of(module)
    ]
    assert upward == []
    assert {module.split(".")[1] for module in _graph(CORE) if "." in module} <= set().union(*ROOMS)


@pytest.mark.parametrize("member", PACKAGES, ids=lambda member: member.name)
def test_no_package_needs_an_adapter_of_another_framework(member: Member) -> None:
    others = {other.package for other in PACKAGES} - {member.package, "ctxdb_core"}
    assert [str(found) for found in _imports(member) if found.root in others] == []


def test_the_domain_of_the_examples_imports_no_framework() -> None:
    """Neither by itself nor through another module of the examples."""
    demo = BY_NAME["ctxdb-demo"]
    sources = {demo.module_of(source): source for source in demo.sources}
    pending = [module for module in sources if module.split(".")[1:2] == ["domain"]]
    assert pending, "the examples have no module or package named `domain`"
    imports: dict[str, list[Import]] = {}
    while pending:
        module = pending.pop()
        if module in sources and module not in imports:
            imports[module] = list(imports_of(sources[module]))
            for found in imports[module]:
                pending += [found.module, *(f"{found.module}.{name}" for name in found.names)]
    everything = [found for module in imports.values() for found in module]
    assert _foreign(everything, {"sqlalchemy", "ctxdb_core", demo.package}) == []


def _public_names(module: str) -> set[str]:
    return set(importlib.import_module(module).__all__)
