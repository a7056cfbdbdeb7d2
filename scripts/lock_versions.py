"""Turn a complete `uv.lock` into its versions-only form: what is committed names versions, never download addresses.

``uv sync`` takes the versions of such a file as preferences, picks exactly those, and completes the file in the working
copy from whatever index the machine uses: one lock for every mirror.

    python scripts/lock_versions.py < uv.lock        prints the versions-only form (the git clean filter)
    python scripts/lock_versions.py --check FILE     exits with 1 if FILE holds anything else, or any address
    python scripts/lock_versions.py --check-staged   the same, of what the next commit will hold
    python scripts/lock_versions.py --setup          makes git apply the filter in this clone
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

FILTER = "uv-lock-versions"


def versions_only(lock: str) -> str:
    """Return the versions-only form of `lock`; a file in that form already comes back as it is."""
    data = tomllib.loads(lock)
    lines = [
        f"{key} = {_inline(data[key])}" for key in ("version", "requires-python", "resolution-markers") if key in data
    ]
    for package in sorted(data.get("package", ()), key=lambda entry: (entry["name"], entry.get("version", ""))):
        source = package["source"]
        if "registry" in source:
            source = {"registry": "default"}
        lines += ["", "[[package]]", f"name = {_inline(package['name'])}"]
        if "version" in package:
            lines.append(f"version = {_inline(package['version'])}")
        lines.append(f"source = {_inline(source)}")
        if "resolution-markers" in package:
            lines.append(f"resolution-markers = {_inline(package['resolution-markers'])}")
    return "\n".join(lines) + "\n"


def problem_of(lock: str) -> str | None:
    """Return what keeps `lock` from being committed; ``None`` if nothing does."""
    if lock != versions_only(lock):
        return "it is not in versions-only form: run `python3 scripts/lock_versions.py --setup`, then `git add uv.lock`"
    if "://" in lock:
        # A Git or URL source: its address is its identity, and cannot be left out.
        return "it holds an address: take every package from the index"
    return None


def _inline(value: Any) -> str:
    # A JSON string or number is a TOML one, too; only tables differ.
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    return json.dumps(value)


def _staged() -> str:
    return subprocess.run(["git", "show", ":uv.lock"], check=True, capture_output=True, text=True).stdout


def _set_up() -> None:
    # Git runs a filter at the top of the work tree, wherever it is called itself.
    for key, value in (("clean", "python3 scripts/lock_versions.py"), ("smudge", "cat"), ("required", "true")):
        subprocess.run(["git", "config", f"filter.{FILTER}.{key}", value], check=True, cwd=Path(__file__).parent)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Keep download addresses out of the committed uv.lock.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 unless FILE can be committed as it is")
    parser.add_argument(
        "--check-staged", action="store_true", help="exit with 1 unless the staged uv.lock is like that"
    )
    parser.add_argument("--setup", action="store_true", help="configure the git filter of this clone")
    options = parser.parse_args()
    if options.setup:
        _set_up()
    elif options.check is not None or options.check_staged:
        lock = _staged() if options.check_staged else options.check.read_text(encoding="utf-8")
        if problem := problem_of(lock):
            print(f"{options.check or 'uv.lock'} cannot be committed: {problem}.", file=sys.stderr)
            return 1
    else:
        sys.stdout.write(versions_only(sys.stdin.read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
