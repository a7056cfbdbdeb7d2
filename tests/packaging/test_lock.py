"""The lock as it is committed: versions, and no addresses."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from scripts.lock_versions import versions_only
from tests.packaging.workspace import MEMBERS, ROOT

SCRIPT = ROOT / "scripts" / "lock_versions.py"

COMPLETE = """\
version = 1
revision = 3
requires-python = ">=3.11"
resolution-markers = ["python_full_version >= '3.12'", "python_full_version < '3.12'"]

[manifest]
members = ["ours"]

[[package]]
name = "theirs"
version = "2.0"
source = { registry = "https://mirror.example/index" }
resolution-markers = ["python_full_version >= '3.12'"]
sdist = { url = "https://mirror.example/theirs-2.0.tar.gz", hash = "sha256:00", size = 1 }

[[package]]
name = "theirs"
version = "1.0"
source = { registry = "https://mirror.example/index" }
resolution-markers = ["python_full_version < '3.12'"]
wheels = [{ url = "https://mirror.example/theirs-1.0-py3-none-any.whl", hash = "sha256:00", size = 1 }]

[[package]]
name = "ours"
version = "0.1.0"
source = { editable = "packages/ours" }
dependencies = [{ name = "theirs" }]
"""

REDUCED = """\
version = 1
requires-python = ">=3.11"
resolution-markers = ["python_full_version >= '3.12'", "python_full_version < '3.12'"]

[[package]]
name = "ours"
version = "0.1.0"
source = { editable = "packages/ours" }

[[package]]
name = "theirs"
version = "1.0"
source = { registry = "default" }
resolution-markers = ["python_full_version < '3.12'"]

[[package]]
name = "theirs"
version = "2.0"
source = { registry = "default" }
resolution-markers = ["python_full_version >= '3.12'"]
"""


def test_a_complete_lock_is_reduced_to_versions() -> None:
    assert versions_only(COMPLETE) == REDUCED


def test_a_reduced_lock_stays_as_it_is() -> None:
    assert versions_only(REDUCED) == REDUCED


def test_the_lock_of_this_workspace_keeps_every_version() -> None:
    complete = (ROOT / "uv.lock").read_text(encoding="utf-8")
    reduced = versions_only(complete)

    def versions(lock: str) -> list[tuple[str, str]]:
        return sorted((package["name"], package["version"]) for package in tomllib.loads(lock)["package"])

    assert versions(reduced) == versions(complete)
    assert versions_only(reduced) == reduced
    assert "://" not in reduced
    assert {member.name for member in MEMBERS} <= {name for name, _ in versions(reduced)}


@pytest.mark.parametrize(
    ("lock", "status", "message"),
    [
        (REDUCED, 0, ""),
        (COMPLETE, 1, "not in versions-only form"),
        (REDUCED.replace('editable = "packages/ours"', 'git = "https://mirror.example/ours"'), 1, "holds an address"),
    ],
    ids=["versions only", "complete", "from an address"],
)
def test_the_check_refuses_addresses(lock: str, status: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "uv.lock"
    file.write_text(lock, encoding="utf-8")
    result = subprocess.run([sys.executable, SCRIPT, "--check", file], capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert message in result.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="the filter is git's")
def test_git_commits_versions_only_once_a_clone_is_set_up(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init")
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    subprocess.run(
        [sys.executable, tmp_path / "scripts" / SCRIPT.name, "--setup"], cwd=tmp_path / "scripts", check=True
    )
    (tmp_path / "uv.lock").write_text(COMPLETE, encoding="utf-8")
    git("add", "uv.lock")
    assert git("show", ":uv.lock") == REDUCED


@pytest.mark.skipif(shutil.which("git") is None, reason="what is staged is git's")
@pytest.mark.parametrize(("lock", "status"), [(REDUCED, 0), (COMPLETE, 1)], ids=["versions only", "complete"])
def test_the_check_of_a_commit_looks_at_what_is_staged(lock: str, status: int, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    file = tmp_path / "uv.lock"
    file.write_text(lock, encoding="utf-8")
    subprocess.run(["git", "add", "uv.lock"], cwd=tmp_path, check=True)
    file.write_text("not staged", encoding="utf-8")
    result = subprocess.run([sys.executable, SCRIPT, "--check-staged"], cwd=tmp_path, check=False)
    assert result.returncode == status
