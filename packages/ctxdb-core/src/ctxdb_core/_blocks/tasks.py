"""The running task, and whether it is a job that a scheduler has started."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

from ctxdb_core._shield import LentTask

__all__ = ["is_job", "running_task"]

# Libraries that start a job in the context of a request which has nothing to do with it: aiojobs in that of the request
# whose job has made room for the next one, APScheduler 3 in that of the one which has set its timer; or that, like
# taskiq's broker in memory, stand in for another process.
_SCHEDULERS = frozenset({"aiojobs", "apscheduler", "taskiq"})


def running_task() -> asyncio.Task[Any] | None:
    """Return the task that the running code belongs to; ``None`` in a callback, and in a thread without a loop."""
    try:
        task: Any = asyncio.current_task()
    except RuntimeError:
        return None
    return task.host if isinstance(task, LentTask) else task


def is_job() -> bool:
    """Return whether the running task was started by one of the schedulers that ctxdb knows.

    Nothing that asyncio records tells a job from a helper which a handler has started and waits for: neither who has
    created a task, nor who waits for it before that has begun to. But a scheduler runs its own coroutine around the
    job, or asks to be called at its end, and is recognised by that. Other tasks are taken for helpers.
    """
    if sys.modules.keys().isdisjoint(_SCHEDULERS):
        return False
    task = running_task()
    return task is not None and any(module.partition(".")[0] in _SCHEDULERS for module in _modules_of(task))


def _modules_of(task: asyncio.Task[Any]) -> Iterator[str]:
    """Yield the names of the modules that have made the coroutine of `task`, and its callbacks."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    if frame is not None:
        yield frame.f_globals.get("__name__", "")
    # The list is shown by `repr(task)` alone, and has been an attribute of CPython's futures all along.
    for callback, _context in getattr(task, "_callbacks", None) or ():
        yield getattr(callback, "__module__", None) or ""
