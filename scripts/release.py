"""The release checklist: ``uv run python scripts/release.py``.

Without an option it changes nothing: it says whether what is committed can be released. It looks at the tree, the
versions, the changelog and the tag, in this order; builds the distributions from what is committed; and checks and
installs each.

* ``--tag`` tags the commit in the end, and leaves the distributions in ``dist/``, for ``uv publish dist/*``.
* ``cut VERSION`` prepares a release: it sets the version of all members and of the image, the bounds between
  members, and the changelog's section.
* ``wheels FOLDER`` builds, checks and installs what is in the working copy, as continuous integration does.
"""

from __future__ import annotations

import argparse
import datetime as dt
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.check_wheels import main as check_contents  # noqa: E402 - it is found once the path says so
from scripts.check_wheels import members  # noqa: E402 - it is found once the path says so

VERSION = re.compile(r"\d+\.\d+\.\d+")
UNRELEASED = "## [Unreleased]"
IMAGE = "ctxdb-pgstatus:"
"""The name of the sidecar's image, in front of its version."""


class NotReadyError(Exception):
    """Something stands in the way of a release. The message says what to do."""


# --- the commit -------------------------------------------------------------------------------------------------------


def git(root: Path, *arguments: str) -> str:
    """Return what git prints."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotReadyError(f"git {arguments[0]} has failed: {done.stderr.strip()}")
    return done.stdout.strip()


def projects(root: Path) -> dict[Path, dict[str, Any]]:
    """Return the table ``[project]`` of each member, by its file."""
    files = [folder / "pyproject.toml" for folder in members(root)]
    return {file: tomllib.loads(file.read_text(encoding="utf-8"))["project"] for file in files}


def check_tree(root: Path) -> None:
    """Look for changes that are not committed. The working copy of uv.lock is a complete one, and always differs."""
    changed = git(root, "diff", "--name-only", "HEAD", "--", ".", ":!uv.lock").splitlines()
    changed += git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    if changed:
        raise NotReadyError(f"commit or remove {', '.join(changed[:5])}{' and more' if len(changed) > 5 else ''}")


def common_version(root: Path) -> str:
    """Return the version that all members have."""
    versions = {project["name"]: str(project["version"]) for project in projects(root).values()}
    if len(set(versions.values())) != 1:
        raise NotReadyError(f"the members have different versions: {versions}; `cut VERSION` sets one")
    return next(iter(versions.values()))


def check_changelog(root: Path, version: str) -> None:
    """Look whether the changelog has a dated section of this version, and nothing above it."""
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if section is None or not section[1].strip():
        raise NotReadyError(f"CHANGELOG.md has no section `## [{version}] - DATE` with text; `cut {version}` makes one")
    above = changelog[: section.start()].partition(UNRELEASED)[2].strip()
    if above:
        raise NotReadyError(f"CHANGELOG.md has changes above the section of {version}: move them there, or cut anew")


def check_tag(root: Path, version: str) -> None:
    """Look whether this version was released before."""
    if git(root, "tag", "--list", f"v{version}"):
        raise NotReadyError(f"the tag v{version} is there already; `cut` the next version")


def urls(root: Path) -> dict[str, str]:
    """Return the addresses of the project that are known, from the one place that names them."""
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ctxdb"]["urls"]
    return {label: address for label, address in table.items() if address}


# --- the distributions ------------------------------------------------------------------------------------------------


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command that says itself what it does."""
    if subprocess.run([str(part) for part in command], cwd=cwd, check=False).returncode:
        raise NotReadyError(f"`{' '.join(str(part) for part in command[:4])} ...` has failed")


