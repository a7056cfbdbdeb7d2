"""Waits, when an application shuts down, for the queries of requests that its server has cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

from ctxdb_core._databases.status import open_units
from ctxdb_core._sqlalchemy.cancelled_queries import STOP_QUERY_TIMEOUT_SECONDS, stops_under_way
from ctxdb_core._sqlalchemy.guarded_session import door_of

__all__ = ["wait_for_cancelled_queries"]

# A cancellation passes through each middleware that runs the rest of the application in a task group before it reaches
# the task that waits for the database. Each step takes a turn of the event loop, which is some microseconds.
_TURNS = 50


async def wait_for_cancelled_queries() -> None:
    """Wait until the queries of tasks that have been cancelled on this event loop are stopped, or given up.

    A server that shuts down cancels the requests that have run out of time, and ends its process right after the
    application's shutdown. Without this wait, the process would end before the database is told.
    """
    loop = asyncio.get_running_loop()
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    latest = loop.time() + STOP_QUERY_TIMEOUT_SECONDS
    while (under_way := {*_cancelled_tasks(loop), *stops_under_way(loop)}) and loop.time() < latest:
        await asyncio.wait(under_way, timeout=latest - loop.time(), return_when=asyncio.FIRST_COMPLETED)


def _cancelled_tasks(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """Return the tasks that were cancelled during a call of their unit's session, and whose call has not ended."""
    units = [unit for reference in tuple(open_units) if (unit := reference()) is not None]
    doors = [door_of(session) for unit in units for session in tuple(unit.sessions.values())]
    tasks = {door.cancelled_task for door in doors if door is not None} - {asyncio.current_task()}
    return {task for task in tasks if task is not None and task.get_loop() is loop}
