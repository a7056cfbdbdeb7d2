"""Check what is in the wheels of the workspace: ``python scripts/check_wheels.py DIRECTORY``, after ``uv build``.

Every member has one wheel there. Each holds its import package with ``py.typed`` and nothing beside it, its README and
its licence, and its requirements are bounded.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def members(root: Path = ROOT) -> list[Path]:
    """Return the folders of the workspace's members."""
    workspace = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["workspace"]
    return sorted(
        folder
        for pattern in workspace["members"]
        for folder in root.glob(pattern)
        if (folder / "pyproject.toml").exists()
    )


def has_upper_bound(requirement: Requirement) -> bool:
    """Return whether a new major version of what is required cannot come in unseen."""
    return any(specifier.operator in {"<", "<=", "==", "===", "~="} for specifier in requirement.specifier)


def problems_of(wheel: Path, member: Path) -> Iterator[str]:
    """Yield what is wrong with the `wheel` of `member`."""
    project = tomllib.loads((member / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = project["name"].replace("-", "_")
    metadata_folder = f"{package}-{project['version']}.dist-info"
    with ZipFile(wheel) as archive:
        files = set(archive.namelist())
        metadata: Message = HeaderParser().parsestr(archive.read(f"{metadata_folder}/METADATA").decode())
    sources = {path.relative_to(member / "src").as_posix() for path in (member / "src").rglob("*") if path.is_file()}
    sources = {path for path in sources if "__pycache__" not in path}
    for path in sorted(sources - files):
        yield f"{path} is missing"
    for path in sorted(files - sources):
        if not path.startswith(f"{metadata_folder}/"):
            yield f"{path} does not belong there"
    if f"{package}/py.typed" not in files:
        yield "py.typed is missing"
    if f"{metadata_folder}/licenses/LICENSE" not in files or metadata["License-Expression"] != "MIT":
        yield "the licence is missing"
    readme = (member / "README.md").read_text(encoding="utf-8").strip()
    if not readme or str(metadata.get_payload()).strip() != readme:
        yield "README.md is empty, or not the long description"
    if metadata["Description-Content-Type"] != "text/markdown":
        yield "the long description is not shown as Markdown"
    for requirement in map(Requirement, metadata.get_all("Requires-Dist", [])):
        if not has_upper_bound(requirement):
            yield f"the requirement {requirement} has no upper bound"


def main(directory: Path, folders: Sequence[Path] | None = None) -> int:
    """Check every wheel in `directory`; return the exit status.

    Args:
        directory: where the wheels are.
        folders: those of the members that have wheels there; all by default.
    """
    status = 0
    left = set(directory.glob("*.whl"))
    for member in members() if folders is None else folders:
        package = tomllib.loads((member / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
        wheels = list(directory.glob(f"{package.replace('-', '_')}-*.whl"))
        left.difference_update(wheels)
        problems = (
            list(problems_of(wheels[0], member)) if len(wheels) == 1 else [f"there are {len(wheels)} wheels of it"]
        )
        for problem in problems:
            print(f"{package}: {problem}")
            status = 1
        if not problems:
            print(f"{package}: {wheels[0].name} is complete")
    for wheel in sorted(left):
        print(f"{wheel.name} belongs to no member")
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
