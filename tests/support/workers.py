"""Where a run of the suite is spread over several processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

WORKERS_PER_CPU = 2
"""A worker waits for its databases, and for processes that it has started, about as long as it computes."""

WAITING = (
    # Clusters fail and recover here. One worker process keeps one cluster for all of these tests.
    ("tests/pgstatus/",),
    # Programs that the tests start, networks that answer nothing, and the browser, of which one worker has one.
    (
        "tests/test_demo.py",
        "tests/test_watch.py",
        "tests/inspector/test_page.py",
        "tests/test_soak.py",
        "tests/documentation/",
        "tests/examples/",
        "tests/faults/",
    ),
)
"""The beginnings of the names of tests that wait most of their time: for the second worker, and for the third."""


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
    options.numprocesses = WORKERS_PER_CPU * (os.cpu_count() or 1)
    # The tests differ in length by a factor of a thousand: a worker that has none left takes some of another worker's.
    options.dist = "worksteal"


def begin_with_what_waits(items: list[pytest.Item]) -> None:
    """Let the second and the third worker begin with the tests that wait most of their time, while the others compute.

    Each worker begins with an equal share of all tests, in their order, and takes from the end of another's share when
    its own is done. If the tests that wait came last, the workers would wait in them together, and use no CPU.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count == 1:
        return
    groups = [[item for item in items if item.nodeid.startswith(names)] for names in WAITING]
    waiting = {item for group in groups for item in group}
    others = [item for item in items if item not in waiting]
    ordered: list[pytest.Item] = []
    for number, group in enumerate(groups, start=1):
        # Two workers have one share after the first one: both groups are at its beginning.
        up_to_the_share = max(0, len(items) * min(number, count - 1) // count - len(ordered))
        ordered += [*others[:up_to_the_share], *group]
        del others[:up_to_the_share]
    items[:] = [*ordered, *others]
