"""The bytecode of the modules that tests import, here and in processes that they start."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import pytest


def share_bytecode(config: pytest.Config) -> None:
    """Have the processes of this run share their bytecode, if Python is told to write none (PYTHONDONTWRITEBYTECODE).

    The run starts hundreds of processes, which would otherwise compile SQLAlchemy and a framework each: that takes as
    long as all tests together. The bytecode lies beside none of the sources. It goes into pytest's cache, where the
    next run finds it, or, without that (`-p no:cacheprovider`), into a directory that is removed at the end of the run.
    """
    if not sys.dont_write_bytecode:
        return
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = _directory(config)
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _directory(config: pytest.Config) -> str:
    if hasattr(config, "cache"):
        return str(config.cache.mkdir("bytecode"))
    directory = tempfile.mkdtemp(prefix="ctxdb-tests-bytecode-")
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    return directory
