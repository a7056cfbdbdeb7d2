"""Tasks that outlive the unit of work in which they were started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ctxdb_core import new_db_ctx


async def after_its_unit(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `work` in a task that was started in a unit of work, once the unit has ended."""
    release = asyncio.Event()

    async def late() -> None:
        await release.wait()
        await work()

    async with new_db_ctx():
        task = asyncio.create_task(late())
    release.set()
    await task
