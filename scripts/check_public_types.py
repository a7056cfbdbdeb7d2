"""Whether type checkers know the types of all that is public, by pyright: `python scripts/check_public_types.py`.

It checks `tests/typing`, whose uses of the packages are never run, and the completeness of each package ("pyright
--verifytypes"). The pyright that it runs is basedpyright's, which brings its own Node.js.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# In the environment of the project. Given that by the path of its interpreter, pyright finds no package in it where the
# interpreter is a link to one with its minor version in the name.
PYRIGHT = ("uv", "run", "--with", "basedpyright>=1.31", "basedpyright", "--outputjson")


def pyright(*arguments: str) -> dict[str, Any]:
    """Return what pyright says."""
    done = subprocess.run([*PYRIGHT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        sys.exit(f"pyright gave no answer:\n{done.stdout}{done.stderr}")
    return answer


def places(diagnostics: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong and where, each once."""
    return sorted(
        {
            # pyright names no file for an attribute that a base class lacks.
            f"{each['file']}:{each['range']['start']['line'] + 1}: {each['message']}"
            if "range" in each
            else each["message"]
            for each in diagnostics
            if each["severity"] == "error"
        }
    )


def main() -> int:
    """Print what is wrong; return the exit status."""
    uses = pyright("--project", "tests/typing/pyrightconfig.json")["generalDiagnostics"]
    wrong = places(uses)
    for package in sorted(ROOT.glob("packages/*/src/*")):
        if not package.is_dir() or package.name.endswith(".egg-info"):
            continue
        answer = pyright("--verifytypes", package.name, "--ignoreexternal")["typeCompleteness"]
        print(f"{package.name}: {answer['completenessScore']:.1%}")
        if not answer["symbols"]:
            sys.exit(f"pyright has found nothing of {package.name} in the environment of the project.")
        wrong += places([each for symbol in answer["symbols"] for each in symbol.get("diagnostics", ())])
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
