"""Callbacks of `on_commit` that a test looks at, instead of having them run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ctxdb_core._databases.connect import DBConnect, check_database
from ctxdb_core._units.lifecycle import run_in_new_ctx


class CapturedCallbacks(list[Callable[[], object]]):
    """Callbacks whose commit has succeeded, in the order in which they would have run."""

    async def run(self) -> None:
        """Run them now, each in a unit of work of its own, and take them out.

        Raises:
            BaseException: what one of them raises; the callbacks after it stay in the list.
        """
        while self:
            await run_in_new_ctx(_call, self.pop(0))


async def _call(callback: Callable[[], object]) -> None:
    result = callback()
    if inspect.isawaitable(result):
        await result


@contextmanager
def capture_on_commit(db: DBConnect) -> Iterator[CapturedCallbacks]:
    """Collect the callbacks that `on_commit` is given for `db` in the block, instead of running them.

    A callback is there once the commit that it waits for has succeeded, and never if there is a roll-back: when the
    response has been received, for instance. Tasks, threads and event loops make no difference. Blocks may be nested:
    the innermost one collects.

    Args:
        db: the database.

    Returns:
        A list, which is filled as commits succeed. Its ``run()`` runs them.
    """
    check_database(db)
    captured = CapturedCallbacks()

    def capture(callback: Callable[[], object]) -> Callable[[], object]:
        return lambda: captured.append(callback)

    outer, db._capture_callback = db._capture_callback, capture  # noqa: SLF001 - the core's own
    try:
        yield captured
    finally:
        db._capture_callback = outer  # noqa: SLF001 - as above
