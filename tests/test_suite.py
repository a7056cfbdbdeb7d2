"""What the suite itself relies on."""

from __future__ import annotations

import subprocess
import sys

import pytest

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

_IGNORING_SIGINT = """\
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from tests.support.signals import let_children_be_interrupted
let_children_be_interrupted()
"""
_INTERRUPT_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


@needs_posix
def test_sigint_ends_a_child_of_a_suite_that_ignores_it() -> None:
    start_child = f"status = subprocess.call([sys.executable, '-c', {_INTERRUPT_ITSELF!r}])"
    assert run(f"{_IGNORING_SIGINT}{start_child}\nprint(status == -signal.SIGINT)") == "True\n"


@needs_posix
def test_a_suite_that_ignores_sigint_goes_on_after_a_sigint() -> None:
    assert run(f"{_IGNORING_SIGINT}{_INTERRUPT_ITSELF}\nprint('goes on')") == "goes on\n"


def run(program: str) -> str:
    # The traceback of the interrupted child is not printed among the suite's own lines.
    return subprocess.check_output([sys.executable, "-c", program], stderr=subprocess.DEVNULL, text=True)
