"""Stops queries of requests when an application shuts down, and waits for those that its server has cancelled."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop  # for implementers of event loops, and what costs the least
from collections.abc import Callable
from typing import Any

from ctxdb_core._databases.status import open_units
from ctxdb_core._sqlalchemy.cancelled_queries import STOP_QUERY_TIMEOUT_SECONDS, stops_under_way
from ctxdb_core._sqlalchemy.door import Door, Refuse
from ctxdb_core._sqlalchemy.guarded_session import door_of

__all__ = ["stop_queries_of_requests", "wait_for_cancelled_queries"]

# A cancellation passes through each middleware that runs the rest of the application in a task group before it reaches
# the task that waits for the database. Each step takes a turn of the event loop, which is some microseconds.
_TURNS = 50


async def wait_for_cancelled_queries() -> None:
    """Wait until the queries of tasks that have been cancelled on this event loop are stopped, or given up.

    A server that shuts down cancels the requests that have run out of time, and ends its process right after the
    application's shutdown. Without this wait, the process would end before the database is told.
    """
    loop = _get_running_loop()
    if loop is None:
        # The application runs on trio, where no task has a session.
        return
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    latest = loop.time() + STOP_QUERY_TIMEOUT_SECONDS
    while (under_way := {*_cancelled_tasks(loop), *stops_under_way(loop)}) and loop.time() < latest:
        await asyncio.wait(under_way, timeout=latest - loop.time(), return_when=asyncio.FIRST_COMPLETED)


async def stop_queries_of_requests(is_of_application: Callable[[Any], bool], refuse: Refuse) -> None:
    """Stop the queries of requests that still run on this event loop, at the end of their application's shutdown.

    By then, its server has closed the connections of all clients (ASGI, "Lifespan Protocol"), and its process is about
    to end. Some servers have cancelled the requests that had not ended; granian has left them alone.

    Args:
        is_of_application: given an open unit of work, returns whether it is part of a request of the application.
            Other applications may run on this event loop, and go on.
        refuse: raises the error by which these calls of their sessions end.
    """
    # What the server has cancelled by now ends by its cancellation.
    await wait_for_cancelled_queries()
    loop = _get_running_loop()
    for door in _open_doors(is_of_application):
        task = door.running_task
        if task is not None and task.get_loop() is loop and task is not asyncio.current_task():
            door.interrupt(refuse)
    await wait_for_cancelled_queries()


def _cancelled_tasks(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """Return the tasks that were cancelled during a call of their unit's session, and whose call has not ended."""
    tasks = {door.cancelled_task for door in _open_doors()} - {asyncio.current_task()}
    return {task for task in tasks if task is not None and task.get_loop() is loop}


def _open_doors(is_wanted: Callable[[Any], bool] | None = None) -> list[Door]:
    """Return the doors of the sessions of open units of work: of all, or of those that `is_wanted` returns true for."""
    units = [unit for reference in tuple(open_units) if (unit := reference()) is not None]
    doors = [
        door_of(session)
        for unit in units
        if is_wanted is None or is_wanted(unit)
        for session in tuple(unit.sessions.values())
    ]
    return [door for door in doors if door is not None]