def export(root: Path, folder: Path) -> None:
    """Put the committed files into a folder, with the addresses of the project in each member's metadata."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=root, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    if known := urls(folder):
        lines = "".join(f"{json.dumps(label)} = {json.dumps(address)}\n" for label, address in known.items())
        for file in projects(folder):
            with file.open("a", encoding="utf-8") as pyproject:
                pyproject.write(f"\n[project.urls]\n{lines}")


def build(root: Path, dist: Path, folders: Sequence[Path]) -> None:
    """Build the distributions of some members."""
    for folder in folders:
        run("uv", "build", "--quiet", "--out-dir", dist, folder, cwd=root)


def check_wheels(root: Path, dist: Path, folders: Sequence[Path]) -> None:
    """Look into each wheel; have `twine` look at the metadata; install each by itself, and import all of it."""
    if check_contents(dist, folders):
        raise NotReadyError("the wheels are not complete")
    run("uv", "tool", "run", "--quiet", "twine", "check", "--strict", *dist.glob("*.whl"), *dist.glob("*.tar.gz"))
    for wheel in sorted(dist.glob("*.whl")):
        install(root, dist, wheel)


def install(root: Path, dist: Path, wheel: Path) -> None:
    """Install a wheel into an environment that holds nothing else, and import all of it; then once more with extras."""
    name = wheel.name.partition("-")[0]
    distribution = name.replace("_", "-")
    with ZipFile(wheel) as archive:
        metadata = archive.read(f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/METADATA").decode()
        files = archive.namelist()
    # The extras that have a module of their own: no other module imports their libraries.
    extras = [
        extra for extra in re.findall("^Provides-Extra: (.+)$", metadata, re.MULTILINE) if f"{name}/{extra}.py" in files
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        run("uv", "venv", "--quiet", "--no-project", "--python", sys.executable, environment)
        # By links, as a reference to a file would lose the extras that a member asks of another.
        run("uv", "pip", "install", "--quiet", "--python", environment, "--find-links", dist, wheel)
        import_all = (python, "-I", root / "scripts" / "import_all.py", distribution)
        run(*import_all, cwd=Path(folder))
        if extras:
            with_extras = f"{distribution}[{','.join(extras)}]"
            run("uv", "pip", "install", "--quiet", "--python", environment, "--find-links", dist, with_extras)
            run(*import_all, *extras, cwd=Path(folder))


# --- the commands -----------------------------------------------------------------------------------------------------


def check_release(root: Path) -> Iterator[str]:
    """Go through the checklist up to the distributions, and yield what holds."""
    check_tree(root)
    yield f"all is committed: {git(root, 'rev-parse', '--short', 'HEAD')}"
    version = common_version(root)
    yield f"all members are {version}"
    check_changelog(root, version)
    yield "the changelog is cut"
    check_tag(root, version)
    yield f"v{version} is a new tag"
    known = urls(root)
    yield f"addresses in the metadata: {', '.join(known) or 'none; [tool.ctxdb.urls] in pyproject.toml is empty'}"


def release(root: Path, *, tag: bool) -> None:
    """Go through the whole checklist, and tag the commit if that is wanted."""
    for held in check_release(root):
        print(f"ok: {held}")
    version = common_version(root)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        export(root, source)
        dist = root / "dist" if tag else Path(folder, "dist")
        if dist.exists() and any(dist.iterdir()):
            raise NotReadyError(f"{dist} is not empty")
        packages = sorted((source / "packages").iterdir())
        build(source, dist, packages)
        check_wheels(source, dist, packages)
        print(f"ok: {len(list(dist.glob('*.whl')))} wheels are complete, and work by themselves")
    if not tag:
        print(f"{version} can be released: `uv run python scripts/release.py --tag` tags it.")
        return
    git(root, "tag", "--annotate", f"v{version}", "--message", f"Release {version}")
    print(f"v{version} is tagged. To publish: git push origin v{version} && uv publish dist/*")


def cut(root: Path, version: str, today: dt.date) -> None:
    """Set the version everywhere, and close the changelog's section."""
    if not VERSION.fullmatch(version):
        raise NotReadyError(f"{version!r} is no version such as 0.2.0")
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    if f"## [{version}]" in text:
        raise NotReadyError(f"CHANGELOG.md has a section of {version} already")
    if not text.partition(f"{UNRELEASED}\n")[2].partition("\n## ")[0].strip():
        raise NotReadyError("CHANGELOG.md has nothing that is not released")
    changelog.write_text(
        text.replace(f"{UNRELEASED}\n", f"{UNRELEASED}\n\n## [{version}] - {today.isoformat()}\n", 1), encoding="utf-8"
    )
    old = common_version(root)
    major, minor, _ = version.split(".")
    names = "|".join(re.escape(project["name"]) for project in projects(root).values())
    for file in projects(root):
        pyproject = file.read_text(encoding="utf-8")
        pyproject = re.sub(r'^version = ".+"$', f'version = "{version}"', pyproject, count=1, flags=re.MULTILINE)
        bounds = rf"\g<1>>={major}.{minor},<{major}.{int(minor) + 1}"
        pyproject = re.sub(rf'("(?:{names})(?:\[[\w,-]+\])?)>=[\d.]+,<[\d.]+', bounds, pyproject)
        file.write_text(pyproject, encoding="utf-8")
    for name in git(root, "grep", "--files-with-matches", IMAGE, "--", "deploy", "docs").splitlines():
        file = root / name
        file.write_text(
            file.read_text(encoding="utf-8").replace(f"{IMAGE}{old}", f"{IMAGE}{version}"), encoding="utf-8"
        )
    print(f"All members are {version}. Next: `uv lock`, look at the changes, and commit them.")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description="The release checklist. It changes nothing unless it is told to.")
    parser.add_argument("--tag", action="store_true", help="tag the commit if all of it holds, and leave dist/")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("cut", help="set the version of all members").add_argument("version")
    commands.add_parser("wheels", help="build and check what is in the working copy").add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.command == "cut":
            cut(root, given.version, dt.datetime.now(tz=dt.UTC).date())
        elif given.command == "wheels":
            build(root, given.folder.resolve(), members(root))
            check_wheels(root, given.folder.resolve(), members(root))
        else:
            release(root, tag=given.tag)
    except NotReadyError as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
