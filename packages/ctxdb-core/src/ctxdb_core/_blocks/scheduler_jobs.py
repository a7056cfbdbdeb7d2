"""The running task, and whether it is a job that a scheduler has started."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType

from ctxdb_core._sqlalchemy.task_blocks import running_task

__all__ = ["calling_modules", "is_job"]

# Libraries that start a job in the context of an unrelated request. aiojobs starts it in the context of the request
# whose job has just ended, APScheduler 3 in that of the request that has set its timer. taskiq's in-memory broker
# stands in for a worker process.
_SCHEDULERS = frozenset({"aiojobs", "apscheduler", "taskiq"})


def is_job() -> bool:
    """Return whether the running task was started by one of the schedulers that ctxdb knows.

    asyncio records neither which code has created a task nor which code is going to await it. So a job looks like a
    helper that a handler has started and will await. But a scheduler calls the job from code of its own, or asks to be
    called at the end of its task, and is recognised by that. Other tasks are taken for helpers.
    """
    if sys.modules.keys().isdisjoint(_SCHEDULERS):
        return False
    task = running_task()
    if task is None:
        return False
    # The list is shown by `repr(task)` alone, and has been an attribute of CPython's futures all along.
    callbacks: Iterable[tuple[object, object]] = getattr(task, "_callbacks", None) or ()
    modules = {getattr(callback, "__module__", None) or "" for callback, _context in callbacks} | calling_modules()
    return any(module.partition(".")[0] in _SCHEDULERS for module in modules)


def calling_modules() -> set[str]:
    """Return the names of the modules by which the running code is called within its task.

    What runs the event loop, a worker's command for instance, is no part of the task.
    """
    task = running_task()
    root: FrameType | None = None if task is None else getattr(task.get_coro(), "cr_frame", None)
    modules: set[str] = set()
    if root is None:
        return modules
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, and named so for its use to be noticed
    while frame is not None:
        modules.add(frame.f_globals.get("__name__", ""))
        if frame is root:
            return modules
        frame = frame.f_back
    return set()
