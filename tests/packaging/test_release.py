"""The release checklist, on a copy of the committed files: it finds obstacles, and tags only a version without any."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from scripts import release
from tests.packaging.workspace import ROOT


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=releaser", "-c", "user.email=releaser@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with the files of the workspace that a release looks at."""
    names = [
        name
        for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        if name.endswith(("pyproject.toml", "CHANGELOG.md", "sidecar.yaml"))
        and not name.startswith("examples/service/")
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    change(tmp_path)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def change(root: Path) -> None:
    file = root / "CHANGELOG.md"
    file.write_text(file.read_text().replace("## [Unreleased]\n", "## [Unreleased]\n\n- A late change.\n", 1))


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "A change")


@pytest.fixture
def ready(copy: Path) -> Path:
    """A copy that was cut to another version."""
    assert release.main(["cut", "7.1.0"], copy) == 0
    commit(copy)
    return copy


def test_a_version_that_was_cut_can_be_released(ready: Path) -> None:
    held = "\n".join(release.check_release(ready))
    assert "all members are 7.1.0" in held
    assert "v7.1.0 is a new tag" in held


def test_a_version_without_changes_cannot_be_cut(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["cut", "7.2.0"], ready) == 1
    assert "nothing that is not released" in capsys.readouterr().err


def test_a_cut_sets_the_bounds_between_members(ready: Path) -> None:
    projects = release.projects(ready).values()
    required = [requirement for project in projects for requirement in project["dependencies"]]
    bounds = {re.sub(r"^[\w\[\]-]+", "", requirement) for requirement in required if requirement.startswith("ctxdb-")}
    assert bounds == {">=7.1,<7.2"}


def test_a_cut_names_the_image_of_that_version(ready: Path) -> None:
    assert "image: ctxdb-pgstatus:7.1.0\n" in (ready / "deploy/pgstatus/kubernetes/sidecar.yaml").read_text()


def test_a_change_that_is_not_committed_is_no_part_of_a_release(
    ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (ready / "new.py").touch()
    assert release.main([], ready) == 1
    assert "commit or remove new.py" in capsys.readouterr().err


def test_members_of_different_versions_are_not_released(ready: Path) -> None:
    file = ready / "packages" / "ctxdb-core" / "pyproject.toml"
    file.write_text(file.read_text().replace('version = "7.1.0"', 'version = "7.1.1"'))
    commit(ready)
    with pytest.raises(release.NotReadyError, match="different versions"):
        list(release.check_release(ready))


def test_changes_above_the_section_of_the_version_are_not_released(ready: Path) -> None:
    change(ready)
    commit(ready)
    with pytest.raises(release.NotReadyError, match="changes above"):
        list(release.check_release(ready))


def test_a_version_without_a_section_is_not_released(ready: Path) -> None:
    file = ready / "CHANGELOG.md"
    file.write_text(file.read_text().replace("## [7.1.0]", "## [7.0.0]"))
    commit(ready)
    with pytest.raises(release.NotReadyError, match="has no section"):
        list(release.check_release(ready))


def test_a_version_is_released_once(ready: Path) -> None:
    git(ready, "tag", "v7.1.0")
    with pytest.raises(release.NotReadyError, match="is there already"):
        list(release.check_release(ready))


def test_the_project_s_addresses_come_into_the_metadata_from_one_place(ready: Path, tmp_path: Path) -> None:
    file = ready / "pyproject.toml"
    file.write_text(file.read_text().replace('Documentation = ""', 'Documentation = "https://docs.example/ctxdb"'))
    commit(ready)
    release.export(ready, tmp_path / "exported")
    for project in release.projects(tmp_path / "exported").values():
        assert project["urls"] == {"Documentation": "https://docs.example/ctxdb"}


@pytest.mark.parametrize(("options", "tags"), [([], ""), (["--tag"], "v7.1.0\n")])
def test_only_a_release_that_is_to_be_tagged_is_tagged(
    ready: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], tags: str
) -> None:
    # `.ci/run` builds and installs the wheels, which takes half a minute.
    monkeypatch.setattr(release, "build", lambda *arguments: None)
    monkeypatch.setattr(release, "check_wheels", lambda *arguments: None)
    assert release.main(options, ready) == 0
    assert git(ready, "tag") == tags


def test_no_member_has_addresses_of_its_own() -> None:
    assert not any("urls" in project for project in release.projects(ROOT).values())
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ctxdb"]["urls"]
    assert set(table) == {"Documentation", "Repository", "Issues", "Changelog"}
