"""The end of a block of ``session.begin()`` or ``session.begin_nested()``: an error undoes all of the block.

What was done in a block that ends by an error must not be committed with the transaction around it, also where the
block's own end could not roll it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from ctxdb_core._shield import run_to_completion
from ctxdb_core._sqlalchemy.calls import pass_door
from ctxdb_core._sqlalchemy.door import Door
from ctxdb_core._sqlalchemy.guarded_session import GuardedSession
from ctxdb_core._sqlalchemy.task_blocks import TaskBlock
from ctxdb_core.errors import TransactionAbortedError

__all__ = ["end_block_in_turn", "end_undone_block"]

UNDO_SECONDS = 5.0
"""How long the end of a block that was cancelled waits for the calls of other tasks, to roll back what it has done."""


async def end_undone_block(
    session: GuardedSession, error: BaseException, end: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """End a block whose work a flush has undone by its `error`, which the code in the block has caught.

    SQLAlchemy ends the block as if it had been committed.

    Raises:
        TransactionAbortedError: always.
    """
    await pass_door(session.door, end, args, {})
    raise TransactionAbortedError(
        "A flush in this block failed, and its error was caught inside of the block: SQLAlchemy has rolled back all "
        "that was done in the block, and goes on as if nothing had happened. Let the error leave the block, or flush "
        "what may fail inside `async with session.begin_nested():` of its own."
    ) from error


async def end_block_in_turn(door: Door, end: Any, args: tuple[Any, ...]) -> Any:
    """End a block on a session that other tasks are using: after their calls.

    If the task is cancelled while it waits for them, the block ends by that, and is rolled back after them. If that
    takes too long, the transaction cannot be committed any more.

    Args:
        door: that of the session.
        end: the ``__exit__`` of the block's transaction, or savepoint.
        args: its arguments: the exception that leaves the block, if one does.

    Raises:
        BaseException: what the end of the block raises.
    """
    if not door.enter():
        try:
            await door.wait()
        except BaseException as exc:
            try:
                await run_to_completion(_undo(door, end, args[1] or exc))
            except Exception as failure:
                # The waiting took too long, for instance, or the unit of work has ended.
                _refuse_commits(end.__self__, args[1] or exc)
                raise exc from failure
            raise
    try:
        return await pass_door(door, end, args, {})
    finally:
        door.leave()


async def _undo(door: Door, end: Callable[..., Any], error: BaseException) -> None:
    # The calls that wait would be part of the block, so they come after its end.
    async with asyncio.timeout(UNDO_SECONDS), door.turn_ahead():
        await pass_door(door, end, (type(error), error, error.__traceback__), {})


def _refuse_commits(transaction: SessionTransaction, error: BaseException) -> None:
    """Have each commit raise an error as long as `transaction` is open, of which a part should have been undone."""
    block = TaskBlock()
    block.follow(transaction)
    reason = type(error).__name__

    @event.listens_for(transaction.session, "before_commit")
    def refuse(session: Session) -> None:
        if block.is_open:
            raise TransactionAbortedError(
                f"{reason} left a block of this transaction while a call of another task on its session was under way: "
                f"what was done in the block could not be rolled back within {UNDO_SECONDS:g} seconds, so nothing of "
                "the transaction can be committed. Let the error propagate; or give the other task a unit of work of "
                "its own (`run_in_new_ctx`)."
            )
