"""Whether the running task is a job that a scheduler has started, and what it has inherited with its context."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from types import FrameType
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core._databases.connect import DBConnect
from ctxdb_core._sqlalchemy.task_blocks import running_task
from ctxdb_core.errors import ContextNotInitiatedError

__all__ = [
    "OTHER_JOB",
    "WatchedSessions",
    "is_inherited",
    "is_job",
    "refuse_in_other_job",
    "sessions_beside_schedulers",
]

# Libraries that start a job in the context of an unrelated request. aiojobs starts it in the context of the request
# whose job has just ended, APScheduler 3 in that of the request that has set its timer. taskiq's in-memory broker
# stands in for a worker process.
_SCHEDULERS = frozenset({"aiojobs", "apscheduler", "taskiq"})

_OF_NO_REQUEST = frozenset({"apscheduler", "taskiq"})
"""Those whose jobs are never part of a request. By aiojobs' ``@atomic``, a whole handler is a job."""

OTHER_JOB = (
    "The unit of work found here belongs to the code in whose context a scheduler has started this job, and which may "
    "have nothing to do with it. Give the job a unit of work of its own: hand `run_in_new_ctx(fn, ...)` to the "
    "scheduler, or wrap the job's code in `async with new_db_ctx():`."
)
"""Why a job may not use a unit of work that it has inherited."""


def _are_loaded(schedulers: frozenset[str]) -> bool:
    """Return whether one of `schedulers` has been imported."""
    return not sys.modules.keys().isdisjoint(schedulers)


def is_job(schedulers: frozenset[str] = _SCHEDULERS) -> bool:
    """Return whether the running task was started by one of `schedulers`, or of all that ctxdb knows.

    asyncio records neither which code has created a task nor which code is going to await it. So a job looks like a
    helper that a handler has started and will await. But a scheduler calls the job from code of its own, or asks to be
    called at the end of its task, and is recognised by that. Other tasks are taken for helpers.
    """
    if not _are_loaded(schedulers):
        return False
    task = running_task()
    if task is None:
        return False
    # The list is shown by `repr(task)` alone, and has been an attribute of CPython's futures all along.
    callbacks: Iterable[tuple[object, object]] = getattr(task, "_callbacks", None) or ()
    modules = {getattr(callback, "__module__", None) or "" for callback, _context in callbacks} | _calling_modules()
    return any(module.partition(".")[0] in schedulers for module in modules)


def _calling_modules() -> set[str]:
    """Return the names of the modules by which the running code is called within its task.

    What runs the event loop, a worker's command for instance, is no part of the task. The module that has started it is
    one of them while an eager task (Python 3.12) takes its first step: its callbacks are added after that.
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
            return modules | _modules_of_starter(root)
        frame = frame.f_back
    return set()


def _modules_of_starter(root: FrameType) -> set[str]:
    """Return the name of the module that has just started the task of `root` eagerly; nothing for any other task."""
    caller = root.f_back
    # Any other task is called by the event loop: by `asyncio.events`, or by what runs a loop that is no Python code.
    if caller is None or caller.f_globals.get("__name__") not in ("asyncio.tasks", "asyncio.base_events"):
        return set()
    while caller is not None and caller.f_globals.get("__name__", "").startswith("asyncio."):
        caller = caller.f_back
    return set() if caller is None else {caller.f_globals.get("__name__", "")}


def is_inherited(current_unit: ContextVar[Any]) -> bool:
    """Return whether the running code has the current unit from the context that its task was given a copy of."""
    unit = current_unit.get()
    token = getattr(unit, "token", None)
    if token is None:
        # The unit is that of an ASGI request. If this very job has called the application, the middleware that made the
        # unit is among the callers of the running code.
        return not any(module.startswith("ctxdb_core.asgi") for module in _calling_modules())
    # A token is good for the very context in which it was made (Python docs, "ContextVar.reset"). That tells a unit
    # which was entered here from one which was inherited.
    try:
        current_unit.reset(token)
    except (ValueError, RuntimeError):
        # Another context's; or used already, where that context has been left.
        return True
    unit.enter()
    return False


def refuse_in_other_job(current_unit: ContextVar[Any]) -> None:
    """Raise an error if the running code is a job that is part of no request, and has inherited the unit of one.

    Raises:
        ContextNotInitiatedError: it is.
    """
    if is_job(_OF_NO_REQUEST) and is_inherited(current_unit):
        raise ContextNotInitiatedError(OTHER_JOB)


class WatchedSessions(dict[DBConnect, AsyncSession]):
    """The sessions of a unit of work that a job may have inherited.

    `db_session` looks here first, and asks nothing else where it finds one.
    """

    __slots__ = ("_current_unit", "_task")

    def __init__(self, current_unit: ContextVar[Any]) -> None:
        super().__init__()
        self._current_unit = current_unit
        self._task = asyncio.current_task()

    def __getitem__(self, db: DBConnect) -> AsyncSession:
        if asyncio.current_task() is not self._task:
            refuse_in_other_job(self._current_unit)
        return super().__getitem__(db)


def sessions_beside_schedulers(current_unit: ContextVar[Any]) -> WatchedSessions | None:
    """Return where a unit of work keeps its sessions; ``None`` where a dictionary will do, as no scheduler is there."""
    return WatchedSessions(current_unit) if _are_loaded(_OF_NO_REQUEST) else None
