"""What every member of the workspace brings along, and how the members agree."""

from __future__ import annotations

import re
import subprocess

import pytest
from packaging.version import Version
from scripts.check_wheels import has_upper_bound
from tests.packaging.workspace import MEMBERS, PACKAGES, ROOT, Member

members = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
VERSIONS = {member.name: Version(member.version) for member in MEMBERS}


def test_versions_are_in_lock_step() -> None:
    assert len(set(VERSIONS.values())) == 1, VERSIONS


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{MEMBERS[0].version}]" in changelog


@members
def test_a_member_carries_what_its_wheel_needs(member: Member) -> None:
    project = member.pyproject["project"]
    assert (member.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert project["readme"] == "README.md"
    assert (member.folder / "README.md").read_text(encoding="utf-8").startswith("# ")
    assert (member.folder / "src" / member.package / "py.typed").exists()
    assert project["license"] == "MIT"


@members
def test_requirements_are_bounded_on_both_sides(member: Member) -> None:
    for requirement in member.requirements + member.extras:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert has_upper_bound(requirement), f"{requirement} has no upper bound"
        assert operators & {">=", "==", "~="}, f"{requirement} has no lower bound"


@members
def test_members_require_each_other_in_this_minor_version_only(member: Member) -> None:
    version = VERSIONS[member.name]
    for requirement in member.requirements:
        if requirement.name in VERSIONS:
            assert version in requirement.specifier
            assert f"{version.major}.{version.minor + 1}" not in requirement.specifier, str(requirement)


@members
def test_a_member_supports_the_pythons_of_the_workspace(member: Member) -> None:
    assert member.pyproject["project"]["requires-python"] == ">=3.11,<3.15"


@pytest.mark.parametrize("member", PACKAGES, ids=lambda member: member.name)
def test_a_package_names_the_pythons_it_supports(member: Member) -> None:
    prefix = "Programming Language :: Python :: "
    classifiers = member.pyproject["project"]["classifiers"]
    pythons = [classifier.removeprefix(prefix) for classifier in classifiers if classifier.startswith(prefix)]
    assert pythons == ["3 :: Only", "3.11", "3.12", "3.13", "3.14"]


@members
def test_tools_are_configured_at_the_root_only(member: Member) -> None:
    assert set(member.pyproject.get("tool", {})) <= {"hatch"}
    assert "dependency-groups" not in member.pyproject


def test_each_step_of_continuous_integration_has_a_short_name() -> None:
    listed = subprocess.run([ROOT / ".ci" / "run", "--list"], check=True, capture_output=True, text=True).stdout
    steps = {line.split()[0] for line in listed.splitlines()}
    recipes = dict(re.findall(r"^([a-z-]+):\n    (.*)$", (ROOT / "justfile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name in steps if recipes.get(name) != f".ci/run {name}"} == set()
