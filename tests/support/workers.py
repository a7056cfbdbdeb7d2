"""Where a run of the suite is spread over several processes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

WORKERS_PER_CPU = 1.5
"""A worker waits for its databases, and for processes that it has started, about half as long as it computes."""


def use_workers(config: pytest.Config) -> None:
    """Have pytest-xdist run whole folders of tests in several workers, unless the command line says otherwise.

    Starting the workers takes some seconds. Single files and tests, as well as what is to be looked at while it runs,
    stay in one process. So does a run without pytest-xdist (`-p no:xdist`), which options in the configuration file
    would make impossible: pytest would not know them.
    """
    options = config.option
    is_there = config.pluginmanager.hasplugin("xdist")
    if not is_there or "PYTEST_XDIST_WORKER" in os.environ:
        return
    is_told = options.numprocesses is not None or options.tx or options.dist != "no"
    is_looked_at = options.capture == "no" or options.usepdb or options.collectonly
    if is_told or is_looked_at or not any(Path(argument).is_dir() for argument in config.args):
        return
    options.numprocesses = math.ceil(WORKERS_PER_CPU * (os.cpu_count() or 1))
    # The tests differ in length by a factor of a thousand: a worker that has none left takes some of another worker's.
    options.dist = "worksteal"


def begin_with_what_waits(items: list[pytest.Item]) -> None:
    """Let the second worker begin with the tests of clusters, which wait most of their time, for servers and time-outs.

    Each worker begins with an equal share of all tests, in their order, and takes from the end of another's share when
    its own is done. If the tests of clusters came last, the workers would wait in them together, and use no CPU.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count == 1:
        return
    waiting = [item for item in items if item.nodeid.startswith("tests/pgstatus/")]
    others = [item for item in items if not item.nodeid.startswith("tests/pgstatus/")]
    first_share = len(items) // count
    items[:] = [*others[:first_share], *waiting, *others[first_share:]]
